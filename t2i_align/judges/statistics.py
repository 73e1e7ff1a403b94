r"""Statistics of a picture's pixels, which see no prompt: watched beside a judge, never a target.

A policy that games its judge often drifts in plain statistics first (gaudy colours, oversharpened
edges). With R, G, B, grey in [0, 255] and population moments,

    colorfulness (1)  sqrt(s_rg^2 + s_yb^2) + 0.3 sqrt(m_rg^2 + m_yb^2),   rg = R - G,
                      yb = (R + G)/2 - B           Hasler and Suesstrunk, SPIE 5007 (2003), M^(3)
    saturation   (2)  mean of (max - min) / max over R, G, B, 0 where max is 0       HSV's S
    sharpness    (3)  variance of grey * [[0,1,0],[1,-4,1],[0,1,0]] inside the border
                      Pech-Pacheco et al., ICPR 2000, "variance of Laplacian"; grey as in Rec. 601
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from t2i_align.contract import Media, MediaError
from t2i_align.judges.base import Scores, rgb, score_each
from t2i_align.options import Options

GREY = np.array([0.299, 0.587, 0.114])


def colorfulness(pixels: np.ndarray) -> float:
    """Eq. (1) of ``(h, w, 3)`` in [0, 255]."""
    r, g, b = np.moveaxis(pixels, -1, 0)
    rg, yb = r - g, (r + g) / 2 - b
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def saturation(pixels: np.ndarray) -> float:
    """Eq. (2) of ``(h, w, 3)`` in [0, 255]; the result is in [0, 1]."""
    high, low = pixels.max(-1), pixels.min(-1)
    return float(((high - low) / np.maximum(high, 1e-12)).mean())


def sharpness(pixels: np.ndarray) -> float:
    """Eq. (3) of ``(h, w, 3)`` in [0, 255].

    Raises:
        MediaError: a side is under 3 pixels, so nothing lies inside the border.
    """
    if min(pixels.shape[:2]) < 3:
        raise MediaError(f"sharpness needs 3 x 3 pixels, got {pixels.shape[1]} x {pixels.shape[0]}")
    grey = pixels @ GREY
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).var())


STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "colorfulness": colorfulness,
    "saturation": saturation,
    "sharpness": sharpness,
}


class StatisticOptions(Options):
    """Which one."""

    statistic: Literal["colorfulness", "saturation", "sharpness"] = Field(
        description="Eq. (1), (2) or (3) of t2i_align/judges/statistics.py"
    )


class ImageStatistic:
    """A number of the pixels alone; prompts are ignored."""

    Options: ClassVar[type[Options]] = StatisticOptions

    def __init__(
        self, folder: Path, options: StatisticOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Nothing to load."""
        self.compute = STATISTICS[options.statistic]

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a picture."""
        return score_each(media, prompts, self._value, lambda values, _: values)

    def _value(self, medium: Media, _prompt: str) -> float:
        return self.compute(np.asarray(rgb(medium), np.float64))
