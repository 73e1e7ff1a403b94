r"""GenEval as a reward: a detector looks at the picture, the clauses of the prompt are counted.

evaluate/metrics/geneval_rewards.py defines the formulas: ``strict`` is the verdict, ``graded`` the
released reward with its quirks (a wrong relation earns half, a crowd is below 0, ``exclude`` is
ignored), ``fixed`` ours in [0, 1] without them.

Thresholds and boxes are those of evaluate/metrics/geneval.py. The released detector
(mmdetection's Mask2Former) is not part of the suite: ``detector`` names a function that takes an
RGB picture and returns detections with their colours, or ``scenes``, exact on the embedded world.

Metadata come from ``media.meta["metadata"]`` (GenEval's mapping or its JSON text), else the prompt
is read with the world's grammar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from t2i_align.contract import Media, MediaError
from t2i_align.errors import DataError, UserError
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.geneval import DEFAULTS, GenEvalOptions
from t2i_align.evaluate.metrics.geneval_rewards import OUTPUTS
from t2i_align.judges.base import Scores, rgb, score_each
from t2i_align.options import Options
from t2i_align.registry import resolve
from t2i_align.scenes.parse import parse

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Detector = Callable[["PILImage"], Sequence[Detection]]


class GenEvalRewardOptions(Options):
    """Detector, formula, thresholds."""

    detector: str = Field(
        "scenes",
        pattern=r"^(scenes|[\w.]+:\w+)$",
        description="'scenes', or 'module:function' from an RGB picture to detections",
    )
    output: Literal["strict", "graded", "fixed"] = Field(
        "strict", description="the formula, see evaluate/metrics/geneval_rewards.py"
    )
    rules: GenEvalOptions = Field(DEFAULTS, description="GenEval's thresholds")


def scenes_detector(image: PILImage) -> list[Detection]:
    """The embedded world's exact detector; other sizes become 64 x 64 (Lanczos) first."""
    from PIL import Image

    from t2i_align.scenes.detect import detections
    from t2i_align.scenes.render import SIDE

    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return detections(image)


class GenEvalReward:
    """Strict, graded or fixed reward of a picture under GenEval's metadata."""

    Options: ClassVar[type[Options]] = GenEvalRewardOptions

    def __init__(
        self, folder: Path, options: GenEvalRewardOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Find the detector.

        Raises:
            UserError: there is no such function.
        """
        self.options = options
        self.detect, self.compute = find_detector(options.detector), OUTPUTS[options.output]

    @property
    def weights_sha256(self) -> None:
        """The exact detector has no weights; those of another one are its own affair."""
        return None

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a picture; NaN with the reason where metadata or colours are missing."""
        return score_each(media, prompts, self._value, lambda values, _: values)

    def _value(self, medium: Media, prompt: str) -> float:
        try:
            metadata = metadata_of(medium, prompt)
            return self.compute(self.detect(rgb(medium)), metadata, self.options.rules)
        except DataError as error:
            raise MediaError(error.message) from error


def find_detector(name: str) -> Detector:
    """The function behind ``detector``.

    Raises:
        UserError: its module cannot be imported, or has no such function.
    """
    if name == "scenes":
        return scenes_detector
    try:
        return resolve(name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"details.options.detector '{name}' cannot be imported: {error}",
            "name it as module:function; the module must be on Python's path",
        ) from error


def metadata_of(medium: Media, prompt: str) -> Mapping[str, Any]:
    """GenEval's metadata of a sample: given with the medium, else read from the prompt.

    Raises:
        DataError: what is given is no metadata.
        MediaError: none is given and the prompt is outside the world's grammar.
    """
    given = medium.meta.get("metadata")
    if given is None:
        return parse(prompt)
    try:
        metadata = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise DataError(f"the metadata of '{prompt}' are not JSON: {error}") from error
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("tag"), str):
        raise DataError(f"metadata are {{tag, include, exclude}}, got {metadata!r}")
    return metadata
