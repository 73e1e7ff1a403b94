"""HPSv3: released names, the released positions, and a literal transcription of the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from t2i_align.catalog import find_root
from t2i_align.contract import Media
from t2i_align.errors import ModelError, UserError
from t2i_align.judges.hpsv3 import HPSv3, HPSv3Options
from t2i_align.judges.hpsv3_inputs import Patcher, read_template
from t2i_align.judges.hpsv3_model import KEYS, HPSv3Model, load_base, load_model
from t2i_align.judges.key_map import renamed

CPU = torch.device("cpu")
DIM, MLP, HEADS, LAYERS, PATCH, PIXELS = 32, 48, 2, 2, 4, 1024
TEXTS = ["a red cat", "two dogs left of a cat", "a", "a house"]
WORDS = "rate this picture a red cat two dogs left of house user assistant".split()
SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"]
TALK = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}<|im_start|> assistant"
)


def write_base(folder: Path, act: str = "quick_gelu") -> None:
    """Config and tokenizer of a tiny Qwen2-VL."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

    known = {w: i for i, w in enumerate([*SPECIAL, *WORDS])}
    made: Any = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": SPECIAL[2:]}
    build: Any = PreTrainedTokenizerFast
    tok = build(tokenizer_object=made, chat_template=TALK, **names)
    tok.save_pretrained(folder)
    text = {
        "vocab_size": len(known),
        "hidden_size": DIM,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {"depth": LAYERS, "embed_dim": DIM, "hidden_size": DIM, "num_heads": HEADS}
    vision |= {"mlp_ratio": 2, "patch_size": PATCH, "hidden_act": act}
    build = Qwen2VLConfig
    build(
        text_config=text, vision_config=vision, image_token_id=known["<|image_pad|>"]
    ).save_pretrained(folder)


def published(folder: Path) -> dict[str, Tensor]:
    """Random weights under the released names (those of transformers 4.45), language head too."""
    config, tokenizer = load_base("base", None, folder)
    config.text_config.vocab_size = len(tokenizer) + 1
    torch.manual_seed(0)
    own = HPSv3Model(config).state_dict()
    for value in own.values():
        if value.dim() > 1:
            value.copy_(torch.randn_like(value) / value[0].numel() ** 0.5)
        else:
            value.add_(0.1 * torch.randn_like(value))
    made = renamed(own, KEYS, "HPSv3", back=True)
    return made | {"lm_head.weight": torch.zeros(len(tokenizer) + 1, DIM)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hpsv3")
    write_base(path / "base")
    save_file(published(path), path / "HPSv3.safetensors")
    (path / "template.txt").write_text("rate this picture {prompt} <|Reward|>\n")
    return path


def build(folder: Path, positions: str = "released") -> HPSv3:
    given = {"name_or_path": ".", "base": "base", "num_pixels": PIXELS, "positions": positions}
    return HPSv3(folder, HPSv3Options.model_validate(given), CPU, torch.float32)


@pytest.fixture(scope="module")
def judge(folder: Path) -> HPSv3:
    return build(folder)


def pictures(*sizes: tuple[int, int]) -> list[Media]:
    rng = torch.Generator().manual_seed(1)
    return [
        Media(
            "image",
            F.interpolate(torch.rand(1, 3, 4, 4, generator=rng), size=s, mode="bicubic").clamp(
                0, 1
            )[0],
        )
        for s in sizes
    ]


SIZES = ((40, 40), (24, 60), (80, 33), (40, 40))


# --- a literal transcription ---


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """``(..., L, D)`` turned by ``(L, D / 2)``."""
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def vision(p: dict[str, Tensor], patches: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens of one picture, 2 x 2 patches each."""
    lin = lambda x, n: F.linear(x, p[f"visual.{n}.weight"], p[f"visual.{n}.bias"])  # noqa: E731
    ln = lambda x, n: F.layer_norm(  # noqa: E731
        x, (DIM,), p[f"visual.{n}.weight"], p[f"visual.{n}.bias"], 1e-6
    )
    x = patches @ p["visual.patch_embed.proj.weight"].flatten(1).T
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    place = place.view(rows // 2, 2, columns // 2, 2, 2).transpose(1, 2).reshape(-1, 2)
    size = DIM // HEADS
    steps = 10000.0 ** -(torch.arange(0, size // 2, 2) / (size // 2))
    angle = torch.cat([place[:, :1] * steps, place[:, 1:] * steps], -1)
    for n in range(LAYERS):
        q, k, v = lin(ln(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.qkv").chunk(3, -1)
        q, k, v = (y.view(-1, HEADS, size).transpose(0, 1) for y in (q, k, v))
        weight = (rotated(q, angle) @ rotated(k, angle).transpose(1, 2) / size**0.5).softmax(-1)
        x = x + lin((weight @ v).transpose(0, 1).flatten(1), f"blocks.{n}.attn.proj")
        y = lin(ln(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.fc1")
        x = x + lin(y * torch.sigmoid(1.702 * y), f"blocks.{n}.mlp.fc2")
    x = ln(x, "merger.ln_q").view(-1, 4 * DIM)
    return lin(F.gelu(lin(x, "merger.mlp.0")), "merger.mlp.2")


def language(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Hidden states of one unpadded row with positions 0, 1, 2, ..."""
    size = DIM // HEADS
    norm = lambda y, n: (  # noqa: E731
        p[f"model.{n}.weight"] * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    )
    angle = torch.arange(len(x))[:, None] * 1e6 ** -(torch.arange(0, size, 2) / size)
    later = torch.ones(len(x), len(x)).triu(1).bool()
    for n in range(LAYERS):
        a, m = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        y = norm(x, f"layers.{n}.input_layernorm")
        q, k, v = (
            F.linear(y, p[f"{a}.{i}_proj.weight"], p[f"{a}.{i}_proj.bias"])
            .view(len(x), -1, size)
            .transpose(0, 1)
            for i in "qkv"
        )
        weight = rotated(q, angle) @ rotated(k, angle).transpose(1, 2) / size**0.5
        weight = weight.masked_fill(later, -torch.inf).softmax(-1)
        x = x + (weight @ v).transpose(0, 1).flatten(1) @ p[f"{a}.o_proj.weight"].T
        y = norm(x, f"layers.{n}.post_attention_layernorm")
        gate = F.silu(y @ p[f"{m}.gate_proj.weight"].T)
        x = x + (gate * (y @ p[f"{m}.up_proj.weight"].T)) @ p[f"{m}.down_proj.weight"].T
    return norm(x, "norm")


def transcription(p: dict[str, Tensor], judge: HPSv3, media: Media, prompt: str) -> list[float]:
    """judges.md 4.4: mu and sigma of one picture."""
    image = Image.fromarray((media.data * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
    cut = judge.patcher.image(image)
    ids = judge.chat.tokens([judge.chat.text(prompt, cut.grid)])[0][0]
    x = p["model.embed_tokens.weight"][ids].clone()
    x[ids == SPECIAL.index("<|image_pad|>")] = vision(p, cut.values, *cut.grid)
    h = language(p, x)[ids == len(SPECIAL) + len(WORDS)]
    for i in (0, 3, 5):
        h = F.linear(h, p[f"rm_head.{i}.weight"], p[f"rm_head.{i}.bias"])
        h = h.relu() if i < 5 else h
    return [h[0, 0].item(), h[0, 1].exp().item()]


def test_the_judge_is_the_published_network(judge: HPSv3, folder: Path) -> None:
    media, p = pictures(*SIZES), published(folder)
    expected = torch.tensor(
        [transcription(p, judge, m, t) for m, t in zip(media, TEXTS, strict=True)]
    )
    assert expected[:, 0].std() > 0.02
    assert (judge.score(media, TEXTS).values - expected[:, 0]).abs().max() <= 1e-5
    cut = [judge.patcher.tensor(m.data[None])[0] for m in media[:2]]
    found = judge.gaussian(cut, TEXTS[:2])
    assert (found[:, 1] > 0).all() and (found - expected[:2]).abs().max() <= 0.02


def test_true_positions_are_another_function(folder: Path, judge: HPSv3) -> None:
    media = pictures(*SIZES)
    released, mrope = judge.score(media, TEXTS).values, build(folder, "mrope").score(media, TEXTS)
    assert mrope.num_failed == 0
    assert (released - mrope.values).abs().min() > 1e-5


# --- names ---


def test_names_go_there_and_back(folder: Path) -> None:
    weights = {k: v for k, v in published(folder).items() if k != "lm_head.weight"}
    ours = renamed(weights, KEYS, "HPSv3")
    assert {"model.visual.merger.ln_q.weight", "model.language_model.norm.weight"} <= set(ours)
    back = renamed(ours, KEYS, "HPSv3", back=True)
    assert set(back) == set(weights) and all(back[k] is weights[k] for k in weights)
    config, tokenizer = load_base("base", None, folder)
    load_model(ours, config, len(tokenizer) + 1, torch.float32)  # names of newer transformers


def test_files_that_do_not_fit_are_refused(folder: Path) -> None:
    config, tokenizer = load_base("base", None, folder)
    with pytest.raises(ModelError, match=r"have 20 words, the base model's tokenizer .* 19"):
        load_model(published(folder), config, len(tokenizer), torch.float32)
    weights = published(folder)
    del weights["rm_head.3.bias"]
    with pytest.raises(ModelError, match=r"do not fit HPSv3: .*rm_head\.3\.bias"):
        load_model(weights, config, len(tokenizer) + 1, torch.float32)


def test_another_activation_is_refused(folder: Path, tmp_path: Path) -> None:
    write_base(tmp_path / "base", act="gelu")
    with pytest.raises(ModelError, match=r"\('gelu', 'silu'\); HPSv3 was trained with quick_gelu"):
        load_base("base", None, tmp_path)
    with pytest.raises(ModelError, match="bring the folder of Qwen2-VL-7B-Instruct"):
        load_base("./none", None, tmp_path)


def test_the_head_stays_in_float32(folder: Path) -> None:
    config, tokenizer = load_base("base", None, folder)
    model = load_model(published(folder), config, len(tokenizer) + 1, torch.bfloat16)
    types = {k: v.dtype for k, v in model.state_dict().items()}
    assert {v for k, v in types.items() if "rm_head" in k} == {torch.float32}
    assert {v for k, v in types.items() if "rm_head" not in k} == {torch.bfloat16}


# --- pictures ---


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (448, 448)),
        ((512, 512), (448, 448)),
        ((256, 256), (448, 448)),
        ((768, 1024), (364, 504)),
        ((720, 1280), (336, 588)),
    ],
)
def test_released_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """judges.md 4.4, (height, width)."""
    assert Patcher(14, 2, 2, 256 * 28 * 28).size(*size) == expected


def test_patches_are_the_processors() -> None:
    """Against transformers' image processor (PIL), picture by picture."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    make: Any = Qwen2VLImageProcessorPil
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    processor = make(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size)
    patcher = Patcher(PATCH, 2, 2, PIXELS)
    for media in pictures((40, 40), (24, 60)):
        array = (media.data * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        image = Image.fromarray(array)
        theirs = processor(images=[image], return_tensors="pt")
        ours = patcher.image(image)
        assert theirs["image_grid_thw"].tolist() == [[1, *ours.grid]]
        assert (theirs["pixel_values"] - ours.values).abs().max() <= 1e-5


# --- text ---


def test_the_chat_has_a_place_for_every_token_and_ends_with_the_reading_place(
    judge: HPSv3,
) -> None:
    text = judge.chat.text("two dogs", (4, 6))
    assert text.count("<|image_pad|>") == 6 and text.count("<|Reward|>") == 1
    assert "rate this picture two dogs <|Reward|><|im_end|>" in text
    _, mask = judge.chat.tokens([text, judge.chat.text("a", (2, 2))])
    assert judge.chat.reward_id == len(SPECIAL) + len(WORDS)
    assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True)  # padded on the right


def test_braces_are_text_and_control_tokens_are_refused(judge: HPSv3) -> None:
    odd = "{text_prompt} {prompt} {0}"
    assert f"picture {odd} <|Reward|>" in judge.chat.text(odd, (2, 2))
    found = judge.score(pictures((40, 40), (40, 40)), ["a <|Reward|> cat", "a cat"])
    assert found.reasons[0] == "the prompt holds '<|Reward|>', a control token of the judge"
    assert found.values[1].isfinite()


def test_templates_name_both_places(tmp_path: Path) -> None:
    shipped = read_template(find_root() / "reward_models/hpsv3/template.txt")
    assert shipped.endswith("<|Reward|>")
    (tmp_path / "released.txt").write_text("rate {text_prompt} <|Reward|>")
    assert read_template(tmp_path / "released.txt").startswith("rate {text_prompt}")
    (tmp_path / "bad.txt").write_text("rate {prompt}")
    with pytest.raises(UserError, match=r"must hold \{prompt\} or \{text_prompt\} once and"):
        read_template(tmp_path / "bad.txt")


# --- the contract ---


def test_a_score_depends_on_nothing_beside_it(judge: HPSv3) -> None:
    media = pictures(*SIZES)
    together = judge.score(media, TEXTS).values
    alone = torch.cat([judge.score([m], [t]).values for m, t in zip(media, TEXTS, strict=True)])
    turned = judge.score(media[::-1], TEXTS[::-1]).values.flip(0)
    assert (together - alone).abs().max() <= 1e-5 and (together - turned).abs().max() <= 1e-5


def test_tensors_agree_with_pictures_and_the_gradient_is_the_slope(judge: HPSv3) -> None:
    media = pictures((40, 40), (40, 40))
    pixels = torch.stack([m.data for m in media]).requires_grad_()
    found = judge.score_tensor(pixels, TEXTS[:2])
    assert (found.detach() - judge.score(media, TEXTS[:2]).values).abs().max() <= 0.02
    found.sum().backward()
    assert pixels.grad is not None
    size = pixels.grad.flatten(1).norm(dim=1)
    step = 1e-2 * pixels.grad / size[:, None, None, None]
    with torch.no_grad():
        up, down = (judge.score_tensor(pixels + s * step, TEXTS[:2]) for s in (1, -1))
    assert torch.allclose(up - down, 2e-2 * size, rtol=0.1)


def test_too_narrow_a_picture_is_nan_with_the_reason(judge: HPSv3) -> None:
    found = judge.score([Media("image", torch.zeros(3, 1, 300))], ["a cat"])
    assert "aspect ratio must be smaller than 200" in str(found.reasons[0])


def test_the_base_config_is_read_as_json(folder: Path) -> None:
    """What has to be brought is small: config and tokenizer, no weights of the base."""
    assert json.loads((folder / "base/config.json").read_text())["model_type"] == "qwen2_vl"
    assert not list((folder / "base").glob("*.safetensors"))
