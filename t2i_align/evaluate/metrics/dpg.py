"""DPG-Bench (Hu et al. 2024, arXiv:2403.05135): yes-or-no questions about long prompts.

Four pictures of a prompt (cells c of a 2 x 2 grid), questions q, s_cq = 1 for yes:

    (1)  s'_cq = s_cq, or 0 where a parent of q failed            question_graph.py
    (2)  cell  = mean_q s'_cq      picture = mean_c     score = 100 mean over pictures
    (3)  category = 100 mean over the questions whose tuple has that head

``variant: official`` keeps what the released script does (TencentQQGYLab/ELLA,
dpg_bench/compute_dpg_bench.py, commit 3c228f1); ``fixed`` differs in:

    first row   official: the first question of the file is passed over; where another one depends
                on it the picture is dropped with a message. fixed: it is asked
    zeroing     official: transitive along the file's order (Eq. 2 of question_graph.py), so an
                order matters that means nothing. fixed: by the answers themselves, as DSG does
    categories  official: of the last cell only and before zeroing. fixed: of all cells, after it
    answers     official: exactly ``yes``. fixed: the first word, in any case
    parents     official: a cell that is no list of numbers stops the script. fixed: what is
                readable of it

The released script's multi-process runs can mix up categories; the names here are sorted. Its
judge, mPLUG-large, is not in transformers; numbers by another one do not compare with the paper's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from t2i_align.errors import DataError
from t2i_align.evaluate.metrics.question_graph import (
    Proposition,
    Variant,
    is_yes,
    parents_of,
    readable_parents,
    zeroed,
)

L1 = ("global", "entity", "attribute", "relation", "other")
Answers = Mapping[int, str]


class MissingParent(DataError):
    """A question depends on one that is not in the file; the released script drops the picture."""


@dataclass(frozen=True)
class PictureScore:
    """What a picture is worth.

    Args:
        cells: Eq. (2) of each, in [0, 1].
        questions: what categories are made of, question -> value in [0, 1].
    """

    cells: tuple[float, ...]
    questions: Mapping[int, float]

    @property
    def score(self) -> float:
        """Mean of the cells."""
        return sum(self.cells) / len(self.cells)


def dependencies(propositions: Sequence[Proposition], variant: Variant) -> dict[int, Sequence[int]]:
    """Parents of each question, in the file's order.

    Raises:
        DataError: official, and a cell is no list of numbers.
    """
    known = [p.id for p in propositions]
    if variant == "fixed":
        return {p.id: readable_parents(p.dependency, known) for p in propositions}
    try:
        return {p.id: parents_of(p.dependency) for p in propositions}
    except ValueError as error:
        raise DataError(
            f"a dependency is no list of numbers ({error}); the released script stops at it",
            "use --set variant=fixed",
        ) from error


def picture_score(
    cells: Sequence[Answers], parents: Mapping[int, Sequence[int]], variant: Variant
) -> PictureScore:
    """Eq. (1) and (2) of one picture.

    Args:
        cells: of each cell, question -> answer.
        parents: of every question, see :func:`dependencies`.
        variant: see the module.

    Raises:
        MissingParent: official, and a question depends on one that is not asked.
        DataError: no cell, or one without answers.
    """
    if not cells or not all(cells):
        raise DataError("a picture of DPG-Bench needs answers to its questions")
    raw = [{q: float(is_yes(text, variant)) for q, text in cell.items()} for cell in cells]
    official = variant == "official"
    try:
        after = [zeroed(r, parents, transitive=official, absent=None) for r in raw]  # (1)
    except KeyError as error:
        raise MissingParent(f"a question depends on {error}, which is not asked") from error
    values = tuple(sum(s.values()) / len(s) for s in after)  # (2)
    if official:
        return PictureScore(values, raw[-1])
    return PictureScore(values, {q: sum(s[q] for s in after) / len(after) for q in after[0]})


def categories(
    found: Iterable[tuple[str, float]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Eq. (3) on both levels, sorted by name.

    Args:
        found: ``attribute - color`` and a value in [0, 1], of every question.
    """
    fine: dict[str, list[float]] = defaultdict(list)
    broad: dict[str, list[float]] = defaultdict(list)
    for name, value in found:
        fine[name].append(value)
        broad[name.split("-")[0].strip()].append(value)
    return _percent(broad), _percent(fine)


def _percent(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: 100 * sum(v) / len(v) for name, v in sorted(values.items())}
