r"""From judges' numbers of several samples to preferences among them: pure functions.

Let s_i be a sample's number, oriented so that more is better, and g_i whether it passes every gate
(a judge must exceed a value). With a margin m >= 0,

    (1)  i beats j     iff  g_i and not g_j,  or  g_i and g_j and s_i - s_j > m
    (2)  i ties with j iff  g_i and g_j and |s_i - s_j| <= m

so a sample that fails a gate never wins, loses to all that pass, and of two that fail nothing is
said. The rules:

    best_worst   the best against the worst of a group: one pair, or one tie
    all          every pair of a group that (1) decides
    pareto       every pair in which one sample is at least as good for every judge and by more than
                 m better for one; by gates as in (1)
    ranked       ranks: one ends where a sample is more than m below the rank's best; all that fail
                 a gate share the last
    binary       good where s_i >= t + m, else bad where s_i <= t - m or a gate fails, else nothing

One judge's numbers are taken as they are, so margin and threshold are in its unit. Of several
judges every number is standardised over the pictures being labelled,

    (3)  z_ik = (s_ik - mean_k) / std_k        s_i = mean_k z_ik

and margin and threshold are in standard deviations; ``pareto`` compares the z_ik. A sample without
a number of a judge that matters is left out of its group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from t2i_align.options import Options
from t2i_align.registry import nearest

Rule = Literal["best_worst", "all", "pareto", "ranked", "binary"]
PAIR_RULES = ("best_worst", "all", "pareto")


class RuleOptions(Options):
    """Which judges, and what is made of their numbers."""

    judges: list[str] = Field(min_length=1, description="whose numbers decide; see `ls judges`")
    rule: Rule = Field(
        "best_worst", description="best_worst, all or pareto give pairs; ranked lists; binary items"
    )
    margin: float = Field(
        0.0,
        ge=0,
        description="numbers this near tie; in the judge's unit, of several judges in standard "
        "deviations over the pictures being labelled",
    )
    ties: Literal["drop", "keep"] = Field(
        "drop", description="keep: ties are pairs with preference 0.5"
    )
    threshold: float | None = Field(
        None, description="rule binary: good at or above, bad below (in the margin's unit)"
    )
    gates: dict[str, float] = Field(
        default_factory=dict,
        description="judge: value it must exceed, in its unit (stay below, where less is better); "
        "a sample that fails one never wins",
    )
    report_judges: list[str] = Field(
        default_factory=list, description="held out: they score and are reported, never decide"
    )

    @property
    def every(self) -> list[str]:
        """All judges that are asked, each once."""
        return list(dict.fromkeys([*self.judges, *self.gates, *self.report_judges]))

    @field_validator("judges", "gates", "report_judges")
    @classmethod
    def _judges_exist(cls, value: list[str] | dict[str, float]) -> list[str] | dict[str, float]:
        from t2i_align.catalog import find_root

        known = sorted(p.parent.name for p in (find_root() / "reward_models").glob("*/card.yaml"))
        for name in value:
            if name not in known:
                hint = nearest(name, known) or f"known: {', '.join(known)}"
                raise ValueError(f"unknown judge '{name}'; {hint}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RuleOptions:
        if (self.rule == "binary") != (self.threshold is not None):
            need = "needs a threshold" if self.rule == "binary" else "takes no threshold"
            raise ValueError(f"rule {self.rule} {need}")
        if self.rule == "pareto" and len(set(self.judges)) < 2:
            raise ValueError("rule pareto compares several judges; name two or more")
        if len(set(self.judges)) < len(self.judges):
            raise ValueError("a judge is named twice")
        both = sorted({*self.judges, *self.gates} & {*self.report_judges})
        if both:
            raise ValueError(f"{', '.join(both)}: a held-out judge neither decides nor gates")
        if self.ties == "keep" and self.rule not in PAIR_RULES:
            raise ValueError(f"ties: keep goes with {', '.join(PAIR_RULES)}, not {self.rule}")
        return self


class LabelByOptions(RuleOptions):
    """``data.label_by``: the same rules on a source, before training."""

    group_by: Literal["record", "prompt"] = Field(
        "record",
        description="samples compared with each other: those of a record, or all of a prompt",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the judges' weights"
    )


@dataclass(frozen=True)
class Pairs:
    """What a rule says of the samples of a group, by position.

    Args:
        decided: (winner, loser).
        ties: (first, second) in the order of the group.
    """

    decided: tuple[tuple[int, int], ...] = ()
    ties: tuple[tuple[int, int], ...] = ()


def standardised(values: np.ndarray) -> np.ndarray:
    """Eq. (3): columns with mean 0 and deviation 1; a constant column becomes 0, NaN stays NaN.

    Args:
        values: ``(n, K)``; one judge's column is returned as it is.
    """
    if values.shape[1] == 1 or len(values) == 0:
        return values
    known = ~np.isnan(values)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, values, 0.0).sum(0) / count
    centred = values - mean
    std = np.sqrt(np.where(known, centred**2, 0.0).sum(0) / count)
    return centred / np.where(std > 0, std, 1.0)


def passing(values: np.ndarray, gates: Sequence[float]) -> np.ndarray:
    """Which samples exceed every gate, ``(n,)`` bool.

    Args:
        values: ``(n, K)`` oriented numbers of the gates' judges.
        gates: K oriented values.
    """
    return np.asarray((values > np.asarray(gates, dtype=np.float64)).all(1))


def best_worst(values: np.ndarray, passes: np.ndarray, margin: float) -> Pairs:
    """The best against the worst of a group.

    Args:
        values: ``(n,)`` numbers.
        passes: ``(n,)`` bool.
        margin: m of Eq. (1).
    """
    if len(values) < 2:
        return Pairs()
    order = sorted(range(len(values)), key=lambda i: (not passes[i], -values[i], i))
    return _pairs([(order[0], order[-1])], values, passes, margin)


def all_pairs(values: np.ndarray, passes: np.ndarray, margin: float) -> Pairs:
    """Every pair of a group; arguments as :func:`best_worst`."""
    return _pairs(itertools.combinations(range(len(values)), 2), values, passes, margin)


def _pairs(
    candidates: itertools.combinations | list[tuple[int, int]],
    values: np.ndarray,
    passes: np.ndarray,
    margin: float,
) -> Pairs:
    """Eq. (1) and (2) of some pairs."""
    decided, ties = [], []
    for i, j in candidates:
        gap = values[i] - values[j]
        if passes[i] != passes[j]:
            decided.append((i, j) if passes[i] else (j, i))
        elif passes[i] and abs(gap) > margin:
            decided.append((i, j) if gap > 0 else (j, i))
        elif passes[i]:
            ties.append((min(i, j), max(i, j)))
    return Pairs(tuple(decided), tuple(ties))


def pareto(values: np.ndarray, passes: np.ndarray, margin: float) -> Pairs:
    """Every pair in which one sample dominates the other.

    Args:
        values: ``(n, K)`` numbers.
        passes: ``(n,)`` bool.
        margin: m; samples that differ by no more for every judge tie, others that neither
            dominates are incomparable and give nothing.
    """
    decided, ties = [], []
    for i, j in itertools.combinations(range(len(values)), 2):
        gaps = values[i] - values[j]
        if passes[i] != passes[j]:
            decided.append((i, j) if passes[i] else (j, i))
        elif not passes[i]:
            continue
        elif (np.abs(gaps) <= margin).all():
            ties.append((i, j))
        elif (gaps >= 0).all():
            decided.append((i, j))
        elif (gaps <= 0).all():
            decided.append((j, i))
    return Pairs(tuple(decided), tuple(ties))


def ranked(values: np.ndarray, passes: np.ndarray, margin: float) -> tuple[int, ...]:
    """Rank of each sample, 0 = best; arguments as :func:`best_worst`.

    A rank's best sample is its measure, so no two of a rank differ by more than the margin.
    """
    ranks = [0] * len(values)
    order = sorted(range(len(values)), key=lambda i: (not passes[i], -values[i], i))
    rank, leader = -1, 0
    for position, i in enumerate(order):
        same = position > 0 and passes[i] == passes[leader]
        if not (same and (not passes[i] or values[leader] - values[i] <= margin)):
            rank, leader = rank + 1, i
        ranks[i] = rank
    return tuple(ranks)


def binary(
    values: np.ndarray, passes: np.ndarray, margin: float, threshold: float
) -> tuple[int | None, ...]:
    """+1, -1 or None of each sample.

    Args:
        values: ``(n,)`` numbers.
        passes: ``(n,)`` bool.
        margin: half-width of the band without labels.
        threshold: t.
    """

    def label(value: float, passed: bool) -> int | None:
        if not passed:
            return -1
        if value >= threshold + margin:
            return 1
        return -1 if value <= threshold - margin else None

    return tuple(label(v, bool(p)) for v, p in zip(values, passes, strict=True))


PAIRINGS: dict[str, Callable[[np.ndarray, np.ndarray, float], Pairs]] = {
    "best_worst": best_worst,
    "all": all_pairs,
    "pareto": pareto,
}
