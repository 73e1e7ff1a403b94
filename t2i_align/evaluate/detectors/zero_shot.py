"""What detectors that read class names share: model and processor, batches, boxes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.evaluate.detections import Box, Detection
from t2i_align.evaluate.detectors.base import (
    DetectorOptions,
    best,
    folder_sha256,
    shown,
    weights_folder,
)

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE = 1.0  # of a box in pixels; a smaller one holds nothing to look at


class ZeroShot(ABC):
    """Base of a detector whose queries are the class names; it has boxes, but no masks."""

    name: ClassVar[str]
    default: ClassVar[str]

    def __init__(self, options: DetectorOptions, device: str = "cpu") -> None:
        """Load nothing yet."""
        self.options, self.device = options, device

    @cached_property
    def folder(self) -> Path:
        """Config, weights, tokenizer."""
        return weights_folder(self.options, self.name, self.default)

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """Model and processor.

        Raises:
            ModelError: they cannot be loaded.
        """
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        try:
            model: Any = AutoModelForZeroShotObjectDetection.from_pretrained(
                self.folder, dtype=torch.float32
            )
            processor: Any = AutoProcessor.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise ModelError(f"no {self.name} at {self.folder}: {error}") from error
        return model.eval().to(self.device), processor

    @torch.inference_mode()
    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """Detections of each picture."""
        found: list[list[Detection]] = []
        size = self.options.batch_size
        for start in range(0, len(images), size):
            part = [shown(i, self.options.swap_red_blue) for i in images[start : start + size]]
            found += [best(one, self.options.floor) for one in self.ask(part)]
        return found

    @abstractmethod
    def ask(self, images: Sequence[Image]) -> list[list[Detection]]:
        """Every query's best class in each picture of a batch."""

    def identity(self) -> dict[str, Any]:
        """Name and weights."""
        name = f"transformers {self.name}"
        name += ", red and blue exchanged" if self.options.swap_red_blue else ""
        return {"detector": name, "detector_sha256": folder_sha256(self.folder)}


def corners(box: Tensor, scale: tuple[float, float], size: tuple[int, int]) -> Box | None:
    """A box (centre, size; relative) in pixels, cut to the picture; None where nothing is left.

    Args:
        box: ``(4,)``.
        scale: pixels of a relative width and height of 1.
        size: width and height of the picture.
    """
    x, y, w, h = box.tolist()
    x1, x2 = (min(max(v * scale[0], 0.0), size[0]) for v in (x - w / 2, x + w / 2))
    y1, y2 = (min(max(v * scale[1], 0.0), size[1]) for v in (y - h / 2, y + h / 2))
    return (x1, y1, x2, y2) if min(x2 - x1, y2 - y1) >= MIN_SIDE else None
