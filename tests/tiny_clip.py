"""Small CLIPs with real architectures and full key names, in the layouts they are published in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from t2i_align.catalog import find_root, read_card
from t2i_align.contract import Media
from t2i_align.judges.base import Scores
from t2i_align.registry import resolve

CPU = torch.device("cpu")
SIDE, PATCH, WIDTH, HEADS, LAYERS, EMBED, TEXT_WIDTH, TEXT_HEADS = 32, 16, 32, 2, 2, 24, 16, 2
SIZES = ((40, 56), (33, 33), (80, 31), (32, 32), (21, 47))
PROMPTS = ["a red cat", "two dogs left of a cat", "!", "A  Red\nCAT", "a " * 100 + "cat"]


def shaken(module: Any, seed: int = 0) -> Any:
    """A network whose every number is random, so that no exchanged or lost tensor goes unseen."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=rng) * max(value.std(), 0.2)
                       if value.numel() > 1 else 0.1)  # fmt: skip
    return module.eval().requires_grad_(False)


def open_clip_model(quick_gelu: bool, seed: int = 0) -> Any:
    """open_clip's own CLIP, small."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(seed)
    sees = CLIPVisionCfg(
        layers=LAYERS, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=SIDE
    )
    reads = CLIPTextCfg(
        context_length=77, vocab_size=49408, width=TEXT_WIDTH, heads=TEXT_HEADS, layers=LAYERS
    )
    return shaken(CLIP(EMBED, sees, reads, quick_gelu=quick_gelu), seed)


def clip_config(activation: str) -> Any:
    """The same shape as transformers has it."""
    from transformers import CLIPConfig

    tower = {"num_hidden_layers": LAYERS, "hidden_act": activation, "projection_dim": EMBED}
    vision = tower | {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH}
    vision |= {"num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH}
    text = tower | {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH}
    text |= {"num_attention_heads": TEXT_HEADS, "vocab_size": 49408, "eos_token_id": 2}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED)


def transformers_model(activation: str, seed: int = 0) -> Any:
    """transformers' own CLIPModel, small."""
    from transformers import CLIPModel

    torch.manual_seed(seed)
    return shaken(CLIPModel(clip_config(activation)), seed)


def write_config(folder: Path, activation: str) -> None:
    """config.json as transformers writes it."""
    clip_config(activation).save_pretrained(folder)


def open_clip_folder(folder: Path, quick_gelu: bool, filename: str) -> Any:
    """open_clip's state dict as one file, with the shape beside it; the model is returned.

    Its cosines with the pictures and prompts here have both signs.
    """
    from safetensors.torch import save_file

    model = open_clip_model(quick_gelu, seed=5)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    if filename.endswith(".safetensors"):
        save_file(tensors, folder / filename)
    else:  # HPSv2's compressed file: a dict under state_dict, float16
        half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        torch.save({"state_dict": half}, folder / filename)
        model.load_state_dict({k: v.float() for k, v in half.items()}, strict=False)
    write_config(folder, "quick_gelu" if quick_gelu else "gelu")
    return model


def transformers_folder(folder: Path, activation: str) -> Any:
    """A CLIPModel folder with the buffers that old files carry; the model is returned."""
    from safetensors.torch import save_file

    model = transformers_model(activation)
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    for tower, length in (("text", 77), ("vision", 1 + (SIDE // PATCH) ** 2)):
        tensors[f"{tower}_model.embeddings.position_ids"] = torch.arange(length)[None]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    write_config(folder, activation)
    return model


def pictures(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Image.Image]:
    """Smooth RGB pictures of several shapes (height, width)."""
    rng = np.random.default_rng(1)
    made = []
    for height, width in sizes:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        made.append(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return made


def media(images: list[Image.Image], **meta: Any) -> list[Media]:
    """PNG files."""
    found = []
    for image in images:
        stream = io.BytesIO()
        image.save(stream, "PNG")
        found.append(Media("image", stream.getvalue(), meta))
    return found


def tensor_of(images: list[Image.Image]) -> Tensor:
    """Equally large pictures as floats ``(B, 3, h, w)`` in [0, 1]."""
    arrays = np.stack([np.asarray(i) for i in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def judge_of(card: str, folder: Path, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    """The judge of a card with some options changed; its folder is called like the card."""
    found = read_card(find_root() / "reward_models" / card / "card.yaml")
    cls = resolve(str(found.implementation))
    options = cls.Options.model_validate(dict(found.details["options"]) | changed)
    return cls(folder / card, options, CPU, dtype)


def values(scores: Scores) -> Tensor:
    """All numbers; none may have failed."""
    assert scores.reasons == (None,) * len(scores.reasons)
    return scores.values


def check_independence(judge: Any, seen: list[Media], prompts: list[str]) -> None:
    """A number depends on nothing beside it: alone, together, in another order, again."""
    together = values(judge.score(seen, prompts))
    alone = [judge.score([m], [p]).values for m, p in zip(seen, prompts, strict=True)]
    assert (together - torch.cat(alone)).abs().max() <= 1e-5
    turned = values(judge.score(seen[::-1], prompts[::-1])).flip(0)
    assert (together - turned).abs().max() <= 1e-5
    assert torch.equal(together, values(judge.score(seen, prompts)))
    assert together.std() > 0


def check_slope(score: Any, pixels: Tensor, step: float = 1e-2) -> None:
    """The gradient of ``score(pixels) -> (B,)`` is its slope along the gradient's own direction."""
    inside = (0.1 + 0.8 * pixels).requires_grad_()
    (gradient,) = torch.autograd.grad(score(inside).sum(), inside)
    direction = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        rise = score(inside + step * direction) - score(inside - step * direction)
    slope = (gradient * direction).flatten(1).sum(1)
    assert (slope > 0).all()
    assert torch.allclose(rise / (2 * step), slope, rtol=0.02, atol=1e-5 / step)


def count(module: nn.Module) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in module.parameters())
