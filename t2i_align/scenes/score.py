r"""A graded score of a picture of the world under a prompt, in [0, 1], beside GenEval's yes or no.

    score = max(0, mean over required objects of q  -  0.25 surplus / required) * (1/2 if a relation
    is wrong) q     = graded overlap of the part assigned to the object, halved when its colour is
    wrong

Parts are assigned to required objects greedily, best first. Graded overlaps start where negative
controls end
(detect.py), so a shapeless smudge scores 0. Surplus are accepted parts no object asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t2i_align.evaluate.metrics.geneval import relations
from t2i_align.scenes.detect import Part

SURPLUS = 0.25


def required(metadata: dict[str, Any]) -> list[tuple[str, str | None]]:
    """(class, colour or None) of every object a prompt asks for."""
    return [(c["class"], c.get("color")) for c in metadata["include"] for _ in range(c["count"])]


def quality(part: Part, color: str | None) -> float:
    """How well a part fulfils an object of its own class."""
    return part.graded * (1.0 if color in (None, part.detection.color) else 0.5)


def graded_score(parts: Sequence[Part], metadata: dict[str, Any]) -> float:
    """The score of the module.

    Args:
        parts: of :func:`t2i_align.scenes.detect.detect`.
        metadata: of the prompt, GenEval's shape.
    """
    wanted = required(metadata)
    options = sorted(
        (
            (quality(part, color), i, k)
            for i, (cls, color) in enumerate(wanted)
            for k, part in enumerate(parts)
            if part.detection.cls == cls
        ),
        reverse=True,
    )
    found: dict[int, tuple[int, float]] = {}
    taken: set[int] = set()
    for value, i, k in options:
        if i not in found and k not in taken and value > 0:
            found[i] = (k, value)
            taken.add(k)
    surplus = sum(p.accepted for k, p in enumerate(parts) if k not in taken)
    mean = sum(value for _, value in found.values()) / len(wanted)
    score = max(0.0, mean - SURPLUS * surplus / len(wanted))
    if metadata["tag"] == "position" and len(found) == 2:
        target, subject = (parts[found[i][0]].detection.box for i in (0, 1))
        relation = metadata["include"][1]["position"][0]
        score *= 1.0 if relation in relations(subject, target) else 0.5
    return score
