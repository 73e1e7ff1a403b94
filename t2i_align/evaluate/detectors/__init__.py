"""Detectors by name: ``(their options, device)`` to one list of detections a picture.

None of them is the released evaluator's (mmdetection's Mask2Former); each module says where it
departs, every result names the detector and the hash of its weights, and numbers of two detectors
are never mixed.
"""

from __future__ import annotations

from t2i_align.evaluate.detectors.base import Detector, DetectorOptions
from t2i_align.registry import Table, load

DETECTORS: Table = {
    "grounding_dino": "t2i_align.evaluate.detectors.grounding_dino:GroundingDino",
    "mask2former": "t2i_align.evaluate.detectors.mask2former:Mask2Former",
    "owlv2": "t2i_align.evaluate.detectors.owlv2:Owlv2",
    "scenes": "t2i_align.evaluate.detectors.scenes:ScenesDetector",
    "torchvision": "t2i_align.evaluate.detectors.torchvision:Torchvision",
}


def build(name: str, options: DetectorOptions, device: str = "cpu") -> Detector:
    """A detector by its name; it loads its weights when it is first asked.

    Raises:
        UserError: no such detector.
    """
    return load(DETECTORS, name, "detector")(options, device)
