"""The time-conditioned judge: its base at the start, DiT's formulas after, per-sample levels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_align.catalog import find_root
from t2i_align.contract import Media
from t2i_align.errors import ModelError, UserError
from t2i_align.judges.base import load
from t2i_align.judges.timed_clip import TimedClip, TimedClipOptions, vision_tower
from t2i_align.judges.timed_model import Modulation, load_modulation, save_modulation

CPU = torch.device("cpu")
TEXTS = ["a photo of a red car", "a photo of two beds", "a photo of a car", "a photo of a bed"]
FOLDER = find_root() / "reward_models/timed_clip"


def pictures(num: int = 4) -> Tensor:
    coarse = torch.rand(num, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)


def fresh(**given: object) -> TimedClip:
    options = {"path": "../scenes_clip", "output": "cosine"} | given
    return TimedClip(FOLDER, TimedClipOptions.model_validate(options), CPU, torch.float32)


def stirred(modulation: Modulation, seed: int = 0, size: float = 0.3) -> Modulation:
    """Random numbers in every layer of a modulation."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in modulation.parameters():
            value.copy_(size * torch.randn(value.shape, generator=rng) / value.shape[-1] ** 0.5)
    return modulation


def open_clip_vit() -> Any:
    from open_clip.model import CLIP

    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 1, "layers": 1}
    torch.manual_seed(0)
    build: Any = CLIP
    return build(embed_dim=24, vision_cfg=vision, text_cfg=text).visual.eval()


def transformers_vit() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    build: Any = CLIPVisionConfig
    config = build(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config).eval()


def small_resnet() -> Any:
    from open_clip.modified_resnet import ModifiedResNet

    torch.manual_seed(0)
    made = ModifiedResNet([1, 1, 1, 1], 24, 2, image_size=32, width=8).eval()
    for name, value in made.named_parameters():
        if name.endswith("bn3.weight"):  # made zero at the start, which would hide a stage
            nn.init.ones_(value)
    return made


def seen(tower: Any, pixels: Tensor) -> Tensor:
    """The tower's embedding."""
    out = tower(pixels)
    return out if isinstance(out, Tensor) else out.pooler_output


TOWERS = {
    "open_clip transformer": open_clip_vit,
    "transformers": transformers_vit,
    "modified ResNet": small_resnet,
}


# --- the start ---


@pytest.mark.parametrize("name", TOWERS)
def test_untrained_a_tower_is_what_it_was_to_the_last_bit(name: str) -> None:
    tower, pixels = TOWERS[name](), torch.randn(3, 3, 32, 32)
    before = seen(tower, pixels)
    modulation = Modulation(tower, 16)
    with modulation.at(torch.tensor([0.0, 0.4, 1.0])):
        assert torch.equal(seen(tower, pixels), before)
    assert torch.equal(seen(tower, pixels), before)


def test_untrained_the_judge_is_its_base_at_every_level() -> None:
    judge, base = fresh(), load("scenes_clip")
    media = [Media("image", x, {"level": 0.3 * i}) for i, x in enumerate(pictures())]
    assert torch.equal(judge.score(media, TEXTS).values, base.score(media, TEXTS).values)
    own: Any = base
    found = judge.score_tensor(pictures(), TEXTS, torch.tensor([0.0, 0.2, 0.9, 1.0]))
    assert torch.equal(found, own.score_tensor(pictures(), TEXTS))


# --- the formulas ---


def waves(level: Tensor) -> Tensor:
    """Cosines, then sines, of 1000 level at 128 frequencies from 1 down to nearly 1 / 10000."""
    steps = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angle = 1000 * level[:, None] * steps
    return torch.cat([angle.cos(), angle.sin()], -1)


def numbers(modulation: Modulation, level: Tensor) -> list[Tensor]:
    """Eq. (1)'s linear maps of silu(e), by layer."""
    first, second = (layer for layer in modulation.embed if isinstance(layer, nn.Linear))
    e = F.silu(waves(level) @ first.weight.T + first.bias) @ second.weight.T + second.bias
    return [layer(F.silu(e)) for layer in modulation.layers]


def test_the_vision_transformer_is_dits_with_one_added_to_the_gates() -> None:
    """Eq. (1) by hand on transformers' layers, final norm included."""
    tower, pixels = transformers_vit(), torch.randn(3, 3, 32, 32)
    modulation, level = stirred(Modulation(tower, 16)), torch.tensor([0.0, 0.4, 1.0])
    *layers, final = numbers(modulation, level)
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer, found in zip(tower.encoder.layers, layers, strict=True):
        a1, b1, a2, b2, g1, g2 = (n[:, None] for n in found.chunk(6, -1))
        x = x + (1 + g1) * layer.self_attn((1 + a1) * layer.layer_norm1(x) + b1)[0]
        x = x + (1 + g2) * layer.mlp((1 + a2) * layer.layer_norm2(x) + b2)
    a, b = final.chunk(2, -1)
    expected = (1 + a) * tower.post_layernorm(x[:, 0]) + b
    assert (expected - seen(tower, pixels)).abs().max() > 0.1
    with modulation.at(level):
        assert (seen(tower, pixels) - expected).abs().max() <= 1e-5


def test_both_libraries_towers_are_conditioned_alike() -> None:
    """The same weights in open_clip's and transformers' classes, the same modulation."""
    theirs = transformers_vit()
    tower = alike(theirs.config)
    own = tower.state_dict()
    pairs = {"embeddings.class_embedding": "class_embedding", "pre_layrnorm": "ln_pre"}
    pairs |= {"embeddings.patch_embedding": "conv1", "post_layernorm": "ln_post"}
    pairs |= {"embeddings.position_embedding.weight": "positional_embedding"}
    for n in range(2):
        a, b = f"encoder.layers.{n}", f"transformer.resblocks.{n}"
        pairs |= {f"{a}.layer_norm{i}": f"{b}.ln_{i}" for i in (1, 2)}
        pairs |= {f"{a}.self_attn.out_proj": f"{b}.attn.out_proj"}
        pairs |= {f"{a}.mlp.fc1": f"{b}.mlp.c_fc", f"{a}.mlp.fc2": f"{b}.mlp.c_proj"}
    made = {}
    for name in theirs.state_dict():
        for start, to in pairs.items():
            if name == start or name.startswith(f"{start}."):
                made[name] = own[to + name.removeprefix(start)]
        if ".self_attn." in name and name not in made:
            at, which, kind = name.rsplit(".", 2)
            block = at.replace("encoder.layers", "transformer.resblocks").removesuffix(".self_attn")
            rows = own[f"{block}.attn.in_proj_{kind}"].chunk(3)
            made[name] = rows["qkv".index(which[0])]
    theirs.load_state_dict(made)
    pixels, level = torch.randn(3, 3, 32, 32), torch.tensor([0.1, 0.5, 0.9])
    first, second = stirred(Modulation(tower, 16)), stirred(Modulation(theirs, 16))
    with first.at(level), second.at(level):
        found, expected = seen(tower, pixels), seen(theirs, pixels) @ tower.proj
    assert (found - expected).abs().max() <= 1e-5


def alike(config: Any) -> Any:
    """open_clip's transformer in the sizes of transformers' config."""
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(2)
    return VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        output_dim=24,
    ).eval()


def test_the_residual_network_is_modulated_by_channel() -> None:
    """Eq. (2) by hand."""
    tower, pixels = small_resnet(), torch.randn(3, 3, 32, 32)
    modulation, level = stirred(Modulation(tower, 16)), torch.tensor([0.0, 0.4, 1.0])
    x = tower.stem(pixels)
    stages = (tower.layer1, tower.layer2, tower.layer3, tower.layer4)
    for stage, found in zip(stages, numbers(modulation, level), strict=True):
        a, b = (n[:, :, None, None] for n in found.chunk(2, -1))
        x = (1 + a) * stage(x) + b
    with modulation.at(level):
        assert (seen(tower, pixels) - tower.attnpool(x)).abs().max() <= 1e-5


# --- levels ---


def test_a_score_depends_on_its_own_level_only() -> None:
    judge = fresh()
    stirred(judge.modulation, size=1.0)
    levels = [0.0, 0.3, 0.3, 0.9]
    media = [Media("image", x, {"level": v}) for x, v in zip(pictures(), levels, strict=True)]
    together = judge.score(media, TEXTS).values
    alone = torch.cat([judge.score([m], [t]).values for m, t in zip(media, TEXTS, strict=True)])
    turned = judge.score(media[::-1], TEXTS[::-1]).values.flip(0)
    assert (together - alone).abs().max() <= 1e-5 and (together - turned).abs().max() <= 1e-5
    rows = judge.score_tensor(pictures(), TEXTS, torch.tensor(levels))
    assert (rows - together).abs().max() <= 0.02  # floats instead of bytes in the resize
    clean = judge.score([Media("image", x) for x in pictures()], TEXTS).values
    assert torch.equal(clean[0], together[0]) and (clean[1:] - together[1:]).abs().min() > 1e-4


def test_levels_outside_the_scale_are_refused() -> None:
    with pytest.raises(ValueError, match=r"noise levels are in \[0, 1\], got \[951\.0\]"):
        fresh().score_tensor(pictures(1), TEXTS[:1], 951.0)


def test_the_gradient_reaches_pixels_and_conditioning() -> None:
    judge = fresh()
    stirred(judge.modulation).requires_grad_(True)
    pixels = pictures().requires_grad_()
    judge.score_tensor(pixels, TEXTS, 0.5).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in judge.modulation.parameters())
    size = pixels.grad.flatten(1).norm(dim=1)
    step = 1e-2 * pixels.grad / size[:, None, None, None]
    with torch.no_grad():
        up, down = (judge.score_tensor(pixels + s * step, TEXTS, 0.5) for s in (1, -1))
    assert torch.allclose(up - down, 2e-2 * size, rtol=0.2)


def test_a_judge_of_transformers_clip_is_a_base_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pickscore is one: the shared trunk is conditioned inside calls of the timed judge only."""
    from transformers import CLIPConfig, CLIPModel

    from t2i_align.judges.clip_family import ClipJudge, ClipOptions

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "hidden_act": "gelu"}
    build: Any = CLIPConfig
    vision = tower | {"image_size": 32, "patch_size": 16}
    config = build(
        text_config=tower | {"vocab_size": 49408}, vision_config=vision, projection_dim=16
    )
    CLIPModel(config).save_pretrained(tmp_path)
    options = ClipOptions.model_validate({"name_or_path": ".", "filename": "model.safetensors"})
    base = ClipJudge(tmp_path, options, CPU, torch.float32)
    monkeypatch.setattr("t2i_align.judges.timed_clip.load", lambda *_: base)
    judge = fresh(path=None, judge="pickscore", width=16)
    before = base.score_tensor(pictures(), TEXTS)
    assert torch.equal(judge.score_tensor(pictures(), TEXTS, 0.7), before)
    stirred(judge.modulation)
    assert (judge.score_tensor(pictures(), TEXTS, 0.7) - before).abs().min() > 1e-4
    assert torch.equal(base.score_tensor(pictures(), TEXTS), before)
    # A strip would be huge once resized; the others' levels stay theirs.
    fine = [Media("image", x, {"level": v}) for x, v in zip(pictures(2), (0.2, 0.9), strict=True)]
    strip = Media("image", torch.zeros(3, 1, 3_000_000), {"level": 0.5})
    found = judge.score([fine[0], strip, fine[1]], TEXTS[:3])
    alone = judge.score(fine, [TEXTS[0], TEXTS[2]])
    assert found.reasons[1] and "too narrow" in found.reasons[1]
    assert torch.allclose(found.values[[0, 2]], alone.values, atol=1e-5)


# --- files, bases ---


def test_weights_come_back(tmp_path: Path) -> None:
    first = stirred(Modulation(small_resnet(), 24), seed=3)
    save_modulation(first, tmp_path / "timed.safetensors")
    second = load_modulation(small_resnet(), tmp_path / "timed.safetensors")
    assert second.width == 24
    pairs = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    with pytest.raises(ModelError, match="do not fit the modulation of a VisionTransformer"):
        load_modulation(open_clip_vit(), tmp_path / "timed.safetensors")


def test_a_saved_conditioning_is_part_of_a_judge(tmp_path: Path) -> None:
    judge = fresh()
    stirred(judge.modulation)
    save_modulation(judge.modulation, tmp_path / "timed.safetensors")
    again = fresh(timed=str(tmp_path / "timed.safetensors"))
    level = torch.tensor([0.0, 0.2, 0.9, 1.0])
    found = again.score_tensor(pictures(), TEXTS, level)
    assert torch.equal(found, judge.score_tensor(pictures(), TEXTS, level))
    assert again.weights_sha256 != judge.weights_sha256


def test_towers_and_judges_of_other_kinds_are_refused() -> None:
    with pytest.raises(ModelError, match="class Linear cannot be conditioned on a noise level"):
        Modulation(nn.Linear(2, 2), 4)
    with pytest.raises(UserError, match="class ImageStatistic has no CLIP vision tower"):
        vision_tower(load("sharpness"))
    with pytest.raises(ValueError, match="give exactly one of path and judge"):
        TimedClipOptions.model_validate({})
