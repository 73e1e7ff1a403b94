r"""How far a model's pictures moved from the base model's in statistics that see no prompt.

Of every picture: colourfulness, saturation, sharpness (equations in judges/statistics.py) and
brightness, the mean of the grey values (Rec. 601) in [0, 1]. With a_i, b_i a statistic of the base
and of the model for the same prompt and noise,

    (1)  difference   = mean_i (b_i - a_i)         with a paired interval over prompts
    (2)  standardised = difference / std_i(a_i)    in spreads of the base
    (3)  distance     = W_1(a, b) = mean_i |a_(i) - b_(i)|     of the two sets, values sorted

Of all pixels, each picture weighing the same: the histogram of grey values (256 levels) and that of
hues (360 degrees, weighed by chroma = max - min of R, G, B, as grey has no hue). Their distances
are what must be moved how far,

    (4)  W_1 = sum_k |F_k - G_k| / 255                       grey, in [0, 1]
    (5)  W_1 = min_c sum_k |F_k - G_k - c|  degrees          hue, on the circle, in [0, 180]

F and G are cumulative histograms; the best c of (5) is the median (Werman, Peleg and Rosenfeld,
1985). A picture turned by h degrees of hue is at min(h, 360 - h), one brighter by l levels at
l / 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2i_align.evaluate.aggregate import paired_difference
from t2i_align.judges.statistics import GREY, colorfulness, saturation, sharpness

Floats = NDArray[np.float64]

NUM_LEVELS, NUM_HUES = 256, 360
STATISTICS = ("colorfulness", "saturation", "sharpness", "brightness")


@dataclass(frozen=True)
class Look:
    """Statistics of a picture.

    Args:
        values: of each of :data:`STATISTICS`, ``(4,)``.
        levels: ``(256,)`` share of pixels of each grey level.
        hues: ``(360,)`` share of the chroma of each degree; zeros for a grey picture.
    """

    values: Floats
    levels: Floats
    hues: Floats


def look(pixels: NDArray[Any]) -> Look:
    """What a picture looks like.

    Args:
        pixels: ``(h, w, 3)`` in [0, 255].

    Raises:
        MediaError: a side is under 3 pixels.
    """
    colors = np.asarray(pixels, np.float64)
    grey = colors @ GREY
    values = [f(colors) for f in (colorfulness, saturation, sharpness)] + [grey.mean() / 255]
    levels = np.bincount(np.rint(grey).astype(int).ravel(), minlength=NUM_LEVELS)
    hue, chroma = hue_and_chroma(colors)
    degrees = np.rint(hue).astype(int) % NUM_HUES
    weights = np.bincount(degrees.ravel(), chroma.ravel(), minlength=NUM_HUES).astype(np.float64)
    return Look(np.array(values), levels / grey.size, weights / (weights.sum() or 1.0))


def hue_and_chroma(colors: Floats) -> tuple[Floats, Floats]:
    """Hue in degrees (red 0, green 120, blue 240; 0 for grey) and chroma, each ``(h, w)``.

    Args:
        colors: ``(h, w, 3)``.
    """
    r, g, b = np.moveaxis(colors, -1, 0)
    high, chroma = colors.max(-1), np.ptp(colors, axis=-1)
    span = np.where(chroma > 0, chroma, 1)
    sector = np.select(
        [high == r, high == g], [(g - b) / span % 6, (b - r) / span + 2], (r - g) / span + 4
    )
    return np.where(chroma > 0, 60 * sector, 0.0), chroma


def level_distance(a: Floats, b: Floats) -> float:
    """Eq. (4) of two histograms ``(256,)`` that each sum to 1."""
    return float(np.abs(np.cumsum(a - b)).sum() / (NUM_LEVELS - 1))


def hue_distance(a: Floats, b: Floats) -> float | None:
    """Eq. (5) of two histograms ``(360,)``, in degrees; None where one has no colour."""
    if not (a.sum() > 0 and b.sum() > 0):
        return None
    apart = np.cumsum(a / a.sum() - b / b.sum())
    return float(np.abs(apart - np.median(apart)).sum() * 360 / NUM_HUES)


def sorted_distance(a: Floats, b: Floats) -> float:
    """Eq. (3) of two rows ``(n,)``."""
    return float(np.abs(np.sort(a) - np.sort(b)).mean())


def drift(
    base: Sequence[Look], model: Sequence[Look], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """A row a statistic, then brightness and hue of the pixels.

    Args:
        base: n pictures of the base model.
        model: the same prompts and noise under the model.
        prompts: of each; the interval draws these.

    Raises:
        ValueError: not equally many, or none.
    """
    if not len(base) == len(model) == len(prompts) or not base:
        raise ValueError(f"{len(base)} and {len(model)} pictures of {len(prompts)} prompts")
    before, after = (np.stack([one.values for one in side]) for side in (base, model))
    rows = [
        {"statistic": name} | _row(before[:, k], after[:, k], prompts)
        for k, name in enumerate(STATISTICS)
    ]
    levels = [np.mean([one.levels for one in side], axis=0) for side in (base, model)]
    hues = [np.mean([one.hues for one in side], axis=0) for side in (base, model)]
    return [
        *rows,
        {"statistic": "brightness of pixels", "distance": level_distance(*levels)},
        {"statistic": "hue of pixels, degrees", "distance": hue_distance(*hues)},
    ]


def _row(before: Floats, after: Floats, prompts: Sequence[str]) -> dict[str, Any]:
    """Eq. (1) to (3); no interval for a single prompt, nothing standardised without a spread."""
    several = len(set(prompts)) > 1
    found = paired_difference(before, after, list(prompts)) if several else None
    difference, spread = float((after - before).mean()), float(before.std())
    return {
        "base": float(before.mean()),
        "model": float(after.mean()),
        "difference": difference,
        "low": None if found is None else found.low,
        "high": None if found is None else found.high,
        "standardised": difference / spread if spread > 0 else None,
        "distance": sorted_distance(before, after),
    }
