"""What T2I-CompBench's spatial and counting scores see: detections and depth.

The released scripts run UniDet (722 labels) and DPT-hybrid. UniDet has no implementation in
transformers, so there is no such detector here: its detections can be scored by replaying stored
answers, and these stand in for it, each under its own name in every result:

    owl      OWLv2, asked for the prompt's words (after the scripts' aliases); any word can be
             found, so the ceiling that label equality puts on the official numbers is gone
    detr     any closed-set model that AutoModelForObjectDetection loads, with its own labels
    scenes   the exact judge of the embedded world

Boxes are in the picture's pixels, best score first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from t2i_align.errors import ModelError
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.compbench import frame_of

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


def _load(cls: str, name: str, option: str, device: str) -> tuple[Any, Any]:
    """A model and its processor.

    Raises:
        ModelError: nothing to load there.
    """
    import transformers

    try:
        model = getattr(transformers, cls).from_pretrained(name).to(device).eval()
        kind = "AutoProcessor" if cls == "Owlv2ForObjectDetection" else "AutoImageProcessor"
        return model, getattr(transformers, kind).from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no {cls} at '{name}': {(str(error).splitlines() or ['?'])[0]}",
            f"name a folder with --set {option}=FOLDER; a hub id needs the network once",
        ) from error


def ranked(found: dict[str, Any], labels: Sequence[str]) -> list[Detection]:
    """A model's ``scores``, ``boxes`` and a label each as detections, best first."""
    rows = zip(labels, found["scores"].tolist(), found["boxes"].tolist(), strict=True)
    made = [Detection(label, score, (b[0], b[1], b[2], b[3])) for label, score, b in rows]
    return sorted(made, key=lambda d: -d.score)


class Owl:
    """OWLv2 asked for words."""

    def __init__(self, name: str, threshold: float, device: str) -> None:
        """Load it.

        Raises:
            ModelError: nothing to load there.
        """
        self.model, self.processor = _load("Owlv2ForObjectDetection", name, "detector_path", device)
        self.threshold, self.device = threshold, device

    @torch.inference_mode()
    def __call__(self, image: PILImage, words: Sequence[str]) -> list[Detection]:
        """Detections of some words."""
        asked = list(dict.fromkeys(words))
        if not asked:
            return []
        text = [f"a photo of a {word}" for word in asked]
        inputs = self.processor(text=[text], images=image, return_tensors="pt").to(self.device)
        found = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), self.threshold, [(image.height, image.width)], [asked]
        )[0]
        return ranked(found, found["text_labels"])


class ClosedSet:
    """A detector with labels of its own."""

    def __init__(self, name: str, threshold: float, device: str) -> None:
        """Load it.

        Raises:
            ModelError: nothing to load there.
        """
        self.model, self.processor = _load(
            "AutoModelForObjectDetection", name, "detector_path", device
        )
        self.threshold, self.device = threshold, device

    @torch.inference_mode()
    def __call__(self, image: PILImage, words: Sequence[str]) -> list[Detection]:
        """Everything it finds; the words make no difference."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        found = self.processor.post_process_object_detection(
            self.model(**inputs), self.threshold, [(image.height, image.width)]
        )[0]
        return ranked(found, [self.model.config.id2label[k] for k in found["labels"].tolist()])


class Exact:
    """The exact judge of the embedded world."""

    def __init__(self, name: str, threshold: float, device: str) -> None:
        """Nothing to load."""
        self.threshold = threshold

    def __call__(self, image: PILImage, words: Sequence[str]) -> list[Detection]:
        """Every thing in a picture of the world."""
        from t2i_align.scenes.detect import detect

        found = [part.detection for part in detect(image)]
        kept = [Detection(d.cls, d.score, d.box) for d in found if d.score > self.threshold]
        return sorted(kept, key=lambda d: -d.score)


DETECTORS = {"owl": Owl, "detr": ClosedSet, "scenes": Exact}


class Depth:
    """A depth model of transformers whose numbers grow towards the viewer (DPT, Depth Anything)."""

    def __init__(self, name: str, device: str, side: int | None = 480) -> None:
        """Load it.

        Args:
            name: folder or hub id.
            device: for the model.
            side: pictures are stretched to this square; None: the processor's own way.

        Raises:
            ModelError: nothing to load there.
        """
        self.model, self.processor = _load(
            "AutoModelForDepthEstimation", name, "depth_path", device
        )
        self.device, self.side = device, side

    @torch.inference_mode()
    def __call__(self, image: PILImage) -> NDArray[np.float64]:
        """Depth ``(H, W)`` in the detector's frame, 0 to 1 in 256 steps, 1 nearest."""
        from PIL import Image

        how: dict[str, Any] = {}
        shown = image
        if self.side is not None:
            shown = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
            how = {"do_resize": False}
        inputs = self.processor(images=shown, return_tensors="pt", **how).to(self.device)
        found = self.model(**inputs).predicted_depth[0].float().cpu().numpy()
        return as_frame(found, image.size)


def as_frame(depth: NDArray[np.floating], size: tuple[int, int]) -> NDArray[np.float64]:
    """A raw depth map as the released script reads it back from its PNG.

    From least to greatest it becomes 0 to 255, then the picture's size, then the frame's.

    Args:
        depth: ``(h, w)``.
        size: (width, height) of the picture.
    """
    from PIL import Image

    low, high = float(depth.min()), float(depth.max())
    whole = (depth - low) / (high - low) if high > low else np.zeros_like(depth)
    png = Image.fromarray(np.round(whole * 255).astype(np.uint8))
    png = png.resize(size, Image.Resampling.BILINEAR)
    framed = png.resize(frame_of(*size), Image.Resampling.BILINEAR)
    return np.asarray(framed, dtype=np.float64) / 255
