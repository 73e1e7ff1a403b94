r"""Records of preference, and the layouts objectives ask for.

A record is what one annotation says: of two items which is better (``pair``), of one item whether
it is good (``binary``), of several their order (``ranked``). An objective declares the layout it
needs; the table is

    from \ to    pairs                     winners              items                     groups
    pair        itself                    winner, tie: both    winner +1, loser -1       K = 2
    ranked      best/worst, adjacent, all best                 best +1, worst -1         itself
    binary      impossible                those labelled +1    itself                    impossible

Equal ranks say nothing, so no pair is made of them. Ids of derived records are stable:
``{id}#{item}-{item}``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from t2i_align.contract import Layout, Media
from t2i_align.data.options import Pairing
from t2i_align.errors import DataError

RecordLayout = Literal["pair", "binary", "ranked"]


@dataclass(frozen=True)
class Item:
    """One medium and the prompt it was made for.

    Args:
        media: the medium; a ``Path`` as its data is read when needed.
        prompt: belongs to the item, so captions of a pair may differ.
        label: +1 desirable, -1 undesirable, or None.
        value: a judge's number, or None.
    """

    media: Media
    prompt: str
    label: int | None = None
    value: float | None = None


@dataclass(frozen=True)
class Record:
    """One annotation.

    Args:
        id: stable name; seeds derive from it.
        layout: what the annotation says.
        items: two for a pair (winner first, a tie in file order), one for binary, K for ranked.
        preference: pair: probability that ``items[0]`` is preferred, 1 or 0.5 (a kept tie).
        ranks: ranked: rank of each item, 0 = best.
        weight: weight of the record in the loss.
    """

    id: str
    layout: RecordLayout
    items: tuple[Item, ...]
    preference: float = 1.0
    ranks: tuple[int, ...] | None = None
    weight: float = 1.0


def dense_ranks(keys: Iterable[float]) -> tuple[int, ...]:
    """Ranks of numbers where smaller is better: 0 for the smallest, equal for equal, no gaps."""
    keys = list(keys)
    place = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    return tuple(place[key] for key in keys)


def as_layout(record: Record, layout: Layout, pairing: Pairing = "best_worst") -> list[Record]:
    """The records an objective of ``layout`` gets out of one annotation; may be empty (a tie).

    Raises:
        DataError: the annotation can never give this layout.
    """
    convert = _CONVERT.get((record.layout, layout))
    if convert is None:
        works = [to for kind, to in _CONVERT if kind == record.layout]
        raise DataError(
            f"record '{record.id}' is {record.layout}, but the objective needs {layout}",
            f"{record.layout} records serve {', '.join(works)}: choose an objective of such a "
            "layout, or a source of pairs or rankings",
        )
    return convert(record, pairing)


def _itself(record: Record, pairing: Pairing) -> list[Record]:
    return [record]


def _single(record: Record, index: int, label: int) -> Record:
    item = replace(record.items[index], label=label)
    name = f"{record.id}#{index}"
    return replace(record, id=name, layout="binary", items=(item,), preference=1.0, ranks=None)


def _pair_winners(record: Record, pairing: Pairing) -> list[Record]:
    winners = (0,) if record.preference > 0.5 else (0, 1)
    return [_single(record, index, +1) for index in winners]


def _pair_items(record: Record, pairing: Pairing) -> list[Record]:
    if record.preference == 0.5:
        return []
    return [_single(record, 0, +1), _single(record, 1, -1)]


def _pair_group(record: Record, pairing: Pairing) -> list[Record]:
    ranks = (0, 0) if record.preference == 0.5 else (0, 1)
    return [replace(record, layout="ranked", ranks=ranks, preference=1.0)]


def _ranks(record: Record) -> tuple[int, ...]:
    assert record.ranks is not None and len(record.ranks) == len(record.items)
    return record.ranks


def _ranked_pairs(record: Record, pairing: Pairing) -> list[Record]:
    ranks = _ranks(record)
    order = sorted(range(len(ranks)), key=lambda index: (ranks[index], index))
    choices: dict[Pairing, Iterable[tuple[int, int]]] = {
        "best_worst": [(order[0], order[-1])],
        "adjacent": itertools.pairwise(order),
        "all": itertools.combinations(order, 2),
    }
    return [
        replace(
            record,
            id=f"{record.id}#{better}-{worse}",
            layout="pair",
            items=(record.items[better], record.items[worse]),
            ranks=None,
        )
        for better, worse in choices[pairing]
        if ranks[better] < ranks[worse]
    ]


def _at_rank(record: Record, rank: int, label: int) -> list[Record]:
    return [_single(record, i, label) for i, r in enumerate(_ranks(record)) if r == rank]


def _ranked_winners(record: Record, pairing: Pairing) -> list[Record]:
    ranks = _ranks(record)
    return [] if min(ranks) == max(ranks) else _at_rank(record, min(ranks), +1)


def _ranked_items(record: Record, pairing: Pairing) -> list[Record]:
    best, worst = min(_ranks(record)), max(_ranks(record))
    return [] if best == worst else _at_rank(record, best, +1) + _at_rank(record, worst, -1)


def _binary_winners(record: Record, pairing: Pairing) -> list[Record]:
    return [record] if record.items[0].label == +1 else []


_CONVERT: dict[tuple[RecordLayout, Layout], Callable[[Record, Pairing], list[Record]]] = {
    ("pair", "pairs"): _itself,
    ("pair", "winners"): _pair_winners,
    ("pair", "items"): _pair_items,
    ("pair", "groups"): _pair_group,
    ("ranked", "pairs"): _ranked_pairs,
    ("ranked", "winners"): _ranked_winners,
    ("ranked", "items"): _ranked_items,
    ("ranked", "groups"): _itself,
    ("binary", "winners"): _binary_winners,
    ("binary", "items"): _itself,
}
