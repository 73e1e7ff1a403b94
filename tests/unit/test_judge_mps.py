"""MPS: published names, a literal transcription, and no leak between the samples of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from t2i_align.contract import Media
from t2i_align.errors import ModelError
from t2i_align.judges.key_map import renamed
from t2i_align.judges.mps import MPS, OVERALL, MPSOptions
from t2i_align.judges.mps_model import COUNTERS, KEYS, MPSModel

CPU = torch.device("cpu")
SEES, READS, DIM, LAYERS, SIDE, PATCH, CROSS = 64, 48, 64, 2, 42, 14, 2
TEXTS = ["a red cat", "two dogs left of a cat", "!", "a " * 100]


def config(act: str = "gelu") -> Any:
    """A tiny CLIP with CLIP-H's layout."""
    from transformers import CLIPConfig

    tower = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "hidden_act": act}
    text = tower | {"hidden_size": READS, "intermediate_size": 96, "vocab_size": 49408}
    vision = tower | {"hidden_size": SEES, "intermediate_size": 96}
    vision |= {"image_size": SIDE, "patch_size": PATCH}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)


def published() -> dict[str, Tensor]:
    """Random weights under the names of the released module."""
    from transformers import CLIPModel

    rng = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=rng) / s[-1] ** 0.5  # noqa: E731
    made = {f"model.{k}": v.clone() for k, v in CLIPModel(config()).state_dict().items()}
    for value in made.values():
        if value.dim() > 1:
            value.copy_(torch.randn(value.shape, generator=rng) / value[0].numel() ** 0.5)
        elif value.dim() == 1:
            value.add_(0.1 * torch.randn(value.shape, generator=rng))
    made["model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for n in range(CROSS):
        ask, think = (f"cross_model.layers.{n}.{i}.fn" for i in (0, 1))
        for block in (ask, think):
            made[f"{block}.norm.weight"] = 1 + 0.1 * torch.randn(DIM, generator=rng)
            made[f"{block}.norm.bias"] = torch.zeros(DIM)
        made[f"{ask}.to_q.weight"], made[f"{ask}.to_kv.weight"] = draw(128, DIM), draw(128, DIM)
        made[f"{ask}.to_out.weight"] = draw(DIM, 128)
        made[f"{ask}.ff.0.weight"], made[f"{ask}.ff.2.weight"] = draw(512, DIM), draw(DIM, 256)
        made[f"{think}.rotary_emb.inv_freq"] = torch.ones(32)
        made[f"{think}.fused_attn_ff_proj.weight"] = draw(128 + 64 + 64 + 512, DIM)
        made[f"{think}.attn_out.weight"] = draw(DIM, 128)
        made[f"{think}.ff_out.1.weight"] = draw(DIM, 256)
    return made


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return published()


@pytest.fixture(scope="module")
def folder(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mps")
    save_file(weights, path / "model.safetensors")
    config().save_pretrained(path)
    return path


def build(folder: Path, **given: object) -> MPS:
    options = {"name_or_path": ".", "architecture": None} | given
    return MPS(folder, MPSOptions.model_validate(options), CPU, torch.float32)


@pytest.fixture(scope="module")
def judge(folder: Path) -> MPS:
    return build(folder)


def pictures(num: int) -> list[Media]:
    coarse = torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    fine = F.interpolate(coarse, size=(50, 61), mode="bicubic").clamp(0, 1)
    return [Media("image", x) for x in fine]


# --- a literal transcription ---


def swiglu(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x[:half] * x[half:] * torch.sigmoid(x[half:])


def turned(x: Tensor, place: int) -> Tensor:
    """One vector of 64 at one place, as complex numbers."""
    angle = place * 10000.0 ** -(torch.arange(32) / 32)
    return torch.cat(
        [x[:32] * angle.cos() - x[32:] * angle.sin(), x[32:] * angle.cos() + x[:32] * angle.sin()]
    )


def cross(p: dict[str, Tensor], x: Tensor, text: Tensor, is_open: Tensor) -> Tensor:
    """Eq. (2) for one sample, token by token and head by head."""
    norm = lambda y, n: F.layer_norm(y, (DIM,), p[f"{n}.norm.weight"], p[f"{n}.norm.bias"])  # noqa: E731
    for n in range(CROSS):
        a, s = (f"cross_model.layers.{n}.{i}.fn" for i in (0, 1))
        keys, values = (text @ p[f"{a}.to_kv.weight"].T).chunk(2, -1)
        rows = []
        for y, old in zip(norm(x, a), x, strict=True):
            heads = []
            for q in (p[f"{a}.to_q.weight"] @ y).view(-1, 64):
                weight = (keys @ q / 8)[is_open].softmax(0)
                heads.append(weight @ values[is_open])
            out = p[f"{a}.to_out.weight"] @ torch.cat(heads)
            out = out + p[f"{a}.ff.2.weight"] @ swiglu(p[f"{a}.ff.0.weight"] @ y)
            rows.append(old + out)
        x = torch.stack(rows)
        projected = norm(x, s) @ p[f"{s}.fused_attn_ff_proj.weight"].T
        queries, keys, values, wide = projected.split((128, 64, 64, 512), -1)
        keys = torch.stack([turned(k, i) for i, k in enumerate(keys)])
        rows = []
        for i, (q, f, old) in enumerate(zip(queries, wide, x, strict=True)):
            heads = [(keys @ turned(h, i) / 8).softmax(0) @ values for h in q.view(-1, 64)]
            out = p[f"{s}.attn_out.weight"] @ torch.cat(heads)
            rows.append(old + out + p[f"{s}.ff_out.1.weight"] @ swiglu(f))
        x = torch.stack(rows)
    return x


def tower(p: dict[str, Tensor], name: str, x: Tensor, causal: bool) -> Tensor:
    """A CLIP encoder on one row of states ``(L, D)``."""
    norm = lambda y, n: F.layer_norm(y, y.shape[-1:], p[f"{n}.weight"], p[f"{n}.bias"], 1e-5)  # noqa: E731
    lin = lambda y, n: F.linear(y, p[f"{n}.weight"], p[f"{n}.bias"])  # noqa: E731
    for n in range(LAYERS):
        e = f"{name}.encoder.layers.{n}"
        y = norm(x, f"{e}.layer_norm1")
        q, k, v = (
            lin(y, f"{e}.self_attn.{i}_proj").unflatten(-1, (2, -1)).transpose(0, 1) for i in "qkv"
        )
        weight = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            weight = weight + torch.full((len(x), len(x)), -torch.inf).triu(1)
        y = (weight.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + lin(y, f"{e}.self_attn.out_proj")
        x = x + lin(F.gelu(lin(norm(x, f"{e}.layer_norm2"), f"{e}.mlp.fc1")), f"{e}.mlp.fc2")
    return x


def transcription(
    p: dict[str, Tensor], pixels: Tensor, ids: Tensor, condition: Tensor, threshold: float
) -> float:
    """judges.md 4.8 for one picture ``(3, s, s)`` and one prompt ``(77,)``."""
    v, t = "model.vision_model", "model.text_model"

    def said(row: Tensor) -> Tensor:
        x = p[f"{t}.embeddings.token_embedding.weight"][row]
        x = tower(p, t, x + p[f"{t}.embeddings.position_embedding.weight"], causal=True)
        norm = (p[f"{t}.final_layer_norm.weight"], p[f"{t}.final_layer_norm.bias"])
        return F.layer_norm(x, (READS,), *norm) @ p["model.text_projection.weight"].T

    x = F.conv2d(pixels[None], p[f"{v}.embeddings.patch_embedding.weight"], stride=PATCH)
    x = torch.cat([p[f"{v}.embeddings.class_embedding"][None], x[0].flatten(1).T])
    x = x + p[f"{v}.embeddings.position_embedding.weight"]
    x = F.layer_norm(x, (SEES,), p[f"{v}.pre_layrnorm.weight"], p[f"{v}.pre_layrnorm.bias"])
    x = tower(p, v, x, causal=False) @ p["model.visual_projection.weight"].T
    text, about = said(ids), said(condition)
    alike = torch.stack([(about @ token).max() for token in text])
    fused = cross(p, x, text, alike / alike.max() > threshold)[0]
    end = text[ids.tolist().index(49407)]
    return (p["model.logit_scale"].exp() * F.cosine_similarity(end, fused, dim=0)).item()


@pytest.mark.parametrize("threshold", [0.01, 0.3])
def test_the_judge_is_the_published_network(
    folder: Path, weights: dict[str, Tensor], threshold: float
) -> None:
    judge, media = build(folder, threshold=threshold), pictures(4)
    pixels = torch.stack([m.data for m in media])
    ids, condition = judge.tokens(TEXTS), judge.tokens([OVERALL])[0]
    prepared = judge.prepare.tensor(pixels)
    expected = torch.tensor(
        [
            transcription(weights, x, i, condition, threshold)
            for x, i in zip(prepared, ids, strict=True)
        ]
    )
    assert expected.std() > 0.1
    assert (judge.score_tensor(pixels, TEXTS) - expected).abs().max() <= 1e-5 * 14.3  # the scale


def test_the_mask_and_the_condition_matter(folder: Path, judge: MPS) -> None:
    media = pictures(2)
    base = judge.score(media, TEXTS[:2]).values
    tight = build(folder, threshold=0.9).score(media, TEXTS[:2]).values
    other = build(folder, threshold=0.9, condition="light, color").score(media, TEXTS[:2]).values
    assert (base - tight).abs().min() > 1e-4 and (tight - other).abs().max() > 1e-4


# --- names ---


def test_names_go_there_and_back(weights: dict[str, Tensor]) -> None:
    kept = {k: v for k, v in weights.items() if not k.endswith(COUNTERS)}
    ours = renamed(kept, KEYS, "MPS")
    assert set(ours) == set(MPSModel(config(), weights).state_dict())
    back = renamed(ours, KEYS, "MPS", back=True)
    assert set(back) == set(kept) and all(back[k] is kept[k] for k in kept)


def test_files_that_do_not_fit_are_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    save_file(
        {k: v for k, v in weights.items() if ".to_q" not in k}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ModelError, match=r"the weights lack 'cross_model\.layers\.0\.0\.fn\.to_q"):
        build(tmp_path)
    save_file(weights | {"scale": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="outside the published layout: scale"):
        build(tmp_path)


def test_another_activation_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config("quick_gelu").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="trained with gelu, not quick_gelu"):
        build(tmp_path)


# --- text ---


def test_places_behind_the_end_hold_the_end_token(judge: MPS) -> None:
    ids = judge.tokens(["a", "a cat", "a " * 100])
    assert ids.shape == (3, 77)
    assert ids[0, :3].tolist() == [49406, 320, 49407]
    assert (ids[0, 2:] == 49407).all() and (ids[1, 3:] == 49407).all()
    assert (ids[2] == 49407).nonzero().flatten().tolist() == [76]


# --- the contract ---


def test_a_score_depends_on_nothing_beside_it(judge: MPS) -> None:
    """The released maximum over the batch would show here."""
    media = pictures(4)
    together = judge.score(media, TEXTS).values
    alone = torch.cat([judge.score([m], [t]).values for m, t in zip(media, TEXTS, strict=True)])
    turned_round = judge.score(media[::-1], TEXTS[::-1]).values.flip(0)
    assert (together - alone).abs().max() <= 1e-5
    assert (together - turned_round).abs().max() <= 1e-5


def test_tensors_agree_with_pictures_and_the_gradient_is_the_slope(judge: MPS) -> None:
    media = pictures(4)
    pixels = torch.stack([m.data for m in media]).requires_grad_()
    found = judge.score_tensor(pixels, TEXTS)
    assert (found.detach() - judge.score(media, TEXTS).values).abs().max() <= 0.1
    found.sum().backward()
    assert pixels.grad is not None
    size = pixels.grad.flatten(1).norm(dim=1)
    step = 1e-2 * pixels.grad / size[:, None, None, None]
    with torch.no_grad():
        up, down = (judge.score_tensor(pixels + s * step, TEXTS) for s in (1, -1))
    assert torch.allclose(up - down, 2e-2 * size, rtol=0.1)
