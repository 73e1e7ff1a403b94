"""T2I-CompBench++'s numeracy score: is everything there, and how many times?

With K kinds of things asked for, and n_k of kind k found where c_k are asked for:

    (1)  score = sum_k 1 / (2 K) [n_k > 0] + 1 / (2 K) [n_k = c_k]

Before counting, a box is dropped if it and an earlier kept box of its label overlap in more than
90 % of either (sides count x2 - x1 + 1 pixels; an IoU above 0.9, the script's other condition,
implies that).

``variant: official`` keeps what the released script does: a word that is no label in the picture
takes every label that CONTAINS it ("phone" collects microphones), and "television" is not renamed
to "tv" because the table has it misspelt. ``fixed`` asks :func:`answers_to` instead, and a prompt
without anything to count scores 0 where the script divides by zero (``official`` says so too, in
the verdict's reason; no prompt of the test set is one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from t2i_align.errors import DataError
from t2i_align.evaluate.detections import Box, Detection
from t2i_align.evaluate.metrics.compbench import Variant, answers_to

MAX_COVER = 0.9
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
ARTICLES = ("a", "an")
ALIASES = {
    **{name: "person" for name in ("boy", "girl", "man", "woman")},
    "ship": "boat",
    "telivision": "tv",  # as the script spells it, so it renames nothing
    "goldfish": "fish",
    "painting": "picture",
}
Target = tuple[str, int]


def read_objects(text: str) -> dict[str, str]:
    """Plural to singular of the benchmark's list, lines of "singular - plural".

    Raises:
        DataError: a line is of another form.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        singular, dash, plural = (part.strip() for part in line.partition(" - "))
        if not dash or not singular or not plural:
            raise DataError(f"line {number} of the list of objects is not 'singular - plural'")
        found[plural] = singular
    return found


def targets(prompt: str, plurals: Mapping[str, str]) -> list[Target]:
    """What a prompt asks for: (singular, count) in order.

    A number word or article is followed by a two- or one-word name. "a", "an" and "one" take a
    singular and mean 1; a number word takes a plural and means itself.

    Args:
        prompt: text.
        plurals: plural to singular.
    """
    words = re.findall(r"[\w'-]+", prompt.lower())
    singulars = set(plurals.values())
    found: list[Target] = []
    for k, word in enumerate(words):
        if word not in ARTICLES and word not in NUMBERS:
            continue
        for name in (" ".join(words[k + 1 : k + 3]), " ".join(words[k + 1 : k + 2])):
            if name in singulars and word in (*ARTICLES, "one"):
                found.append((name, 1))
                break
            if name in plurals and word in NUMBERS:
                found.append((plurals[name], NUMBERS.index(word) + 1))
                break
    return found


def without_duplicates(found: Sequence[Detection]) -> list[Detection]:
    """Detections in order, without those that coincide with an earlier one of their label."""
    kept: list[Detection] = []
    for detection in found:
        same = [d for d in kept if d.cls == detection.cls]
        if not any(_cover(detection.box, d.box) > MAX_COVER for d in same):
            kept.append(detection)
    return kept


def _cover(a: Box, b: Box) -> float:
    """The larger share of either box that lies in the other, in inclusive pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    sizes = [(x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (a, b)]
    shared = max(width, 0) * max(height, 0)
    return max(shared / size for size in sizes)


def count(labels: Sequence[str], word: str, variant: Variant) -> int:
    """How many labels mean a word."""
    if variant == "fixed":
        return sum(answers_to(label, word) for label in labels)
    name = ALIASES.get(word, word)
    return labels.count(name) or sum(name in label for label in labels)


def numeracy_score(
    found: Sequence[Detection], wanted: Sequence[Target], variant: Variant = "official"
) -> tuple[float, dict[str, int]]:
    """Eq. (1) and how many of each thing were found.

    Args:
        found: detections in the detector's order.
        wanted: (singular, count); none gives 0.
        variant: see the module.
    """
    labels = [d.cls for d in without_duplicates(found)]
    taken: dict[str, int] = {}
    score = 0.0
    for word, number in wanted:
        there = taken[word] = count(labels, word, variant)
        score += ((there > 0) + (there == number)) / (2 * len(wanted))  # (1)
    return score, taken
