"""The embedded world's exact detector, colours included; for pictures of the world only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.detectors.base import DetectorOptions, best

if TYPE_CHECKING:
    from PIL.Image import Image


class ScenesDetector:
    """Exact on 64 x 64 pictures of the embedded world."""

    def __init__(self, options: DetectorOptions, device: str = "cpu") -> None:
        """There is nothing to load."""
        self.options = options

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """Every part of each picture."""
        from t2i_align.scenes.detect import detections

        return [best(detections(i.convert("RGB")), self.options.floor) for i in images]

    def identity(self) -> dict[str, Any]:
        """A name; there are no weights."""
        return {"detector": "scenes, exact", "detector_sha256": None}
