"""Mask R-CNN (ResNet-50 FPN v2) by torchvision.

Deviations from GenEval's detector: another network and weights; its own preprocessing (shorter side
800, longer at most 1333, no padding colour), NMS at IoU 0.5 inside each class, at most 100 boxes,
masks = probability > 1/2, and boxes that are regressed, not read off the mask. Scores are class
probabilities alone, so they run higher than Mask2Former's and GenEval's thresholds mean less.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from t2i_align.errors import ModelError
from t2i_align.evaluate.detections import RLE, Detection
from t2i_align.evaluate.detectors.base import CLASSES, DetectorOptions, best, pixels_of
from t2i_align.judges.weights import load_strict, load_tensors, locate, sha256_of
from t2i_align.optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

FILENAME = "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"
# COCO's category numbers 1 to 90 leave out ten; the 80 others are the classes in order.
LEFT_OUT = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
NUMBERS = [n for n in range(1, 91) if n not in LEFT_OUT]
NAME_OF = dict(zip(NUMBERS, CLASSES, strict=True))


class Torchvision:
    """Instances by Mask R-CNN; see the module."""

    def __init__(self, options: DetectorOptions, device: str = "cpu") -> None:
        """Load nothing yet."""
        self.options, self.device = options, device

    @cached_property
    def file(self) -> Path:
        """The published file, or one converted to safetensors."""
        return locate(self.options, Path(), "torchvision", self.options.filename or FILENAME)

    @cached_property
    def model(self) -> Any:
        """The network.

        Raises:
            ModelError: the file is none of its weights.
        """
        require("torchvision", "judges", "the detector torchvision")
        from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

        tensors = load_tensors(self.file, self.options.sha256)
        model = maskrcnn_resnet50_fpn_v2(
            weights=None, weights_backbone=None, box_score_thresh=self.options.floor
        )
        load_strict(model, tensors, "Mask R-CNN")
        return model.eval().to(self.device)

    @torch.inference_mode()
    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """Detections of each picture."""
        found: list[list[Detection]] = []
        size = self.options.batch_size
        for start in range(0, len(images), size):
            part = [
                pixels_of(i, self.options.swap_red_blue).to(self.device) / 255
                for i in images[start : start + size]
            ]
            found += [self._read(answer) for answer in self.model(part)]
        return found

    def _read(self, answer: dict[str, torch.Tensor]) -> list[Detection]:
        rows = zip(
            answer["labels"].tolist(),
            answer["scores"].tolist(),
            answer["boxes"].tolist(),
            answer["masks"][:, 0] > 0.5,
            strict=True,
        )
        made = []
        for label, score, box, mask in rows:
            if label not in NAME_OF:
                continue
            x1, y1, x2, y2 = box
            code = RLE.encode(mask.cpu().numpy())
            made.append(Detection(NAME_OF[label], score, (x1, y1, x2, y2), code))
        return best(made, self.options.floor)

    def identity(self) -> dict[str, Any]:
        """Name and weights."""
        if not self.file.is_file():
            raise ModelError(f"{self.file} is no file of weights")
        name = "torchvision maskrcnn_resnet50_fpn_v2"
        name += ", red and blue exchanged" if self.options.swap_red_blue else ""
        return {"detector": name, "detector_sha256": sha256_of(self.file)}
