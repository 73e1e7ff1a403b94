"""Grounding DINO (Liu et al. 2023, arXiv:2303.05499) by transformers.

All 80 class names are one caption, "person. bicycle. ..."; a query is scored against its tokens:

    (1)  score_c = max over the tokens of class c of sigmoid(logit), class = argmax_c

Deviations from GenEval's detector: another network and weights; no masks, so the colour classifier
sees the background inside the box; (1) names a whole class, where transformers' own post-processing
joins every token above a threshold, possibly of several classes; scores are not on Mask2Former's
scale, so GenEval's thresholds do not carry over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from t2i_align.errors import ModelError
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.detectors.base import CLASSES
from t2i_align.evaluate.detectors.zero_shot import ZeroShot, corners

if TYPE_CHECKING:
    from PIL.Image import Image

CAPTION = "".join(f"{name}. " for name in CLASSES).strip()


def class_tokens(offsets: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Positions of each class's tokens in :data:`CAPTION`.

    Args:
        offsets: first and last + 1 character of every token; equal ones for special tokens.

    Raises:
        ModelError: a class has none, since the caption was cut.
    """
    found, start = [], 0
    for name in CLASSES:
        end = start + len(name)
        found.append([k for k, (a, b) in enumerate(offsets) if a < b and start <= a and b <= end])
        start = end + 2
    if not all(found):
        raise ModelError("the tokenizer cut the 80 class names", "use a model of 256 text tokens")
    return found


class GroundingDino(ZeroShot):
    """Boxes by Grounding DINO; see the module."""

    name: ClassVar[str] = "grounding_dino"
    default: ClassVar[str] = "IDEA-Research/grounding-dino-base"

    def ask(self, images: Sequence[Image]) -> list[list[Detection]]:
        """Every query with its best class."""
        model, processor = self.parts
        text: Any = processor.tokenizer(CAPTION, return_offsets_mapping=True)
        spans = class_tokens([(int(a), int(b)) for a, b in text["offset_mapping"]])
        inputs = processor(images=list(images), text=[CAPTION] * len(images), return_tensors="pt")
        out = model(**inputs.to(self.device))
        by_class = torch.stack([out.logits[..., span].amax(-1) for span in spans], -1)
        logits, classes = by_class.max(-1)  # (1); large sigmoids tie, their logits do not
        scores = logits.sigmoid()
        found = []
        for k, image in enumerate(images):
            scale = (float(image.width), float(image.height))
            rows = zip(scores[k].tolist(), classes[k].tolist(), out.pred_boxes[k], strict=True)
            made = [(s, c, corners(b, scale, image.size)) for s, c, b in rows]
            found.append([Detection(CLASSES[c], s, b) for s, c, b in made if b is not None])
        return found
