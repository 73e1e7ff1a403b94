"""DSG-1k (Cho et al. 2023, arXiv:2310.18235): atomic questions in a dependency graph.

    (1)  s_q = 1 for yes, else 0;  s'_q = 0 if any parent p has s_p = 0, else s_q
    (2)  item = mean of s'_q over the questions that were answered; none answered: 0
    (3)  category = mean over its items;  all = mean over all items (not over categories)

A parent's own answer counts, so failing does not run on to grandchildren. ``variant: official``
keeps what the released loader does (j-min/DSG, dsg/data_utils.py and vqa_utils.py, commit 7330119);
``fixed`` differs in:

    malformed   official: an item with one dependency like ``5, right`` loses its whole graph (8
                items of DSG-1k). fixed: what is readable of the cell
    dangling    a parent that is not in the file (tifa160_134 lacks its question 1). official: it
                counts as failed, as in the published table, where that item has no answers and is
                0. fixed: it is no parent
    answers     official: exactly ``yes``. fixed: the first word, in any case
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from t2i_align.errors import DataError
from t2i_align.evaluate.metrics.question_graph import (
    Proposition,
    Variant,
    is_yes,
    parents_of,
    readable_parents,
    zeroed,
)

# Of what an item's id contains, the first that fits.
CATEGORIES = {
    "tifa": "tifa",
    "stanford": "paragraph",
    "localized": "paragraph",
    "countbench": "count",
    "vrd": "relation",
    "diffusion": "real_user",
    "midjourney": "real_user",
    "posescript": "pose",
    "whoops": "defying",
    "drawtext": "text",
}


def category_of(item_id: str) -> str:
    """Where an item comes from.

    Raises:
        DataError: from none of the ten sources.
    """
    found = next((name for part, name in CATEGORIES.items() if part in item_id), None)
    if found is None:
        raise DataError(f"item '{item_id}' is of no source of DSG-1k: {', '.join(CATEGORIES)}")
    return found


def dependencies(propositions: Sequence[Proposition], variant: Variant) -> dict[int, Sequence[int]]:
    """Parents of each question; empty where the released loader gives up on the item."""
    known = [p.id for p in propositions]
    if variant == "fixed":
        return {p.id: readable_parents(p.dependency, known) for p in propositions}
    try:
        return {p.id: parents_of(p.dependency) for p in propositions}
    except ValueError:
        return {}


def question_scores(
    answers: Mapping[int, str], parents: Mapping[int, Sequence[int]], variant: Variant
) -> tuple[dict[int, float], dict[int, float]]:
    """Eq. (1): of each answered question before and after looking at its parents."""
    raw = {q: float(is_yes(text, variant)) for q, text in answers.items()}
    absent = 0.0 if variant == "official" else 1.0
    return raw, zeroed(raw, parents, transitive=False, absent=absent)


def item_score(scores: Mapping[int, float]) -> float:
    """Eq. (2), in [0, 1]."""
    return sum(scores.values()) / len(scores) if scores else 0.0
