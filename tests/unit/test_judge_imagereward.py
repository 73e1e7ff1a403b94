"""ImageReward: published key names, and the same numbers as a literal transcription."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from t2i_align.contract import Media
from t2i_align.errors import ModelError
from t2i_align.judges.imagereward import ImageReward, ImageRewardOptions
from t2i_align.judges.imagereward_model import KEYS, ImageRewardModel, load_model
from t2i_align.judges.key_map import renamed

CPU = torch.device("cpu")
WIDTH, MLP, LAYERS, PATCH, SIDE, WORDS = 128, 192, 2, 16, 48, 40
TEXTS = ["a red cat", "two dogs", "a cat and a dog left of a house " * 9, ""]
TOKENS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"a red cat two dogs dog and left of".split(),
]


def published() -> dict[str, Tensor]:
    """Random weights under the released names, one of each kind."""
    rng = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}

    def linear(name: str, out: int, into: int) -> None:
        made[f"{name}.weight"] = torch.randn(out, into, generator=rng) / into**0.5
        made[f"{name}.bias"] = 0.1 * torch.randn(out, generator=rng)

    def norm(name: str) -> None:
        made[f"{name}.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=rng)
        made[f"{name}.bias"] = 0.1 * torch.randn(WIDTH, generator=rng)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    made[f"{v}.cls_token"] = torch.randn(1, 1, WIDTH, generator=rng)
    made[f"{v}.pos_embed"] = torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH, generator=rng)
    made[f"{v}.patch_embed.proj.weight"] = torch.randn(WIDTH, 3, PATCH, PATCH, generator=rng) / 30
    made[f"{v}.patch_embed.proj.bias"] = torch.zeros(WIDTH)
    for n in range(LAYERS):
        block = f"{v}.blocks.{n}"
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", MLP, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, MLP)
    norm(f"{v}.norm")
    made[f"{t}.embeddings.word_embeddings.weight"] = torch.randn(WORDS, WIDTH, generator=rng)
    made[f"{t}.embeddings.position_embeddings.weight"] = torch.randn(64, WIDTH, generator=rng)
    made[f"{t}.embeddings.position_ids"] = torch.arange(64)[None]
    norm(f"{t}.embeddings.LayerNorm")
    for n in range(LAYERS):
        layer = f"{t}.encoder.layer.{n}"
        for kind in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                linear(f"{layer}.{kind}.self.{part}", WIDTH, WIDTH)
            linear(f"{layer}.{kind}.output.dense", WIDTH, WIDTH)
            norm(f"{layer}.{kind}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", MLP, WIDTH)
        linear(f"{layer}.output.dense", WIDTH, MLP)
        norm(f"{layer}.output.LayerNorm")
    for i, (out, into) in {
        0: (32, WIDTH),
        2: (16, 32),
        4: (8, 16),
        6: (4, 8),
        7: (1, 4),
    }.items():
        linear(f"mlp.layers.{i}", out, into)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imagereward")
    save_file(published(), path / "ImageReward.safetensors")
    (path / "bert").mkdir()
    (path / "bert/vocab.txt").write_text("\n".join(TOKENS) + "\n")
    (path / "bert/tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return path


@pytest.fixture(scope="module")
def judge(folder: Path) -> ImageReward:
    given = {"name_or_path": ".", "filename": "ImageReward.safetensors", "tokenizer": "bert"}
    return ImageReward(folder, ImageRewardOptions.model_validate(given), CPU, torch.float32)


def pictures(num: int) -> list[Media]:
    """Smooth pictures of one size, so that resizing bytes or floats is nearly the same."""
    rng = torch.Generator().manual_seed(1)
    coarse = torch.rand(num, 3, 5, 5, generator=rng)
    fine = F.interpolate(coarse, size=(60, 76), mode="bicubic").clamp(0, 1)
    return [Media("image", x) for x in fine]


# --- a literal transcription ---


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Heads of 64; ``(B, L, D)``; mask ``(B, keys)``."""
    q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
    weight = q @ k.transpose(-1, -2) / 64**0.5
    if mask is not None:
        weight = weight.masked_fill(~mask[:, None, None, :], -1e9)
    return (weight.softmax(-1) @ v).transpose(1, 2).flatten(2)


def transcription(p: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """judges.md 4.5 by the published names: a ViT with its norms first, a BERT with them last."""
    lin = lambda x, name: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]  # noqa: E731
    ln = lambda x, name, eps: F.layer_norm(  # noqa: E731
        x, (WIDTH,), p[f"{name}.weight"], p[f"{name}.bias"], eps
    )
    v, t = "blip.visual_encoder", "blip.text_encoder"
    x = F.conv2d(
        pixels, p[f"{v}.patch_embed.proj.weight"], p[f"{v}.patch_embed.proj.bias"], stride=PATCH
    )
    x = torch.cat([p[f"{v}.cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + p[f"{v}.pos_embed"]
    for n in range(LAYERS):
        b = f"{v}.blocks.{n}"
        q, k, val = lin(ln(x, f"{b}.norm1", 1e-6), f"{b}.attn.qkv").chunk(3, -1)
        x = x + lin(attention(q, k, val), f"{b}.attn.proj")
        x = x + lin(F.gelu(lin(ln(x, f"{b}.norm2", 1e-6), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    seen = ln(x, f"{v}.norm", 1e-6)
    h = p[f"{t}.embeddings.word_embeddings.weight"][ids]
    h = h + p[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = ln(h, f"{t}.embeddings.LayerNorm", 1e-12)
    for n in range(LAYERS):
        e = f"{t}.encoder.layer.{n}"
        for kind, other, seeing in (
            ("attention", None, mask.bool()),
            ("crossattention", seen, None),
        ):
            source = h if other is None else other
            q = lin(h, f"{e}.{kind}.self.query")
            k, val = (lin(source, f"{e}.{kind}.self.{part}") for part in ("key", "value"))
            a = lin(attention(q, k, val, seeing), f"{e}.{kind}.output.dense")
            h = ln(a + h, f"{e}.{kind}.output.LayerNorm", 1e-12)
        m = lin(F.gelu(lin(h, f"{e}.intermediate.dense")), f"{e}.output.dense")
        h = ln(m + h, f"{e}.output.LayerNorm", 1e-12)
    y = h[:, 0]
    for i in (0, 2, 4, 6, 7):
        y = lin(y, f"mlp.layers.{i}")
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_the_judge_is_the_published_network(judge: ImageReward) -> None:
    media = pictures(4)
    pixels = torch.stack([m.data for m in media])
    ids, mask = judge.tokens(TEXTS)
    expected = transcription(published(), judge.prepare.tensor(pixels), ids, mask)
    found = judge.score_tensor(pixels, TEXTS)
    assert expected.std() > 0.05
    assert (found - expected).abs().max() <= 1e-5


# --- names ---


def test_names_go_there_and_back() -> None:
    weights = {k: v for k, v in published().items() if not k.endswith("position_ids")}
    ours = renamed(weights, KEYS, "ImageReward")
    model = ImageRewardModel(published())
    assert set(ours) == set(model.state_dict())
    back = renamed(ours, KEYS, "ImageReward", back=True)
    assert set(back) == set(weights) and all(back[k] is weights[k] for k in weights)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"blip.visual_encoder.extra": torch.zeros(1)},
            "outside the published layout: blip.visual",
        ),
        ({"mlp.layers.7.bias": None}, "1 .*mlp.layers|head.7.bias missing"),
        ({"mlp.layers.4.weight": None}, "the weights lack 'mlp.layers.4.weight'"),
    ],
)
def test_a_file_of_another_layout_is_refused(change: dict[str, Tensor | None], text: str) -> None:
    weights = {k: v for k, v in (published() | change).items() if v is not None}
    with pytest.raises(ModelError, match=text):
        load_model(weights)


def test_the_folded_head_is_the_chain(judge: ImageReward) -> None:
    p, rng = published(), torch.Generator().manual_seed(3)
    x = torch.randn(5, WIDTH, generator=rng)
    y = x
    for i in (0, 2, 4, 6, 7):
        y = F.linear(y, p[f"mlp.layers.{i}.weight"], p[f"mlp.layers.{i}.bias"])
    assert (judge.model.head(x) - y).abs().max() <= 1e-6


# --- text ---


def test_prompts_start_with_cls_and_are_cut_at_35(judge: ImageReward) -> None:
    ids, mask = judge.tokens(TEXTS)
    assert ids.shape == (4, 35)
    assert ids[:, 0].tolist() == [TOKENS.index("[CLS]")] * 4
    assert mask.sum(1).tolist() == [5, 4, 35, 2]
    assert ids[2, -1] == TOKENS.index("[SEP]")
    last = judge.tokens(["[DEC] [ENC]"])[0][0, 1:3].tolist()
    assert last == [len(TOKENS), len(TOKENS) + 1]  # 30522 and 30523 of the released vocabulary


def test_a_missing_tokenizer_says_what_to_bring(folder: Path) -> None:
    given = {"name_or_path": ".", "filename": "ImageReward.safetensors", "tokenizer": "./no"}
    with pytest.raises(ModelError, match=r"no tokenizer at '\./no'(?s:.*)bring its folder"):
        ImageReward(folder, ImageRewardOptions.model_validate(given), CPU, torch.float32)


# --- the contract ---


def test_a_score_depends_on_nothing_beside_it(judge: ImageReward) -> None:
    media = pictures(4)
    together = judge.score(media, TEXTS).values
    alone = torch.cat([judge.score([m], [t]).values for m, t in zip(media, TEXTS, strict=True)])
    turned = judge.score(media[::-1], TEXTS[::-1]).values.flip(0)
    assert (together - alone).abs().max() <= 1e-5 and (together - turned).abs().max() <= 1e-5


def test_tensors_agree_with_pictures_and_the_gradient_is_the_slope(judge: ImageReward) -> None:
    media = pictures(4)
    pixels = torch.stack([m.data for m in media]).requires_grad_()
    found = judge.score_tensor(pixels, TEXTS)
    assert (found.detach() - judge.score(media, TEXTS).values).abs().max() <= 0.05
    found.sum().backward()
    assert pixels.grad is not None
    step = 1e-2 * pixels.grad / pixels.grad.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        risen = judge.score_tensor(pixels + step, TEXTS) - judge.score_tensor(pixels - step, TEXTS)
    predicted = 2e-2 * pixels.grad.flatten(1).norm(dim=1)
    assert torch.allclose(risen, predicted, rtol=0.05)


def test_what_cannot_be_judged_is_nan(judge: ImageReward) -> None:
    found = judge.score([pictures(1)[0], Media("image", b"no")], ["a cat", "a cat"])
    assert found.values[0].isfinite() and found.values[1].isnan()
    assert "not an image" in str(found.reasons[1])


def test_the_hash_is_the_files(judge: ImageReward) -> None:
    import hashlib

    assert judge.weights_sha256 == hashlib.sha256(judge.file.read_bytes()).hexdigest()


# --- released weights, where they are given ---

ASSETS = Path(os.environ.get("T2I_ALIGN_WEIGHTS", "/nowhere")) / "imagereward"
PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
GOLDEN = [0.5812, 0.2745, -1.4132, -2.0296]


if (ASSETS / "images/1.webp").is_file():  # nothing is collected without them

    def test_released_values() -> None:
        """The repository's four pictures (images/1.webp to 4.webp) beside the weights."""
        from t2i_align.judges.base import load

        media = [
            Media("image", (ASSETS / f"images/{i}.webp").read_bytes())
            for i in range(1, len(GOLDEN) + 1)
        ]
        found = load("imagereward").score(media, [PROMPT] * 4).values
        assert found.tolist() == pytest.approx(GOLDEN, abs=2e-3)


def test_the_head_stays_float32(folder: Path) -> None:
    options = {"name_or_path": ".", "filename": "ImageReward.safetensors", "tokenizer": "bert"}
    made = ImageRewardOptions.model_validate(options)
    rounded = ImageReward(folder, made, torch.device("cpu"), torch.bfloat16)
    exact = ImageReward(folder, made, torch.device("cpu"), torch.float32)
    assert next(rounded.model.vision.parameters()).dtype == torch.bfloat16
    assert torch.equal(rounded.model.head[0].weight, exact.model.head[0].weight)
