r"""Mask2Former (Cheng et al. 2022, arXiv:2112.01527) by transformers, under mmdetection's rules.

GenEval's detector is mmdetection 2.x with ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco``. Here
the network is transformers' ``Mask2FormerForUniversalSegmentation``; what stands before and after
it follows mmdetection, not transformers' processor (which resizes masks through 384 x 384):

    before   s = min(1333 / longer side, 800 / shorter side); sides become floor(side s + 1/2),
             bilinear without antialiasing, rounded to 8 bits; right and bottom padded with 128 to
             multiples of 32; (x - mean) / std in RGB
    (1)      p_qc = softmax over the classes and "no object" of query q, "no object" dropped
    (2)      the best 100 of queries x classes, so a query may appear with several classes
    (3)      m_q: mask logits, bilinear to the padded input, padding cut off, bilinear to the
             picture; mask = m > 0
    (4)      score = p_qc  mean of sigmoid(m_q) inside the mask  (divisor: area + 1e-6; empty: 0)
    (5)      box = [xmin, ymin, xmax + 1, ymax + 1] of the mask; no NMS

Deviations: the released weights on the hub are the authors' (facebook/mask2former-swin-small-coco-
instance), not mmdetection's; mmdetection resizes with OpenCV's fixed-point bilinear, here it is in
float32, at most one level of 255 apart. Agreement with the released evaluator is not published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.evaluate.detections import RLE, Detection
from t2i_align.evaluate.detectors.base import (
    CLASSES,
    MAX_DETECTIONS,
    DetectorOptions,
    best,
    folder_sha256,
    pixels_of,
    weights_folder,
)

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT = "facebook/mask2former-swin-small-coco-instance"
LONGER, SHORTER, MULTIPLE, PAD = 1333, 800, 32, 128.0
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
BLOCK = 8  # masks enlarged at once
Size = tuple[int, int]


def fitted(height: int, width: int) -> Size:
    """Sides after the resize."""
    s = min(LONGER / max(height, width), SHORTER / min(height, width))
    return int(height * s + 0.5), int(width * s + 0.5)


def prepared(pixels: Tensor) -> tuple[Tensor, Size]:
    """The network's input ``(3, H, W)`` of a picture, and its size without the padding.

    Args:
        pixels: ``(3, h, w)`` in 0 to 255.
    """
    size = fitted(pixels.shape[1], pixels.shape[2])
    resized = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]
    right, below = -size[1] % MULTIPLE, -size[0] % MULTIPLE
    padded = F.pad(resized.round().clamp(0, 255), (0, right, 0, below), value=PAD)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (padded - mean) / std, size


def choose(class_logits: Tensor, top: int = MAX_DETECTIONS) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (1) and (2).

    Args:
        class_logits: ``(Q, C + 1)``, the last column is "no object".
        top: how many.

    Returns:
        Probabilities, queries and classes, ``(n,)`` each, best first.
    """
    p = class_logits.float().softmax(-1)[:, :-1]  # (1)
    values, places = p.flatten().topk(min(top, p.numel()))  # (2)
    return values, places // p.shape[1], places % p.shape[1]


def enlarged(mask_logits: Tensor, padded: Size, resized: Size, original: Size) -> Tensor:
    """Eq. (3) ``(n, *original)`` of mask logits ``(n, h, w)``."""
    m = F.interpolate(mask_logits[None].float(), padded, mode="bilinear", align_corners=False)
    m = m[..., : resized[0], : resized[1]]
    return F.interpolate(m, original, mode="bilinear", align_corners=False)[0]


def mask_scores(m: Tensor) -> tuple[Tensor, Tensor]:
    """Masks ``(n, h, w)`` and the second factor of Eq. (4) ``(n,)``."""
    mask = m > 0
    inside = (m.sigmoid() * mask).flatten(1).sum(1)
    return mask, inside / (mask.flatten(1).sum(1) + 1e-6)  # (4)


def tight_box(mask: Tensor) -> tuple[float, float, float, float]:
    """Eq. (5) of a mask ``(h, w)``; zeros for an empty one."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    x1, x2, y1, y2 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    return (float(x1), float(y1), float(x2), float(y2))


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    sizes: tuple[Size, Size, Size],
    names: Sequence[str] = CLASSES,
    floor: float = 0.0,
) -> list[Detection]:
    """Eq. (1) to (5) of one picture, best first.

    Args:
        class_logits: ``(Q, C + 1)``.
        mask_logits: ``(Q, h, w)``.
        sizes: (height, width) of the padded input, of it without padding, and of the picture.
        names: of the C classes.
        floor: what scores no more is left out.
    """
    values, queries, classes = choose(class_logits)
    possible = values > floor  # the second factor of (4) is at most 1
    values, queries, classes = values[possible], queries[possible], classes[possible]
    found: list[Detection] = []
    wanted = queries.unique()
    for block in wanted.split(BLOCK):
        mask, factor = mask_scores(enlarged(mask_logits[block], *sizes))
        for k, query in enumerate(block.tolist()):
            mine = (queries == query).nonzero()[:, 0].tolist()
            scores = {i: float(values[i] * factor[k]) for i in mine}
            kept = [i for i in mine if scores[i] > floor]
            if not kept:
                continue
            code, box = RLE.encode(mask[k].cpu().numpy()), tight_box(mask[k])
            found += [Detection(names[int(classes[i])], scores[i], box, code) for i in kept]
    return best(found, floor)


class Mask2Former:
    """Instances by Mask2Former; see the module."""

    def __init__(self, options: DetectorOptions, device: str = "cpu") -> None:
        """Load nothing yet."""
        self.options, self.device = options, device

    @cached_property
    def folder(self) -> Path:
        """Config and weights."""
        return weights_folder(self.options, "mask2former", DEFAULT)

    @cached_property
    def model(self) -> Any:
        """The network.

        Raises:
            ModelError: it cannot be loaded, or does not know COCO's 80 classes.
        """
        from transformers import Mask2FormerForUniversalSegmentation as Network

        try:
            model: Any = Network.from_pretrained(self.folder, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ModelError(f"no Mask2Former at {self.folder}: {error}") from error
        labels = model.config.id2label
        named = [labels[k].lower() for k in (0, len(labels) - 1)]
        generic = named[0].startswith("label_")
        if len(labels) != len(CLASSES) or not (generic or named == [CLASSES[0], CLASSES[-1]]):
            raise ModelError(
                f"{self.folder} knows {len(labels)} classes from {named[0]!r} to {named[1]!r}, "
                f"GenEval asks for COCO's {len(CLASSES)}",
                "use an instance-segmentation checkpoint of COCO",
            )
        return model.eval().to(self.device)

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """Detections of each picture; pictures of one padded size go through together."""
        made = [prepared(pixels_of(i, self.options.swap_red_blue)) for i in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for k, (pixels, _) in enumerate(made):
            groups.setdefault(tuple(pixels.shape), []).append(k)
        found: list[list[Detection]] = [[] for _ in images]
        for same in groups.values():
            for start in range(0, len(same), self.options.batch_size):
                part = same[start : start + self.options.batch_size]
                logits, masks = self._run(torch.stack([made[k][0] for k in part]))
                for j, k in enumerate(part):
                    size = (images[k].height, images[k].width)
                    height, width = made[k][0].shape[1:]
                    sizes = ((height, width), made[k][1], size)
                    floor = self.options.floor
                    found[k] = instances(logits[j], masks[j], sizes, floor=floor)
        return found

    @torch.inference_mode()
    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(pixel_values=pixels.to(self.device))
        if not all(map(math.isfinite, out.class_queries_logits.sum((0, 1)).tolist())):
            raise ModelError("the detector's answers are not finite", "try float32 on the CPU")
        return out.class_queries_logits, out.masks_queries_logits

    def identity(self) -> dict[str, Any]:
        """Name and weights."""
        name = "transformers mask2former, mmdetection's rules"
        name += ", red and blue exchanged" if self.options.swap_red_blue else ""
        return {"detector": name, "detector_sha256": folder_sha256(self.folder)}
