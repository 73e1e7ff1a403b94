"""Labels from judges: samples -> scores -> preferences.

Two passes over the same stream. The first asks the judges (evaluate/scoring.py) and keeps their
numbers on disk; then a rule (label_rules.py) decides on the numbers alone; the second pass hands
out what was decided, each sample held only until the last preference it is part of. So a source may
be larger than memory where the samples of a group lie near each other.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from t2i_align.data import label_rules as rules
from t2i_align.data.label_rules import RuleOptions
from t2i_align.errors import DataError, UserError

T = TypeVar("T")
SIGNS = {"higher is better": 1.0, "lower is better": -1.0}


@dataclass(frozen=True)
class Label:
    """One preference.

    Args:
        id: stable name, whoever wins.
        kind: what it says.
        members: positions in the stream; pair: winner first, a tie in the order of the stream.
        preference: pair: 1, or 0.5 for a tie.
        ranks: ranked: of each member, 0 = best.
        label: binary: +1 or -1.
    """

    id: str
    kind: Literal["pair", "ranked", "binary"]
    members: tuple[int, ...]
    preference: float = 1.0
    ranks: tuple[int, ...] | None = None
    label: int | None = None


@dataclass(frozen=True)
class Decision:
    """What a rule made of a stream.

    Args:
        labels: in the order in which the last of their members comes.
        values: ``(n,)`` the number of each sample that decided, NaN without one.
        counts: samples, unscored, groups, single, labels, ties, undecided.
    """

    labels: list[Label]
    values: np.ndarray
    counts: dict[str, int]


def signs_of(judges: Sequence[str]) -> dict[str, float]:
    """+1 where more is better, -1 where less is.

    Raises:
        UserError: a judge whose card names no better end.
    """
    from t2i_align.judges.base import judge_card

    found = {}
    for name in judges:
        direction = judge_card(name).direction
        if direction not in SIGNS:
            raise UserError(
                f"judge '{name}' has no better end (its card says '{direction}'), so it cannot "
                "decide",
                "name it as a held-out judge instead",
            )
        found[name] = SIGNS[direction]
    return found


def decide(
    groups: Sequence[str], numbers: Mapping[str, np.ndarray], options: RuleOptions
) -> Decision:
    """Apply a rule to the numbers of a stream.

    Args:
        groups: of each sample; samples of one group need not follow each other.
        numbers: ``(n,)`` of each judge, its own unit and direction, NaN where it failed.
        options: the rule.
    """
    signs = signs_of([*options.judges, *options.gates])
    oriented = {name: sign * numbers[name] for name, sign in signs.items()}
    columns = np.stack([oriented[name] for name in options.judges], 1)
    gates = np.stack([oriented[name] for name in options.gates] or [np.zeros(len(groups))], 1)
    limits = [signs[name] * value for name, value in options.gates.items()] or [-1.0]
    usable = ~(np.isnan(columns).any(1) | np.isnan(gates).any(1))
    columns[~usable] = np.nan
    columns = rules.standardised(columns)
    rule = _Rule(options, columns, rules.passing(gates, limits), signs[options.judges[0]])
    counts = Counter(samples=len(groups), unscored=int((~usable).sum()))
    by_group: dict[str, list[int]] = defaultdict(list)
    for position in np.flatnonzero(usable).tolist():
        by_group[groups[position]].append(position)
    labels = []
    for group, members in by_group.items():
        labels += rule(group, np.array(members), counts)
    labels.sort(key=lambda label: (max(label.members), label.members))
    counts.update(groups=len(by_group), labels=len(labels))
    names = ("samples", "unscored", "groups", "single", "labels", "ties", "undecided")
    return Decision(labels, columns.mean(1), {name: counts[name] for name in names})


@dataclass(frozen=True)
class _Rule:
    """A rule on the groups of one stream.

    Args:
        options: which.
        columns: ``(n, K)`` oriented numbers.
        passes: ``(n,)`` bool.
        sign: of the first judge, for a threshold in its unit.
    """

    options: RuleOptions
    columns: np.ndarray
    passes: np.ndarray
    sign: float

    def __call__(self, group: str, members: np.ndarray, counts: Counter[str]) -> list[Label]:
        """Labels of the samples at some positions."""
        options = self.options
        values, passes = self.columns[members], self.passes[members]
        if options.rule == "binary":
            return self._binary(group, members, counts)
        if len(members) < 2:
            counts["single"] += 1
            return []
        if options.rule == "ranked":
            ranks = rules.ranked(values.mean(1), passes, options.margin)
            if max(ranks) == 0:
                counts["ties"] += 1
                return []
            return [Label(group, "ranked", tuple(members.tolist()), ranks=ranks)]
        numbers = values if options.rule == "pareto" else values.mean(1)
        found = rules.PAIRINGS[options.rule](numbers, passes, options.margin)
        counts["ties"] += len(found.ties)
        kept = found.ties if options.ties == "keep" else ()
        return [
            Label(_pair_id(group, i, j), "pair", (int(members[i]), int(members[j])), preference)
            for pairs, preference in ((found.decided, 1.0), (kept, 0.5))
            for i, j in pairs
        ]

    def _binary(self, group: str, members: np.ndarray, counts: Counter[str]) -> list[Label]:
        options = self.options
        assert options.threshold is not None
        threshold = options.threshold * (self.sign if len(options.judges) == 1 else 1.0)
        values = self.columns[members].mean(1)
        found = rules.binary(values, self.passes[members], options.margin, threshold)
        counts["undecided"] += sum(label is None for label in found)
        return [
            Label(f"{group}#{k}", "binary", (int(position),), label=label)
            for k, (position, label) in enumerate(zip(members, found, strict=True))
            if label is not None
        ]


def something(decision: Decision, options: RuleOptions) -> None:
    """Refuse an empty result.

    Raises:
        DataError: no label; says where the samples went.
    """
    if decision.labels:
        return
    known = [f"{v} {k}" for k, v in decision.counts.items() if v]
    raise DataError(
        f"rule {options.rule} of {', '.join(options.judges)} gave no label: {', '.join(known)}",
        "unscored: see the judges' reasons with `t2i-align score`; single: give several samples "
        "a prompt; ties or undecided: a smaller margin, or another threshold or gate",
    )


def _pair_id(group: str, i: int, j: int) -> str:
    return f"{group}#{min(i, j)}-{max(i, j)}"


def hand_out(things: Iterable[T], labels: Sequence[Label]) -> Iterator[tuple[Label, tuple[T, ...]]]:
    """Every label with its members, as soon as the last of them has come.

    Args:
        things: the stream the labels' positions count.
        labels: in the order of :class:`Decision`.

    Raises:
        DataError: the stream ended before the last member.
    """
    uses = Counter(position for label in labels for position in label.members)
    held: dict[int, T] = {}
    waiting = iter(labels)
    label = next(waiting, None)
    for position, thing in enumerate(things):
        if position in uses:
            held[position] = thing
        while label is not None and max(label.members) == position:
            yield label, tuple(held[k] for k in label.members)
            for k in label.members:
                uses[k] -= 1
                if not uses[k]:
                    del held[k]
            label = next(waiting, None)
    if label is not None:
        raise DataError("the samples became fewer between two passes", "run again")


def group_name(prompt: str | None) -> str:
    """A short name of all samples of a prompt."""
    return hashlib.sha256((prompt or "").encode()).hexdigest()[:16]
