"""The JPEG judge against an encoder called by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align.catalog import find_root
from t2i_align.contract import Media
from t2i_align.judges.base import judge_card, load
from t2i_align.judges.jpeg import JpegOptions, JpegSize
from t2i_align.scenes import golden


def judge(direction: str) -> JpegSize:
    options = JpegOptions.model_validate({"direction": direction})
    return JpegSize(Path(), options, torch.device("cpu"), torch.float32)


def pictures() -> list[Media]:
    """Flat, a ramp, noise: 48 x 48 tensors."""
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 1, 48), (3, 48, 48))
    arrays = [np.full((3, 48, 48), 0.5), ramp, rng.random((3, 48, 48))]
    return [Media("image", torch.from_numpy(a.copy()).float()) for a in arrays]


def test_it_is_the_size_of_the_file() -> None:
    """Bytes / 1000 of the rounded picture at quality 95; minus that to reward small files."""
    expected = []
    for medium in pictures():
        pixels = (medium.data.numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=95)
        expected.append(len(stream.getvalue()) / 1000)
    assert expected == sorted(expected) and expected[2] > 2 * expected[0]
    up = judge("incompressible").score(pictures(), [""] * 3).values
    down = judge("compressible").score(pictures(), ["any"] * 3).values
    assert up.tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(down, -up)


def test_what_is_no_picture_is_nan() -> None:
    found = judge("compressible").score([Media("audio", torch.zeros(4)), *pictures()], [""] * 4)
    assert found.reasons[0] == "this judge looks at images, got audio"
    assert found.values.isnan().tolist() == [True, False, False, False]


def test_a_side_no_jpeg_can_have_is_nan() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (70_000, 1)).save(stream, "PNG")
    found = judge("compressible").score([Media("image", stream.getvalue()), *pictures()], [""] * 4)
    assert str(found.reasons[0]).startswith("70000 x 1 pixels as JPEG: ")
    assert found.values.isnan().tolist() == [True, False, False, False]


def test_golden_values() -> None:
    card = judge_card("jpeg")
    known = json.loads((find_root() / "reward_models" / "jpeg" / str(card.golden)).read_text())
    values = [row["value"] for row in golden.compute("jpeg")]
    tolerance = card.details["golden_tolerance"]
    assert values == pytest.approx([row["value"] for row in known], abs=tolerance)
    assert isinstance(load("jpeg"), JpegSize) and card.direction == "higher is better"
