"""T2I-CompBench's spatial scores (Huang et al. 2023, arXiv:2307.06350; ++: 2025, IEEE TPAMI).

Two objects are looked for among detections; s1 and s2 are their scores in [0, 1], and the relation
gives r in [0, 1]. With c2 - c1 = (dx, dy) between box centres, y growing downwards, and IoU of the
two boxes without GenEval's extra pixel:

    (1)  near     r = 1 if |dx| < 150 or |dy| < 150, else 150 / max(|dx|, |dy|)
    (2)  beside   left: dx > 0 and |dx| > |dy|;  right, above, below likewise;
                  then r = 1 if IoU < 0.1, else 0.1 / IoU;  otherwise r = 0
    (3)  depth    in front: IoU > 1/2 and depth1 > depth2 (nearer is larger): r = 1;
                  behind, hidden: the same with <;  0 < IoU < 1/2: r = 2 IoU;  otherwise r = 0
    (4)  score    s1 / 4 + s2 / 4 + r / 2;  one object alone s / 4;  none 0
    (5)  in the plane only, a score under 1/2 becomes 0

Boxes and the 150 pixels live in the frame of :func:`frame_of`; the caller brings boxes there.

``variant: official`` keeps what the released scripts do (commit 1b70949); ``fixed`` differs in:

    labels      official, plane: a label must equal the word, so 100 of the 300 test prompts cannot
                score ("table" is no label, "dining table" is); depth: any label that contains the
                word ("car" in "carrot"). fixed: one of the label's names is the word, ends in it,
                or is its synonym (:func:`answers_to`)
    on top of   official: read but never scored, r = 0. fixed: above; "on bottom of" is below
    which       official, plane: the first detection of the label; depth: the pair at hand when both
                were first seen, so one of them may be the last of its kind before that. fixed: the
                best scoring one, and two things of one kind are two detections
    depth map   official: sliced [x1:x2, y1:y2] although rows are y. fixed: [y1:y2, x1:x2]
    half        official: an IoU of exactly 1/2 gives 0, and 2 IoU is given whatever the depths (so
                our reading; no parity case tells). fixed: r = min(2 IoU, 1) where they are in order

The detectors' own scores are part of (4), so numbers of two detectors do not compare.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from t2i_align.evaluate.detections import Box, Detection

Variant = Literal["official", "fixed"]
NEAR_PIXELS = 150
MAX_IOU = 0.1
MIN_DEPTH_IOU = 0.5
SHORT, LONG = 479, 480  # of the detector's frame

# In the order in which they are looked for; the first that the prompt contains is meant.
PLANE = {
    "on side of": "near",
    "next to": "near",
    "near": "near",
    "on the left of": "left",
    "on the right of": "right",
    "on the bottom of": "below",
    "on the top of": "above",
    "on top of": None,
}
FIXED_PLANE: dict[str, str | None] = PLANE | {"on top of": "above", "on bottom of": "below"}
FIXED_PLANE |= {"on the left": "left", "on the right": "right"}
DEPTH = {"in front of": "front", "behind": "behind", "hidden": "behind"}
PEOPLE = {name: "person" for name in ("girl", "boy", "man", "woman")}
SYNONYMS: dict[str, tuple[str, ...]] = {
    **{name: ("person",) for name in ("girl", "boy", "man", "woman", "people")},
    "sofa": ("couch", "loveseat"),
    "couch": ("sofa", "loveseat"),
    "phone": ("telephone",),
    "bag": ("handbag",),
    "painting": ("picture",),
    "ship": ("boat",),
    "goldfish": ("fish",),
    "television": ("tv",),
    "computer": ("laptop",),
}


@dataclass(frozen=True)
class Placed:
    """Two objects and how they stand to each other.

    Args:
        first: detection of the first object, None where it was not found.
        second: of the second.
        relation: r in [0, 1], None where an object is missing.
        score: Eq. (4) and (5).
    """

    first: Detection | None
    second: Detection | None
    relation: float | None
    score: float


def frame_of(width: int, height: int) -> tuple[int, int]:
    """The detector's frame (width, height): shorter side 479, but the longer at most 480."""
    short, long = sorted((width, height))
    small, large = SHORT, int(SHORT * long / short)
    if large > LONG:
        small, large = int(LONG * small / large), LONG
    return (small, large) if width <= height else (large, small)


def rescaled(
    found: Sequence[Detection], size: tuple[int, int], to: tuple[int, int]
) -> list[Detection]:
    """Detections with their boxes brought from a picture of ``size`` into one of another."""
    (w, h), (new_w, new_h) = size, to
    x, y = new_w / w, new_h / h
    return [
        Detection(d.cls, d.score, (d.box[0] * x, d.box[1] * y, d.box[2] * x, d.box[3] * y))
        for d in found
    ]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of continuous boxes; 0 where both are empty."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def find_relation(prompt: str, table: Mapping[str, str | None]) -> str | None:
    """What a prompt asks for: the value of the first key that it contains, else None."""
    return next((kind for phrase, kind in table.items() if phrase in prompt), None)


def plane_relation(prompt: str, variant: Variant) -> str | None:
    """``near, left, right, above, below`` or None."""
    return find_relation(prompt, PLANE if variant == "official" else FIXED_PLANE)


def depth_relation(prompt: str) -> str | None:
    """``front, behind`` or None."""
    return find_relation(prompt, DEPTH)


def in_plane(kind: str | None, a: Box, b: Box) -> float:
    """Relation score r of Eq. (1) and (2) for box ``a`` to box ``b``."""
    dx = (b[0] + b[2]) / 2 - (a[0] + a[2]) / 2
    dy = (b[1] + b[3]) / 2 - (a[1] + a[3]) / 2
    if kind == "near":
        far = max(abs(dx), abs(dy))
        return 1.0 if min(abs(dx), abs(dy)) < NEAR_PIXELS else NEAR_PIXELS / far  # (1)
    flat, steep = abs(dx) > abs(dy), abs(dy) > abs(dx)
    holds = {
        "left": dx > 0 and flat,
        "right": dx < 0 and flat,
        "above": dy > 0 and steep,
        "below": dy < 0 and steep,
    }
    if kind is None or not holds[kind]:
        return 0.0
    shared = iou(a, b)
    return 1.0 if shared < MAX_IOU else MAX_IOU / shared  # (2)


def in_depth(
    kind: str | None,
    boxes: tuple[Box, Box],
    depths: tuple[float, float],
    variant: Variant = "official",
) -> float:
    """Relation score r of Eq. (3).

    Args:
        kind: ``front`` or ``behind``.
        boxes: of both objects.
        depths: mean depth inside each, larger is nearer; NaN where a box holds no pixel.
        variant: see the module.
    """
    if kind is None:
        return 0.0
    shared = iou(*boxes)
    ordered = depths[0] > depths[1] if kind == "front" else depths[0] < depths[1]
    if variant == "fixed":
        return min(shared / MIN_DEPTH_IOU, 1.0) if ordered else 0.0
    if shared > MIN_DEPTH_IOU:
        return float(ordered)
    return shared / MIN_DEPTH_IOU if 0 < shared < MIN_DEPTH_IOU else 0.0


def mean_depth(depth: NDArray[np.floating], box: Box, *, swapped: bool) -> float:
    """Mean of a depth map ``(H, W)`` inside a box, cut to whole pixels; NaN if none is inside.

    Args:
        depth: larger is nearer.
        box: in the map's pixels.
        swapped: slice rows by x and columns by y, as the released script does.
    """
    x1, y1, x2, y2 = (max(int(value), 0) for value in box)
    part = depth[x1:x2, y1:y2] if swapped else depth[y1:y2, x1:x2]
    return float(part.mean(dtype=np.float64)) if part.size else math.nan


def score_of(first: Detection | None, second: Detection | None, relation: float | None) -> float:
    """Eq. (4)."""
    known = [d.score for d in (first, second) if d is not None]
    return sum(score / 4 for score in known) + (relation or 0.0) / 2


def answers_to(label: str, word: str) -> bool:
    """Whether a detector's label means a word, for ``fixed``.

    A label holds names: "cattle, cow", "mouse2, mouse", "_dining table_dining table". One of them
    (with or without digits behind it) must be the word or a synonym, or end in it as a word.
    """
    parts = [part.strip().lower() for part in re.split(r"[,_/]", label)]
    names = {*parts, *(re.sub(r"\d+$", "", part) for part in parts)}
    words = (word.lower(), *SYNONYMS.get(word.lower(), ()))
    return any(n == w or n.endswith(f" {w}") for n in names for w in words)


def _best_two(
    found: Sequence[Detection], words: Sequence[str]
) -> tuple[Detection | None, Detection | None]:
    """``fixed``: the best detection of each word, never the same one twice."""
    ranked = sorted(found, key=lambda d: -d.score)
    first = next((d for d in ranked if answers_to(d.cls, words[0])), None)
    second = next((d for d in ranked if d is not first and answers_to(d.cls, words[1])), None)
    return first, second


def plane_score(
    found: Sequence[Detection], words: Sequence[str], prompt: str, variant: Variant = "official"
) -> Placed:
    """Eq. (4) and (5) of a picture.

    Args:
        found: detections in the detector's order, boxes in its frame.
        words: the two objects; anything but two words scores 0.
        prompt: holds the relation.
        variant: see the module.
    """
    if len(words) != 2:
        return Placed(None, None, None, 0.0)
    if variant == "official":
        names = [PEOPLE.get(w, w) for w in words]
        first, second = (next((d for d in found if d.cls == name), None) for name in names)
    else:
        first, second = _best_two(found, words)
    relation = None
    if first is not None and second is not None:
        relation = in_plane(plane_relation(prompt, variant), first.box, second.box)
    score = score_of(first, second, relation)
    return Placed(first, second, relation, 0.0 if score < 0.5 else score)  # (5)


def _first_pair(
    found: Sequence[Detection], words: Sequence[str]
) -> tuple[Detection | None, Detection | None]:
    """``official`` in depth: run through the labels until both words were contained in one.

    Of an object that is alone the first detection counts; no parity case covers that.
    """
    hits: list[list[Detection]] = [[], []]
    for detection in found:
        for place, word in enumerate(words):
            if PEOPLE.get(word, word) in detection.cls:
                hits[place].append(detection)
        if all(hits):
            return hits[0][-1], hits[1][-1]
    first, second = (h[0] if h else None for h in hits)
    return first, second


def depth_score(
    found: Sequence[Detection],
    depths: Mapping[Box, float],
    words: Sequence[str],
    prompt: str,
    variant: Variant = "official",
) -> Placed:
    """Eq. (4) of a picture whose relation is one of depth.

    Args:
        found: detections in the detector's order.
        depths: mean depth inside each of their boxes, sliced as the variant wants it.
        words: the two objects; anything but two words scores 0.
        prompt: holds the relation.
        variant: see the module.
    """
    if len(words) != 2:
        return Placed(None, None, None, 0.0)
    first, second = (_first_pair if variant == "official" else _best_two)(found, words)
    relation = None
    if first is not None and second is not None:
        boxes = (first.box, second.box)
        pair = (depths[first.box], depths[second.box])
        relation = in_depth(depth_relation(prompt), boxes, pair, variant)
    return Placed(first, second, relation, score_of(first, second, relation))
