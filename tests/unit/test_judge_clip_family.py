"""CLIPScore, CLIP similarity, PickScore, HPSv2 and v2.1: published layouts, literal formulas.

The literal judges are written from the papers' and codes' formulas with open_clip's or
transformers' own networks and torchvision's transforms; nothing of theirs is ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_clip import (
    PROMPTS,
    SIDE,
    check_independence,
    check_slope,
    judge_of,
    media,
    open_clip_folder,
    pictures,
    tensor_of,
    transformers_folder,
    values,
)
from torch import Tensor
from torchvision.transforms import v2

from t2i_align.catalog import find_root, read_card
from t2i_align.contract import Media
from t2i_align.errors import ModelError
from t2i_align.judges.base import load
from t2i_align.judges.preprocess import CLIP_MEAN, CLIP_STD
from t2i_align.judges.weights import VARIABLE, locate, sha256_of

CUBIC = v2.InterpolationMode.BICUBIC
NORMAL = v2.Compose(
    [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)]
)


def openai_pixels(image: Image.Image) -> Tensor:
    return NORMAL(v2.CenterCrop(SIDE)(v2.Resize(SIDE, CUBIC)(image)))


def hps_pixels(image: Image.Image) -> Tensor:
    """Floats, longest side, black bars, then mean and deviation."""
    pixels = v2.ToDtype(torch.float32, scale=True)(v2.ToImage()(image))
    scale = SIDE / max(pixels.shape[-2:])
    size = [round(d * scale) for d in pixels.shape[-2:]]
    pixels = v2.Resize(size, CUBIC, antialias=True)(pixels)
    down, right = SIDE - size[0], SIDE - size[1]
    square = F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
    return v2.Normalize(CLIP_MEAN, CLIP_STD)(square)


def with_open_clip(model: Any, inputs: Tensor, texts: list[str]) -> Tensor:
    """Cosines by open_clip's network and tokenizer."""
    import open_clip

    seen = model.encode_image(inputs)
    said = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts))
    seen = seen / seen.norm(dim=-1, keepdim=True)
    return (seen * (said / said.norm(dim=-1, keepdim=True))).sum(-1)


def clip_score_literal(model: Any, images: list[Image.Image], prompts: list[str]) -> Tensor:
    """w max(cos(c, v), 0) with w = 2.5; captions read "A photo depicts {caption}"."""
    inputs = torch.stack([openai_pixels(i) for i in images])
    cosine = with_open_clip(model, inputs, [f"A photo depicts {p}" for p in prompts])
    return 2.5 * torch.maximum(cosine, torch.zeros(()))


def hps_literal(model: Any, images: list[Image.Image], prompts: list[str]) -> Tensor:
    return with_open_clip(model, torch.stack([hps_pixels(i) for i in images]), prompts)


def with_transformers(model: Any, images: list[Image.Image], prompts: list[str]) -> Tensor:
    """Cosines as PickScore's model card computes them: its processor, its embeddings.

    Token ids come from open_clip: for these prompts all tokenizers agree (test_judge_weights).
    """
    import open_clip
    from transformers import CLIPImageProcessorPil

    size: Any = {"shortest_edge": SIDE}
    processor: Any = CLIPImageProcessorPil(size=size, crop_size={"height": SIDE, "width": SIDE})
    inputs = processor(images, return_tensors="pt")["pixel_values"]
    ids = open_clip.get_tokenizer("ViT-B-32")(prompts)
    seen = model.visual_projection(model.vision_model(inputs).pooler_output)
    said = model.text_projection(model.text_model(ids).pooler_output)
    seen = seen / torch.norm(seen, dim=-1, keepdim=True)
    said = said / torch.norm(said, dim=-1, keepdim=True)
    return torch.diagonal(said @ seen.T)


def clip_sim_literal(model: Any, images: list[Image.Image], prompts: list[str]) -> Tensor:
    return 100 * with_transformers(model, images, prompts)


def pickscore_literal(model: Any, images: list[Image.Image], prompts: list[str]) -> Tensor:
    return model.logit_scale.exp() * with_transformers(model, images, prompts)


Literal = Callable[[Any, list[Image.Image], list[str]], Tensor]
LITERAL: dict[str, Literal] = {
    "clip_score": clip_score_literal,
    "clip_sim": clip_sim_literal,
    "pickscore": pickscore_literal,
    "hpsv2": hps_literal,
    "hpsv2_1": hps_literal,
}


def options_of(card: str) -> dict[str, Any]:
    return read_card(find_root() / "reward_models" / card / "card.yaml").details["options"]


def published(card: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A random checkpoint in the published layout and under its file name, and its network."""
    given = options_of(card)
    name = given.get("filename", "model.safetensors")
    quick = str(given["architecture"]).endswith("quickgelu")
    if card in ("clip_sim", "pickscore"):
        model = transformers_folder(folder / card, "quick_gelu" if quick else "gelu")
    else:
        model = open_clip_folder(folder / card, quick, name)
    changed: dict[str, Any] = {"name_or_path": ".", "architecture": None}
    if not name.endswith(".safetensors"):
        changed["sha256"] = sha256_of(folder / card / name)
    return model, changed


@pytest.fixture(scope="module", params=sorted(LITERAL))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(card, network, judge, folder)."""
    folder = tmp_path_factory.mktemp("family")
    model, changed = published(request.param, folder)
    return request.param, model, judge_of(request.param, folder, **changed), folder


def test_a_published_checkpoint_gives_the_literal_score(made: Any) -> None:
    card, model, judge, folder = made
    images = pictures()
    with torch.no_grad():
        expected = LITERAL[card](model, images, PROMPTS)
    found = values(judge.score(media(images), PROMPTS))
    scale = max(1.0, float(expected.abs().max()))
    assert (found - expected).abs().max() <= 1e-5 * scale
    assert expected.std() > 1e-3 * scale  # pictures and prompts matter
    file = options_of(card).get("filename", "model.safetensors")
    assert judge.weights_sha256 == sha256_of(folder / card / file)


def test_nothing_beside_a_sample_matters(made: Any) -> None:
    check_independence(made[2], media(pictures()), PROMPTS)


def test_tensors_follow_pictures_and_carry_gradients(made: Any) -> None:
    card, _, judge, _ = made
    images = pictures(((40, 56),) * 3)
    prompts = PROMPTS[:3]
    tolerance = read_card(find_root() / "reward_models" / card / "card.yaml").details
    found = judge.score_tensor(tensor_of(images), prompts)
    apart = (found - values(judge.score(media(images), prompts))).abs().max()
    assert apart <= tolerance["tensor_tolerance"]
    if card == "clip_score":  # where the cosine is negative the paper's score is flat
        judge = judge_of(card, made[3], **published(card, made[3])[1], clamp=False)
    check_slope(lambda x: judge.score_tensor(x, prompts), tensor_of(images))


def test_what_cannot_be_read_is_nan_with_the_reason(made: Any) -> None:
    good = media(pictures(((40, 56),)))[0]
    narrow = Media("image", torch.zeros(3, 1, 200000))
    bad = [Media("audio", torch.zeros(4)), good, Media("image", b"no"), narrow]
    found = made[2].score(bad, PROMPTS[:4])
    known = [True, False, True, made[0] not in ("hpsv2", "hpsv2_1")]  # HPSv2 makes it smaller
    assert found.values.isnan().tolist() == known
    assert "looks at images, got audio" in str(found.reasons[0])
    if known[3]:
        assert "200000 x 1 pixels is too narrow" in str(found.reasons[3])


def test_lower_precision_stays_near(tmp_path: Path) -> None:
    _, changed = published("clip_sim", tmp_path)
    exact = judge_of("clip_sim", tmp_path, **changed)
    coarse = judge_of("clip_sim", tmp_path, torch.bfloat16, **changed)
    images, prompts = media(pictures()), PROMPTS
    first, second = values(exact.score(images, prompts)), values(coarse.score(images, prompts))
    assert 0 < (first - second).abs().max() <= 3 and second.dtype == torch.float32
    assert coarse.trunk.scale == exact.trunk.scale, "100 is 98.9 in bfloat16's logarithm"


def test_equal_weights_are_one_network(tmp_path: Path) -> None:
    """clip_sim and the tower of aesthetic_v2 share theirs, found in the weights' home."""
    published("clip_sim", tmp_path)
    first = judge_of(
        "clip_sim", tmp_path, name_or_path=str(tmp_path / "clip_sim"), architecture=None
    )
    second = judge_of(
        "clip_sim", tmp_path, name_or_path=str(tmp_path / "clip_sim"), architecture=None
    )
    assert first.trunk is second.trunk


def test_files_behind_links_are_found_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    """Its snapshots are links to files named by hash, without a suffix or a config beside them."""
    published("pickscore", tmp_path)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for k, file in enumerate(sorted((tmp_path / "pickscore").iterdir())):
        file.rename(blobs / f"{k:040x}")
        (snapshot / file.name).symlink_to(blobs / f"{k:040x}")
    given = {"name_or_path": str(snapshot), "architecture": None}
    judge = judge_of("pickscore", tmp_path / "pickscore", **given)
    assert values(judge.score(media(pictures()), ["a cat"] * len(pictures()))).isfinite().all()


def test_a_pickle_without_hash_is_refused_with_the_command(tmp_path: Path) -> None:
    _, changed = published("hpsv2", tmp_path)
    changed.pop("sha256")
    judge = judge_of("hpsv2", tmp_path, **changed)
    with pytest.raises(ModelError, match=r"pickle(?s:.*)judges convert NAME HPS_v2_compressed\.pt"):
        judge.score(media(pictures()), PROMPTS)


def test_the_wrong_network_is_refused(tmp_path: Path) -> None:
    """The card's architecture against the folder's config.json: size and activation."""
    published("pickscore", tmp_path)
    judge = judge_of("pickscore", tmp_path, name_or_path=".")
    with pytest.raises(ModelError, match=r"ViT-H-14 has hidden_size 1280 \(vision_config\)"):
        _ = judge.trunk
    openai = "openai/clip-vit-large-patch14"
    with pytest.raises(ModelError, match=f"{openai} was trained with quick_gelu, not gelu"):
        from t2i_align.judges.clip_config import clip_config

        clip_config(tmp_path / "model.safetensors", "ViT-L-14", openai)


# --- published numbers, where their weights and pictures are ------------------------------------

HOME = Path(os.environ.get(VARIABLE, "/nonexistent"))
GOLDEN = HOME / "golden"


def _known() -> list[tuple[str, float, list[Path], list[str]]]:
    """(judge, mean, pictures, prompts) of what lies in $T2I_ALIGN_WEIGHTS/golden.

    ``clipscore`` is the folder ``example`` of CLIPScore's repository, ``hpsv2`` holds
    ``demo_image.jpg`` of HPSv2's.
    """
    found: list[tuple[str, float, list[Path], list[str]]] = []
    for which, mean in (("good", 0.8584), ("bad", 0.7153)):
        file = GOLDEN / "clipscore" / f"{which}_captions.json"
        if file.is_file() and _has("clip_score"):
            texts = json.loads(file.read_text())
            files = [next((file.parent / "images").glob(f"{name}.*")) for name in texts]
            found.append(("clip_score", mean, files, list(texts.values())))
    demo = GOLDEN / "hpsv2" / "demo_image.jpg"
    if demo.is_file() and _has("hpsv2"):
        found.append(("hpsv2", 0.2876, [demo], ["A cat with two horns on its head"]))
    return found


def _has(card: str) -> bool:
    options: Any = judge_of(card, find_root() / "reward_models").options
    try:
        return locate(options, find_root() / "reward_models" / card, card).exists()
    except ModelError:
        return False


KNOWN = _known() if GOLDEN.is_dir() else []
if KNOWN:

    @pytest.mark.parametrize(("card", "mean", "files", "texts"), KNOWN)
    def test_published_numbers(card: str, mean: float, files: list[Path], texts: list[str]) -> None:
        """As the repositories' READMEs and threads print them, with four decimals."""
        found = values(load(card).score([Media("image", f) for f in files], texts))
        assert found.mean().item() == pytest.approx(mean, abs=2e-3)
