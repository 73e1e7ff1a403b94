"""The world's exact judge as a judge: prompt to metadata by parsing, picture to parts by detecting.

``graded`` is the score of scenes/score.py in [0, 1]; ``verdict`` is GenEval's yes or no, 1 or 0.
Pictures of another size than the world's are resized to 64 x 64 (Lanczos) first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from t2i_align.contract import Media
from t2i_align.evaluate.metrics.geneval import evaluate
from t2i_align.judges.base import Scores, rgb, score_each
from t2i_align.options import Options
from t2i_align.scenes.detect import detect
from t2i_align.scenes.parse import parse
from t2i_align.scenes.render import SIDE
from t2i_align.scenes.score import graded_score

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


class ExactOptions(Options):
    """What comes out."""

    output: Literal["verdict", "graded"] = Field(
        "graded", description="GenEval's yes or no as 1 or 0, or the graded score in [0, 1]"
    )


class ExactJudge:
    """GenEval's verdict or the graded score of a picture of the world."""

    Options: ClassVar[type[Options]] = ExactOptions

    def __init__(
        self, folder: Path, options: ExactOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Nothing to load."""
        self.options = options

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a picture; a prompt outside the grammar is NaN with the reason."""
        return score_each(media, prompts, self._value, lambda values, _: values)

    def _value(self, medium: Media, prompt: str) -> float:
        metadata = parse(prompt)
        parts = detect(_world_size(rgb(medium)))
        if self.options.output == "graded":
            return graded_score(parts, metadata)
        return float(evaluate([p.detection for p in parts], None, metadata).correct)


def _world_size(image: PILImage) -> Any:
    from PIL import Image

    if image.size == (SIDE, SIDE):
        return image
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
