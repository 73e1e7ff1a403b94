"""The exact judge on a model's own pictures: smudges of its first steps, and labels by eye.

``pictures``: sheets of 64 px samples. ``early_step_*.png`` come from the first 500 to 1,500
steps of the base's training, before any glyph is readable. ``by_eye.png`` holds 100 samples of the
bundled base on held-out prompts; ``by_eye.json`` their prompts' metadata and whether each is
right by eye, labelled before the judge's verdicts were seen.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from t2i_align.evaluate.metrics.geneval import evaluate
from t2i_align.scenes.detect import Part, detect, detections
from t2i_align.scenes.render import SIDE

PICTURES = Path(__file__).parent / "pictures"


def tiles(name: str) -> list[Image.Image]:
    """The pictures of a sheet, row by row."""
    sheet = Image.open(PICTURES / name).convert("RGB")
    return [
        sheet.crop((x, y, x + SIDE, y + SIDE))
        for y in range(0, sheet.height, SIDE)
        for x in range(0, sheet.width, SIDE)
    ]


def test_smudges_of_early_checkpoints_are_not_accepted() -> None:
    parts: list[Part] = [
        p for step in (500, 1000, 1500) for t in tiles(f"early_step_{step}.png") for p in detect(t)
    ]
    accepted = Counter(p.detection.cls for p in parts if p.accepted)
    assert len(parts) > 150
    assert accepted.total() <= 0.05 * len(parts), accepted
    assert max(accepted.values(), default=0) <= 0.1 * len(parts)


def test_judge_agrees_with_labels_by_eye() -> None:
    rows = json.loads((PICTURES / "by_eye.json").read_text())
    pictures = tiles("by_eye.png")
    assert len(rows) == len(pictures) == 100
    said = [r["right"] for r in rows]
    found = [
        evaluate(detections(image), None, r["metadata"]).correct
        for image, r in zip(pictures, rows, strict=True)
    ]
    assert 20 <= sum(said) <= 80, "labels of one kind prove nothing"
    agreement = sum(a == b for a, b in zip(said, found, strict=True)) / 100
    assert agreement >= 0.9, agreement
    assert {r["metadata"]["tag"] for r in rows} >= {"counting", "colors", "position", "color_attr"}


def test_shuffled_labels_would_not_agree() -> None:
    rows = json.loads((PICTURES / "by_eye.json").read_text())
    found = [
        evaluate(detections(image), None, r["metadata"]).correct
        for image, r in zip(tiles("by_eye.png"), rows, strict=True)
    ]
    said = [r["right"] for r in rows]
    share = sum(a == b for a, b in zip(said[37:] + said[:37], found, strict=True)) / 100
    assert share < 0.8
    assert share == pytest.approx(0.5, abs=0.25)
