"""What a detector saw in one image, in a form that outlives the detector.

A verdict is a function of detections, so a results file that holds them can be judged again: with
another threshold, another rule, or to check a published number. A record therefore keeps the class,
the score, the box, the mask, and any answer a verdict asked for (the colour).

Masks are stored as COCO's uncompressed run-length code: lengths of alternating runs of zeros and
ones, zeros first (a leading 0 when the first pixel is set), walking down the columns. For the 2 x 3
mask

    0 1 1
    0 1 0        columns 00, 11, 10        counts 2, 3, 1

Boxes are ``(x1, y1, x2, y2)`` in pixels, y grows downwards, ``x2`` and ``y2`` lie one past the last
pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from t2i_align.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]

KEYS = ("class", "score", "box", "mask", "color")


@dataclass(frozen=True)
class RLE:
    """A binary mask as column-major run lengths, zeros first.

    Args:
        size: ``(height, width)`` in pixels.
        counts: run lengths; their sum is height * width.
    """

    size: tuple[int, int]
    counts: tuple[int, ...]

    @classmethod
    def encode(cls, mask: NDArray[np.bool_]) -> RLE:
        """The code of a bool mask ``(height, width)``; raises ValueError for anything else."""
        if mask.ndim != 2 or mask.dtype != np.bool_:
            raise ValueError(
                f"a mask is a bool array (height, width), got {mask.dtype} {mask.shape}; "
                "threshold logits first, e.g. logits > 0"
            )
        flat = mask.ravel(order="F")
        changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        bounds = [0, *changes.tolist(), flat.size]
        runs = [end - start for start, end in itertools.pairwise(bounds)] if flat.size else []
        starts_set = [0] if flat.size and flat[0] else []
        return cls((mask.shape[0], mask.shape[1]), (*starts_set, *runs))

    def decode(self) -> NDArray[np.bool_]:
        """The mask, bool ``(height, width)``."""
        values = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(values, self.counts).reshape(self.size, order="F")

    def to_dict(self) -> dict[str, Any]:
        """COCO's JSON form."""
        return {"size": list(self.size), "counts": list(self.counts)}

    @classmethod
    def from_dict(cls, record: Any) -> RLE:
        """Read COCO's JSON form; raises DataError when it is not a valid code."""
        if not isinstance(record, Mapping) or set(record) != {"size", "counts"}:
            raise DataError(f"a mask is {{'size': [h, w], 'counts': [...]}}, got {record!r}")
        size, counts = record["size"], record["counts"]
        if isinstance(counts, str | bytes):
            raise DataError(
                "the mask's counts are COCO's compressed text; only lists of run lengths are read",
                "decode it with pycocotools.mask.decode and encode the array with RLE.encode",
            )
        if not _whole(size) or len(size) != 2 or not _whole(counts):
            raise DataError(f"mask size and counts are lists of whole numbers >= 0, got {record!r}")
        if sum(counts) != size[0] * size[1]:
            raise DataError(
                f"the mask's runs cover {sum(counts)} pixels, its size {size[0]} x {size[1]} "
                f"has {size[0] * size[1]}"
            )
        return cls((size[0], size[1]), tuple(counts))


@dataclass(frozen=True)
class Detection:
    """One object a detector found.

    Args:
        cls: class name.
        score: confidence; benchmarks compare it in float32.
        box: ``(x1, y1, x2, y2)`` in pixels, y grows downwards.
        mask: its pixels at the image's own size, or None.
        color: what the colour classifier answered, or None when it was not asked.
    """

    cls: str
    score: float
    box: Box
    mask: RLE | None = None
    color: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form with the keys of :data:`KEYS`; mask and colour only where known."""
        record: dict[str, Any] = {
            "class": self.cls,
            "score": float(self.score),
            "box": [float(value) for value in self.box],
        }
        if self.mask is not None:
            record["mask"] = self.mask.to_dict()
        if self.color is not None:
            record["color"] = self.color
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Detection:
        """Read the JSON form.

        Raises:
            DataError: a key is missing or unknown, or a value is not of its kind.
        """
        missing = [key for key in KEYS[:3] if key not in record]
        unknown = sorted(set(record) - set(KEYS))
        if missing or unknown:
            raise DataError(
                f"a detection has the keys {', '.join(KEYS)} (the last two may be left out); "
                f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
            )
        name, score, box = record["class"], record["score"], record["box"]
        mask, color = record.get("mask"), record.get("color")
        if not isinstance(name, str) or not (color is None or isinstance(color, str)):
            raise DataError(f"class and color are text, got {name!r} and {color!r}")
        if not _finite([score]):
            raise DataError(f"the score of a detection is a finite number, got {score!r}")
        if not _finite(box) or len(box) != 4:
            raise DataError(f"a box is four finite numbers [x1, y1, x2, y2], got {box!r}")
        x1, y1, x2, y2 = (float(value) for value in box)
        rle = None if mask is None else RLE.from_dict(mask)
        return cls(name, float(score), (x1, y1, x2, y2), rle, color)


def crop(
    image: Image, detection: Detection, bgcolor: str = "#999", crop_to_box: bool = True
) -> Image:
    """The picture of one object that GenEval shows to its colour classifier.

    Everything outside the mask becomes ``bgcolor``, then the box is cut out. Box coordinates are
    rounded half to even; what lies outside the image is black. Source: djghosh13/geneval,
    evaluation/evaluate_images.py, class ImageCrops (its option ``crop``).

    Args:
        image: RGB.
        detection: where the object is; without a mask the background stays.
        bgcolor: colour as Pillow reads it, or ``original`` to keep the background.
        crop_to_box: False keeps the whole frame.

    Raises:
        DataError: the mask is not of the image's size, or the box holds no pixel.
    """
    from PIL import Image as PILImage

    shown = image
    if detection.mask is not None and bgcolor != "original":
        height, width = detection.mask.size
        if (width, height) != image.size:
            raise DataError(
                f"the mask of {detection.cls!r} is {width} x {height} pixels, the image "
                f"{image.width} x {image.height}",
                "store masks at the image's own size",
            )
        ground = PILImage.new("RGB", image.size, bgcolor)
        shown = PILImage.composite(
            image, ground, PILImage.fromarray(detection.mask.decode().astype(np.uint8) * 255)
        )
    if not crop_to_box:
        return shown
    x1, y1, x2, y2 = (round(value) for value in detection.box)
    if x2 <= x1 or y2 <= y1:
        raise DataError(f"the box {list(detection.box)} of {detection.cls!r} holds no pixel")
    return shown.crop((x1, y1, x2, y2))


def _whole(values: Any) -> bool:
    """Whether these are whole numbers >= 0 (True is not 1 here)."""
    return isinstance(values, list | tuple) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )


def _finite(values: Any) -> bool:
    """Whether these are finite numbers."""
    return isinstance(values, list | tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
