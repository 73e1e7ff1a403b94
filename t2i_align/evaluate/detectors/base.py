"""What every detector promises, and the classes GenEval asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.evaluate.detections import Detection
from t2i_align.judges.weights import WeightsOptions, combined, locate, sha256_of

if TYPE_CHECKING:
    from PIL.Image import Image

# GenEval's names in COCO's order; a detector's class index is matched by position.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack"),
    *("umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball"),
    *("kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket"),
    *("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair"),
    *("couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop"),
    *("computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven"),
    *("toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
MAX_DETECTIONS = 100  # of one picture


class DetectorOptions(WeightsOptions):
    """Which weights, and what is kept of what they find."""

    floor: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="detections that score no more than this are not stored",
    )
    batch_size: int = Field(default=4, ge=1, description="pictures at once")
    swap_red_blue: bool = Field(
        default=False,
        description="show red and blue exchanged, as reward servers of RL projects do",
    )


class Detector(Protocol):
    """Finds the objects of :data:`CLASSES` in pictures."""

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """Detections of each RGB picture, best first, with masks at its own size where it has."""
        ...

    def identity(self) -> dict[str, Any]:
        """``detector`` (what a result calls it), ``detector_sha256`` (None: no weights)."""
        ...


def weights_folder(options: WeightsOptions, name: str, default: str) -> Path:
    """The folder of a transformers model.

    Args:
        options: where to look.
        name: of the detector.
        default: hub id when the options name nothing.

    Raises:
        ModelError: it is nowhere; says what to bring.
    """
    given = options.name_or_path or default
    return locate(options.model_copy(update={"name_or_path": given}), Path(), name)


def folder_sha256(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's weights and its config."""
    files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHTS or p.name == "config.json")
    return combined(f"{p.name}\0{sha256_of(p)}" for p in files)


def best(found: Sequence[Detection], floor: float) -> list[Detection]:
    """What scores more than ``floor``, best first, at most :data:`MAX_DETECTIONS`."""
    kept = [d for d in found if d.score > floor]
    return sorted(kept, key=lambda d: d.score, reverse=True)[:MAX_DETECTIONS]


def pixels_of(image: Image, swap_red_blue: bool = False) -> Tensor:
    """A picture as float32 ``(3, h, w)`` in 0 to 255, RGB."""
    import numpy as np

    array = np.asarray(image.convert("RGB"), np.float32)
    channels = array[..., ::-1].copy() if swap_red_blue else array.copy()
    return torch.from_numpy(channels).permute(2, 0, 1)


def shown(image: Image, swap_red_blue: bool) -> Image:
    """The picture a detector with its own preprocessing is given."""
    from PIL import Image as PILImage

    if not swap_red_blue:
        return image.convert("RGB")
    red, green, blue = image.convert("RGB").split()
    return PILImage.merge("RGB", (blue, green, red))
