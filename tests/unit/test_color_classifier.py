"""GenEval's colour classifier by a tag of weights, ``openai``: offline, with their activation.

The network is a small CLIP of open_clip that is known there under a name of its own; its tag's
weights lie in the hub's cache, as a download would leave them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align.errors import ModelError
from t2i_align.evaluate.detections import RLE, Detection, crop
from t2i_align.evaluate.detectors.colors import ColorClassifier
from t2i_align.evaluate.metrics.geneval import COLORS
from t2i_align.judges.dual_encoder import trained_with_quick_gelu
from tests.tiny_clip import (
    EMBED,
    HEADS,
    LAYERS,
    PATCH,
    SIDE,
    TEXT_HEADS,
    TEXT_WIDTH,
    WIDTH,
    open_clip_model,
)

NAME, HUB = "ViT-tiny-16", "tests/tiny-clip"
VISION = {"image_size": SIDE, "layers": LAYERS, "width": WIDTH, "patch_size": PATCH}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": TEXT_WIDTH, "heads": TEXT_HEADS}
SHAPE: dict[str, Any] = {
    "embed_dim": EMBED,
    "vision_cfg": VISION | {"head_width": WIDTH // HEADS},
    "text_cfg": TEXT | {"layers": LAYERS},
}


@pytest.fixture
def tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name and its quick double, the tags ``openai`` and ``laion``, weights in the cache."""
    from huggingface_hub import constants
    from open_clip import factory, pretrained
    from safetensors.torch import save_file

    snapshot = tmp_path / "hub" / f"models--{HUB.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    state = {k: v.clone() for k, v in open_clip_model(False, seed=3).state_dict().items()}
    save_file(state, snapshot / "open_clip_model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    configs: Any = factory._MODEL_CONFIGS
    monkeypatch.setitem(configs, NAME, SHAPE)
    monkeypatch.setitem(configs, f"{NAME}-quickgelu", SHAPE | {"quick_gelu": True})
    tags = {"openai": {"hf_hub": f"{HUB}/", "quick_gelu": True}, "laion": {"hf_hub": f"{HUB}/"}}
    tags["lost"] = {"hf_hub": "tests/nowhere/"}
    for name in (NAME, f"{NAME}-quickgelu"):
        monkeypatch.setitem(pretrained._PRETRAINED, name, tags)


def objects() -> tuple[Image.Image, list[Detection]]:
    """A picture of noise with twenty-four masked objects."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    found = []
    for k in range(24):
        x, y = int(rng.integers(0, 40)), int(rng.integers(0, 24))
        mask = np.zeros((48, 64), bool)
        mask[y : y + 20, x : x + 16] = rng.random((20, 16)) < 0.8
        name = ("car", "dog", "tv remote")[k % 3]
        found.append(Detection(name, 0.9, (x, y, x + 16, y + 20), RLE.encode(mask)))
    return image, found


def named(image: Image.Image, found: list[Detection], quick: bool) -> list[str]:
    """Colours as the spec says it: three templates a colour, by open_clip's own parts."""
    import open_clip

    model = open_clip_model(quick, seed=3)
    tokenizer: Any = open_clip.get_tokenizer("ViT-B-32")
    transform: Any = open_clip.image_transform(SIDE, is_train=False)
    said: dict[str, list[torch.Tensor]] = {}
    colors = []
    with torch.no_grad():
        for name in {d.cls for d in found}:
            for c in COLORS:
                texts = (f"{c} {name}", f"{c}-colored {name}", f"{c} object")
                rows = model.encode_text(tokenizer([f"a photo of a {t}" for t in texts]))
                mean = torch.stack([row / row.norm() for row in rows]).mean(0)
                said.setdefault(name, []).append(mean / mean.norm())
        for d in found:
            x = model.encode_image(transform(crop(image, d))[None])[0]
            cosines = [float(x @ w / x.norm()) for w in said[d.cls]]
            colors.append(COLORS[int(np.argmax(cosines))])
    return colors


@pytest.mark.usefixtures("tagged")
@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion", False)])
def test_a_tags_weights_get_the_activation_they_were_trained_with(tag: str, quick: bool) -> None:
    """Offline, under the plain name; the other activation would name other colours."""
    image, found = objects()
    classifier = ColorClassifier(NAME, tag, ("#999", True))
    right, wrong = (named(image, found, q) for q in (quick, not quick))
    assert classifier.colors(image, found) == right
    assert right != wrong and len(set(right)) > 1
    identity = classifier.identity()
    assert identity["color_classifier"] == f"open_clip {NAME} {tag}"
    assert identity["color_activation"] == ("quick_gelu" if quick else "gelu")
    double = ColorClassifier(f"{NAME}-quickgelu", "openai", ("#999", True))
    assert (double.colors(image, found) == right) == quick


@pytest.mark.usefixtures("tagged")
def test_weights_that_are_not_there_or_do_not_fit_are_refused() -> None:
    image, found = objects()
    with pytest.raises(ModelError, match=r"(?s)cannot load ViT-tiny-16.*a folder holds"):
        ColorClassifier(NAME, "lost", ("#999", True)).colors(image, found)
    with pytest.raises(ModelError, match=r"(?s)'laion' were not trained with.*'ViT-tiny-16'"):
        ColorClassifier(f"{NAME}-quickgelu", "laion", ("#999", True)).colors(image, found)


def test_the_released_classifier_has_the_quick_gelu() -> None:
    """ViT-L-14 of OpenAI: open_clip's own table says which activation its weights want.

    All it lists can be loaded; a network whose own config has the quick one keeps it.
    """
    from open_clip import list_pretrained

    assert all(trained_with_quick_gelu(n, t) in (True, False) for n, t in list_pretrained())
    assert not trained_with_quick_gelu("roberta-ViT-B-32", "laion2b_s12b_b32k")  # not forced
    assert trained_with_quick_gelu("ViT-L-14", "openai")
    assert trained_with_quick_gelu("ViT-L-14-quickgelu", "openai")
    assert not trained_with_quick_gelu("ViT-L-14", "laion400m_e32")
    assert not trained_with_quick_gelu("ViT-L-14", None)
    assert not trained_with_quick_gelu("ViT-L-14", "/somewhere/weights.pt")
