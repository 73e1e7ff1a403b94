"""OWLv2 (Minderer et al. 2023, arXiv:2306.09683) by transformers.

Each patch is scored against "a photo of a {class}" for all 80 classes and takes the best one:

    (1)  score = max_c sigmoid(logit_c), class = argmax_c

Deviations from GenEval's detector: another network and weights; no masks, so the colour classifier
sees the background inside the box; no suppression of duplicates, which open-vocabulary patches do
produce, beyond GenEval's own ``max_overlap`` (set it below 1); scores are not on Mask2Former's
scale, so GenEval's thresholds do not carry over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.detectors.base import CLASSES
from t2i_align.evaluate.detectors.zero_shot import ZeroShot, corners

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE = "a photo of a {}"


class Owlv2(ZeroShot):
    """Boxes by OWLv2; see the module."""

    name: ClassVar[str] = "owlv2"
    default: ClassVar[str] = "google/owlv2-base-patch16-ensemble"

    def ask(self, images: Sequence[Image]) -> list[list[Detection]]:
        """Every patch with its best class."""
        model, processor = self.parts
        texts = [[TEMPLATE.format(name) for name in CLASSES]] * len(images)
        inputs = processor(text=texts, images=list(images), return_tensors="pt")
        out = model(**inputs.to(self.device))
        logits, classes = out.logits.max(-1)  # (1); large sigmoids tie, their logits do not
        scores = logits.sigmoid()
        found = []
        for k, image in enumerate(images):
            side = float(max(image.size))  # pictures are padded to a square below and on the right
            rows = zip(scores[k].tolist(), classes[k].tolist(), out.pred_boxes[k], strict=True)
            made = [(s, c, corners(b, (side, side), image.size)) for s, c, b in rows]
            found.append([Detection(CLASSES[c], s, b) for s, c, b in made if b is not None])
        return found
