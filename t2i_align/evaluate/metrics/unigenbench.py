"""UniGenBench (Wang et al. 2025, arXiv:2510.18701): a judge marks a prompt's test points 0 or 1.

    (1)  dimension = 100 (number of 1s) / (number of marks), over all test points of all pictures
    (2)  overall   = plain mean of the primary dimensions

A test point is ``Attribute - Color``; what stands before its first hyphen is the primary dimension
(10 of them, 27 in all). The released script prints (1) on both levels and no total; (2) is ours.
An answer of the judge that cannot be read:

    official    its picture is left out (the released script warns, or asks the same again)
    fixed       every test point of it counts as 0

Either way the number of unread answers is part of the result.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

from t2i_align.errors import DataError
from t2i_align.registry import nearest

# What each test point is about, in our words.
POINTS = {
    "Style": "the art, photography or design style that is asked for, or that of a named artist",
    "World Knowledge": "known people, buildings, things and terms look as they do in the world",
    "Attribute - Quantity": "as many things as are asked for",
    "Attribute - Expression": "a face shows the emotion that is asked for",
    "Attribute - Material": "a thing is made of what is asked for, and looks like it",
    "Attribute - Size": "how large, tall, long or thick something is",
    "Attribute - Shape": "the shape of something",
    "Attribute - Color": "the colour of something",
    "Action - Hand (Character/Anthropomorphic)": "what hands do; all fingers are there and sound",
    "Action - Full-body (Character/Anthropomorphic)": "what a figure does with its whole body",
    "Action - Animal": "what an animal does",
    "Action - Contact Interaction": "things or figures act on each other by touching",
    "Action - Non-contact Interaction": "figures or things act on each other without touching",
    "Action - State": "a lasting state that something is in",
    "Relationship - Composition": "one thing is made up of others",
    "Relationship - Inclusion": "one thing is inside another, or shown on its surface",
    "Relationship - Similarity": "different things are alike in something",
    "Relationship - Comparison": "two things differ in something as the text says",
    "Compound - Imagination": "something that cannot exist is shown as described",
    "Compound - Feature Matching": "every thing has its own features, not those of another",
    "Grammar - Pronoun Reference": "a pronoun means what it refers to in the text",
    "Grammar - Negation": "what the text denies is not there, or is not so",
    "Grammar - Consistency": "what several things share, all of them have",
    "Entity Layout - Two-Dimensional Space": "where things are in the plane of the picture",
    "Entity Layout - Three-Dimensional Space": "which things are nearer, farther, before or behind",
    "Logical Reasoning": "what follows from the text, though it does not say so, is right",
    "Text Generation": "written words are as asked for, nothing left out or added",
}


@dataclass(frozen=True)
class Marks:
    """Ones and marks counted."""

    ones: int
    count: int

    @property
    def percent(self) -> float:
        """Eq. (1)."""
        return 100 * self.ones / self.count


def primary_of(point: str) -> str:
    """The primary dimension of a test point."""
    return point.split("-", 1)[0].strip()


def meaning_of(point: str) -> str:
    """What a test point is about.

    Raises:
        DataError: it is unknown.
    """
    if point not in POINTS:
        raise DataError(f"unknown test point '{point}'", nearest(point, list(POINTS)))
    return POINTS[point]


def read_marks(text: str, num_points: int) -> list[int] | None:
    """The marks of an answer ``<score>[1, 0, 1]</score>``; None where they cannot be read.

    The last pair of tags counts, so that a judge may repeat the question first.

    Args:
        text: the judge's.
        num_points: how many marks there must be.
    """
    found = re.findall(r"<score>((?:(?!<score>).)*?)</score>", text, re.DOTALL)
    if not found:
        return None
    try:
        marks = ast.literal_eval(found[-1].strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(marks, (list, tuple)) or len(marks) != num_points:
        return None
    plain = [_mark(m) for m in marks]
    return None if None in plain else [m for m in plain if m is not None]


def _mark(value: object) -> int | None:
    """1 or 0; anything else that is a number is no 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    text = str(value).strip()
    return {"1": 1, "1.0": 1, "0": 0, "0.0": 0}.get(text)


def dimensions(
    found: Sequence[tuple[Sequence[str], Sequence[int]]],
) -> tuple[dict[str, Marks], dict[str, Marks]]:
    """Eq. (1) by primary dimension and by test point, in order of first appearance.

    Args:
        found: test points and marks of each picture that was read.
    """
    primary: dict[str, list[int]] = {}
    points: dict[str, list[int]] = {}
    for names, marks in found:
        for name, mark in zip(names, marks, strict=True):
            primary.setdefault(primary_of(name), []).append(mark)
            points.setdefault(name, []).append(mark)
    broad, fine = (
        {n: Marks(sum(v), len(v)) for n, v in table.items()} for table in (primary, points)
    )
    return broad, fine
