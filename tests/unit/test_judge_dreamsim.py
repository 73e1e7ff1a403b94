"""DreamSim: the merge of published files, and the distance, against a literal network.

The literal network is DINO's vision transformer as its paper has it (and DreamSim puts CLIPs into),
with the LoRA applied beside the matrices instead of merged into them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_clip import (
    PROMPTS,
    check_independence,
    check_slope,
    judge_of,
    media,
    pictures,
    tensor_of,
    values,
)
from torch import Tensor
from torchvision.transforms import v2

from t2i_align.contract import Media
from t2i_align.errors import ModelError, OutputError
from t2i_align.judges.convert import convert
from t2i_align.judges.dreamsim_merge import folder_hash
from t2i_align.judges.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from t2i_align.judges.weights import load_tensors, sha256_of

SIDE, PATCH, WIDTH, HEADS, BLOCKS, OUT, RANK, ALPHA = 32, 16, 128, 2, 2, 24, 4, 0.5
NAMES = ("dino", "clip", "open_clip")
BASES = {
    "dino": "dino_vitbase16_pretrain.pth",
    "clip": "clip_vitb16_pretrain.pth.tar",
    "open_clip": "open_clip_vitb16_pretrain.pth.tar",
}


def base(name: str) -> dict[str, Tensor]:
    """Random weights under the names of DINO's vision transformer."""
    rng = torch.Generator().manual_seed(len(name))
    draw = lambda *s: torch.randn(*s, generator=rng) / s[-1] ** 0.5  # noqa: E731

    def norm(key: str) -> dict[str, Tensor]:
        return {f"{key}.weight": 1 + 0.1 * draw(WIDTH), f"{key}.bias": 0.1 * draw(WIDTH)}

    made = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, 1 + (SIDE // PATCH) ** 2, WIDTH)}
    made["patch_embed.proj.weight"] = draw(WIDTH, 3, PATCH, PATCH) / PATCH
    made["patch_embed.proj.bias"] = draw(WIDTH) if name == "dino" else torch.zeros(WIDTH)
    for n in range(BLOCKS):
        made |= norm(f"blocks.{n}.norm1") | norm(f"blocks.{n}.norm2")
        for part, out, given in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):
            made[f"blocks.{n}.{part}.weight"] = draw(out, given)
            made[f"blocks.{n}.{part}.bias"] = 0.1 * draw(out)
    made |= norm("norm")
    if name != "dino":
        made |= norm("pos_drop") | {"proj": draw(WIDTH, OUT)}
    return made


def adapter(name: str) -> dict[str, Tensor]:
    """LoRA matrices by block and side."""
    rng = torch.Generator().manual_seed(10 + len(name))
    shapes = {"A": (RANK, WIDTH), "B": (3 * WIDTH, RANK)}
    return {f"{n}.{s}": torch.randn(shapes[s], generator=rng) for n in range(BLOCKS) for s in "AB"}


def release(folder: Path) -> Path:
    """The published files: peft stores each matrix under both names that the wrapper gives it."""
    folder.mkdir(parents=True)
    for name in NAMES:
        weights = base(name)
        torch.save(weights if name == "dino" else {"state_dict": weights}, folder / BASES[name])
        lora = folder / f"{name}_vitb16_lora"
        lora.mkdir()
        stored = {}
        for key, value in adapter(name).items():
            number, side = key.split(".")
            for path in ("model.blocks", "blocks"):
                outer = f"base_model.model.base_model.model.{path}.{number}.attn.qkv"
                stored[f"{outer}.lora_{side}.weight"] = value
        torch.save(stored, lora / "adapter_model.bin")
        config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["qkv"], "peft_type": "LORA"}
        (lora / "adapter_config.json").write_text(json.dumps(config))
    return folder


def vision_transformer(name: str, x: Tensor) -> Tensor:
    """What DreamSim reads of one network, ``(B, width or OUT)``."""
    w, lora = base(name), adapter(name)
    eps = 1e-6 if name == "dino" else 1e-5

    def norm(key: str, y: Tensor) -> Tensor:
        return F.layer_norm(y, (WIDTH,), w[f"{key}.weight"], w[f"{key}.bias"], eps)

    def line(key: str, y: Tensor) -> Tensor:
        return y @ w[f"{key}.weight"].T + w[f"{key}.bias"]

    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    x = x if name == "dino" else norm("pos_drop", x)
    for n in range(BLOCKS):
        y = norm(f"blocks.{n}.norm1", x)
        joint = line(f"blocks.{n}.attn.qkv", y)
        joint = joint + ALPHA / RANK * (y @ lora[f"{n}.A"].T @ lora[f"{n}.B"].T)
        joint = joint.reshape(*y.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = joint
        weight = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        x = x + line(f"blocks.{n}.attn.proj", (weight @ v).transpose(1, 2).flatten(2))
        y = line(f"blocks.{n}.mlp.fc1", norm(f"blocks.{n}.norm2", x))
        y = y * (1.702 * y).sigmoid() if name == "clip" else F.gelu(y)
        x = x + line(f"blocks.{n}.mlp.fc2", y)
    return x[:, 0] if name == "dino" else norm("norm", x)[:, 0] @ w["proj"]


def literal(images: list[Image.Image], references: list[Image.Image]) -> Tensor:
    """1 - cos of embeddings that were divided by their norm and freed of their mean."""
    steps = [v2.Resize((SIDE, SIDE), v2.InterpolationMode.BICUBIC), v2.ToImage()]
    prepare = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])
    means = {"dino": (IMAGENET_MEAN, IMAGENET_STD)}
    both = []
    for side in (images, references):
        inputs = torch.stack([prepare(i) for i in side])
        parts = []
        for name in NAMES:
            mean, std = means.get(name, (CLIP_MEAN, CLIP_STD))
            parts.append(vision_transformer(name, v2.Normalize(mean, std)(inputs)))
        embed = torch.cat(parts, -1)
        embed = (embed.T / torch.norm(embed, dim=1)).T
        both.append((embed.T - torch.mean(embed, dim=1)).T)
    return 1 - F.cosine_similarity(both[0], both[1], dim=-1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("release") / "files")


@pytest.fixture(scope="module")
def judge(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("merged") / "dreamsim"
    report = convert("dreamsim", files, out, folder_hash(files))
    assert report.file == out / "model.safetensors" and report.source_sha256 == folder_hash(files)
    return judge_of("dreamsim", out.parent, name_or_path=".")


def referenced(images: list[Any], references: list[Any]) -> list[Media]:
    pairs = zip(media(images), media(references), strict=True)
    return [Media("image", m.data, {"reference": r}) for m, r in pairs]


def test_the_merged_file_gives_the_literal_distance(judge: Any) -> None:
    images = pictures()
    expected = literal(images, images[::-1])
    found = values(judge.score(referenced(images, images[::-1]), PROMPTS))
    assert (found - expected).abs().max() <= 1e-5
    assert found[2].abs() <= 1e-6 and found[0] > 1e-2  # the middle one is its own reference
    assert judge.weights_sha256 == sha256_of(judge.file)


def test_nothing_beside_a_sample_matters(judge: Any) -> None:
    images = pictures()
    check_independence(judge, referenced(images, images[::-1]), PROMPTS)


def test_tensors_follow_pictures_and_carry_gradients(judge: Any) -> None:
    images = pictures(((40, 56),) * 2)
    others = tensor_of(images[::-1])
    found = judge.score_tensor(tensor_of(images), ["", ""], others)
    seen = values(judge.score(referenced(images, images[::-1]), ["", ""]))
    assert (found - seen).abs().max() <= 0.01
    check_slope(lambda x: judge.score_tensor(x, ["", ""], others), tensor_of(images), step=2e-3)


def test_without_a_reference_there_is_no_distance(judge: Any) -> None:
    found = judge.score(media(pictures()[:1]), [""])
    assert found.values.isnan().all() and "no reference picture" in str(found.reasons[0])


def test_files_are_asked_for_and_hashed(tmp_path: Path) -> None:
    folder = release(tmp_path / "files")
    own = folder_hash(folder)
    with pytest.raises(ModelError, match=rf"pickles, which may run code(?s:.*)--sha256 {own}"):
        convert("dreamsim", folder, tmp_path / "out")
    (folder / "README").write_text("other files do not count")
    assert folder_hash(folder) == own
    with pytest.raises(ModelError, match=rf"joint sha256 {own}, not 0000"):
        convert("dreamsim", folder, tmp_path / "out", "0" * 64)
    (folder / BASES["dino"]).unlink()
    (folder / "clip_vitb16_lora" / "adapter_model.bin").unlink()
    text = r"lacks dino_vitbase16_pretrain\.pth, clip_vitb16_lora/adapter_model\.bin"
    with pytest.raises(ModelError, match=rf"{text}(?s:.*)unzip DreamSim's release"):
        folder_hash(folder)
    assert not (tmp_path / "out").exists()


def changed(tmp_path: Path, file: str, change: Any) -> str:
    """The error of a merge after a file's tensors were changed."""
    folder = release(tmp_path / "files")
    path = folder / file
    tensors = load_tensors(path, sha256_of(path))
    change(tensors)
    torch.save(tensors, path)
    with pytest.raises(ModelError) as error:
        convert("dreamsim", folder, tmp_path / "out", folder_hash(folder))
    return str(error.value)


def test_what_is_not_as_published_is_refused(tmp_path: Path) -> None:
    lora = "dino_vitb16_lora/adapter_model.bin"
    first = "base_model.model.base_model.model.blocks.0.attn.qkv.lora_A.weight"
    cases: list[tuple[str, Any, str]] = [
        (lora, lambda t: t.update({first: torch.zeros(RANK, WIDTH)}), "two different matrices"),
        (lora, lambda t: t.update({"x.lora_A.weight": t[first]}), "x.lora_A.weight, which is no"),
        (lora, lambda t: [t.pop(k) for k in list(t) if ".1." in k and "_B" in k], "other half"),
        (BASES["clip"], lambda t: t["patch_embed.proj.bias"].add_(1), "a patch bias that is not 0"),
        (BASES["clip"], lambda t: t.update(more=t["proj"]), "outside the published layout: more"),
        (
            BASES["dino"],
            lambda t: t.pop("blocks.0.attn.qkv.weight"),
            "LoRA of dino changes blocks.0",
        ),
    ]
    for i, (file, change, text) in enumerate(cases):
        assert text in changed(tmp_path / str(i), file, change)


def test_unmerged_weights_are_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "dreamsim").mkdir()
    path = files / BASES["clip"]
    torch.save(load_tensors(path, sha256_of(path)), tmp_path / "dreamsim" / "a.pth")
    own = sha256_of(tmp_path / "dreamsim" / "a.pth")
    judge = judge_of("dreamsim", tmp_path, name_or_path="./a.pth", sha256=own)
    with pytest.raises(ModelError, match="these are no merged DreamSim weights: 'dino"):
        _ = judge.model
    convert("dreamsim", files, tmp_path / "out", folder_hash(files))
    with pytest.raises(OutputError, match=r"model\.safetensors exists"):
        convert("dreamsim", files, tmp_path / "out", folder_hash(files))
