"""Reference values of the judges of the world, on renders anyone can draw again.

    python -m t2i_align.scenes.golden scenes_clip     writes reward_models/scenes_clip/golden.json

A case is (prompt drawn, seed, prompt asked): the render is a function of the first two, the judge
answers the third. A test recomputes every value.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

from t2i_align.catalog import find_root
from t2i_align.contract import Media
from t2i_align.judges.base import load
from t2i_align.scenes.grammar import scene_for
from t2i_align.scenes.parse import parse
from t2i_align.scenes.render import render

# prompt drawn, prompt asked; the second one differs in one fact
CASES = (
    ("a photo of an umbrella", "a photo of a bowl"),
    ("a photo of a red car and a green bed", "a photo of a green car and a red bed"),
    ("a photo of three birds", "a photo of two birds"),
    ("a photo of a purple tie", "a photo of a yellow tie"),
    ("a photo of a bed left of a car", "a photo of a bed right of a car"),
    ("a photo of an elephant and a bottle", "a photo of an elephant and an airplane"),
)


def drawn(prompt: str, seed: int) -> Media:
    """The render of a prompt and seed, ``(3, 64, 64)`` in [0, 1]."""
    rng = np.random.default_rng(seed)
    pixels = render(scene_for(parse(prompt), rng), rng)
    return Media("image", torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


def compute(name: str) -> list[dict[str, Any]]:
    """Values of a judge on every case, asked its own prompt and the other one."""
    rows = [
        {"drawn": own, "seed": seed, "asked": asked}
        for seed, (own, other) in enumerate(CASES)
        for asked in (own, other)
    ]
    media = [drawn(row["drawn"], row["seed"]) for row in rows]
    found = load(name).score(media, [row["asked"] for row in rows])
    return [row | {"value": round(float(v), 6)} for row, v in zip(rows, found.values, strict=True)]


def write(name: str) -> None:
    """Write the file beside the card."""
    lines = ",\n ".join(json.dumps(row) for row in compute(name))
    path = find_root() / "reward_models" / name / "golden.json"
    path.write_text(f"[{lines}]\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m t2i_align.scenes.golden JUDGE...")
    for argument in sys.argv[1:]:
        write(argument)
