"""Questions about a prompt that depend on each other, as DSG and DPG-Bench publish them.

A row of their CSV is a proposition: ``item_id, text, proposition_id, dependency, tuple,
question_natural_language`` (more columns are passed over). ``dependency`` lists the propositions
that must hold for this one to mean anything, ``0`` for none; where a parent fails, so does its
child:

    (1)  plain         s'_q = 0 if any parent p of q has s_p = 0
    (2)  transitive    the same, but with s'_p of the parents that stand earlier in the file
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from t2i_align.errors import DataError

Variant = Literal["official", "fixed"]
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Proposition:
    """One question.

    Args:
        id: within its item.
        question: what is asked.
        meaning: the proposition, ``attribute - color (cube, purple)``.
        dependency: the cell as it stands in the file.
    """

    id: int
    question: str
    meaning: str
    dependency: str

    @property
    def detailed(self) -> str:
        """What stands before the first parenthesis, ``attribute - color``."""
        return self.meaning.split("(")[0].strip()

    @property
    def broad(self) -> str:
        """What of that stands before the first hyphen, ``attribute``."""
        return self.detailed.split("-")[0].strip()


@dataclass(frozen=True)
class GraphItem:
    """A prompt and its questions, in the file's order."""

    id: str
    text: str
    propositions: tuple[Proposition, ...]

    def metadata(self) -> dict[str, Any]:
        """The questions as plain data."""
        return {"propositions": [asdict(p) for p in self.propositions]}


def propositions_of(metadata: Mapping[str, Any]) -> list[Proposition]:
    """What :meth:`GraphItem.metadata` says."""
    return [Proposition(**p) for p in metadata["propositions"]]


def read_graphs(text: str, name: str, *, drop_first: bool = False) -> list[GraphItem]:
    """Items in the order in which they come.

    Args:
        text: a CSV file's content.
        name: of the file, for errors.
        drop_first: pass over the first row, and let rows of an item that stand apart from its
            others replace them, as DPG-Bench's reader does.

    Raises:
        DataError: a column is missing, a number is none, or there is no row.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{name} has no column {', '.join(missing)}", "give the file as published")
    found: dict[str, dict[int, Proposition]] = {}
    texts: dict[str, str] = {}
    before = ""
    for number, row in enumerate(reader):
        proposition = _proposition(row, f"{name}, row {number + 1}")
        item = row["item_id"]
        texts.setdefault(item, row["text"])
        if drop_first and number == 0:
            continue
        if drop_first and item != before:
            found[item] = {}
        found.setdefault(item, {})[proposition.id] = proposition
        before = item
    if not found:
        raise DataError(f"{name} holds no question")
    return [GraphItem(item, texts[item], tuple(q.values())) for item, q in found.items()]


def _proposition(row: Mapping[str, Any], where: str) -> Proposition:
    if any(row[c] is None for c in COLUMNS):
        raise DataError(f"{where} has fewer cells than columns")
    try:
        number = int(row["proposition_id"])
    except ValueError as error:
        raise DataError(f"{where}: proposition_id is {row['proposition_id']!r}") from error
    return Proposition(
        number, row["question_natural_language"], row["tuple"], row["dependency"].strip()
    )


def parents_of(cell: str) -> list[int]:
    """The numbers of a ``dependency`` cell.

    Raises:
        ValueError: a part is no number; ten cells of DSG-1k are like ``5, right``.
    """
    return [int(part.strip()) for part in cell.split(",")]


def readable_parents(cell: str, known: Sequence[int]) -> list[int]:
    """What of a ``dependency`` cell is the number of a known proposition."""
    parts = [part.strip() for part in cell.split(",")]
    numbers = [int(part) for part in parts if re.fullmatch(r"\d+", part)]
    return [n for n in numbers if n in known]


def zeroed(
    raw: Mapping[int, float],
    parents: Mapping[int, Sequence[int]],
    *,
    transitive: bool,
    absent: float | None,
) -> dict[int, float]:
    """Scores after Eq. (1) or (2).

    Args:
        raw: question -> 0 or 1.
        parents: question -> its parents, in the order in which the rule is applied; 0 is none.
        transitive: Eq. (2).
        absent: score of a parent that was never asked; None: such a parent is an error.

    Raises:
        KeyError: a parent was never asked; where an earlier one failed it is not looked at.
    """
    scores = dict(raw)
    read = scores if transitive else raw
    for question, above in parents.items():
        for parent in above:
            if parent == 0:
                continue
            value = read[parent] if absent is None else read.get(parent, absent)
            if value == 0:
                if question in scores:
                    scores[question] = 0.0
                break
    return scores


def is_yes(text: str, variant: Variant) -> bool:
    """Whether an answer counts.

    Official: it is exactly ``yes``. Fixed: its first word is, in any case, so ``Yes, it is.`` too.
    """
    if variant == "official":
        return text == "yes"
    first = re.match(r"\W*(\w+)", text)
    return first is not None and first[1].lower() == "yes"
