r"""From values of single images to a number with an interval.

Images of one prompt resemble each other, so the unit that is drawn again is the prompt: with
clusters g of size n_g and sum s_g, a resample draws as many clusters as there are, with
replacement, and its mean is

    (1)  m* = sum s_g* / sum n_g*

The interval spans the middle ``level`` of many m* (percentile bootstrap; Efron 1979, Field and
Welsh 2007 for clusters). Comparisons are paired: the same prompt and the same noise before and
after, so (1) is applied to the differences. A macro-average over T tasks draws in each task
separately, M* = (1/T) sum_t m*_t, since the number of prompts a task has is fixed by the benchmark.

For right-or-wrong values McNemar's exact test looks only at images that changed: with b broken and
c repaired out of n = b + c, and no true change, c is Binomial(n, 1/2), so

    (2)  p = min(1, 2 P[Binomial(n, 1/2) <= min(b, c)])

All results are functions of the multiset of rows and the seed: rows in another order, or prompts
with other names, give the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Cluster draws held in memory at once, 8 bytes each.
MAX_DRAWS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class WinTieLose:
    """How many items got better, stayed and got worse."""

    win: int
    tie: int
    lose: int

    @property
    def win_rate(self) -> float:
        """Share of wins in [0, 1], a tie counts half."""
        return (self.win + self.tie / 2) / (self.win + self.tie + self.lose)


def bootstrap_mean(
    values: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    num: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean and percentile interval of a cluster bootstrap, Eq. (1).

    Args:
        values: ``(n,)`` numbers or bools, one an image.
        groups: ``(n,)`` prompt id of each, numbers or text; None: every value on its own.
        num: resamples.
        seed: of the resampling.
        level: share of resamples inside the interval, in (0, 1).

    Raises:
        ValueError: values are not finite, lengths differ, or fewer than two groups are left.
    """
    return macro_mean(
        {"": values}, None if groups is None else {"": groups}, num=num, seed=seed, level=level
    )


def paired_difference(
    before: ArrayLike,
    after: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    num: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of ``after - before`` over pairs, with the interval of :func:`bootstrap_mean`.

    Args:
        before: ``(n,)`` values of the images before.
        after: ``(n,)`` values of the same prompts and noise after.
        groups: ``(n,)`` prompt ids, or None.
        num: resamples.
        seed: of the resampling.
        level: share of resamples inside the interval.
    """
    difference = _differences(before, after)
    return bootstrap_mean(difference, groups, num=num, seed=seed, level=level)


def macro_mean(
    values: Mapping[str, ArrayLike],
    groups: Mapping[str, ArrayLike] | None = None,
    *,
    num: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Plain mean of the tasks' means, with a bootstrap that draws inside each task.

    Args:
        values: ``(n_t,)`` values of each task.
        groups: ``(n_t,)`` prompt ids of each task, or None.
        num: resamples.
        seed: of the resampling.
        level: share of resamples inside the interval.

    Raises:
        ValueError: as :func:`bootstrap_mean`, or the tasks of the arguments differ.
    """
    if not 0 < level < 1 or num < 1:
        raise ValueError(f"level lies inside (0, 1) and num is >= 1, got {level} and {num}")
    if not values:
        raise ValueError("no task to average over")
    if groups is not None:
        _same_tasks(values, groups, "values", "groups")
    rng = np.random.default_rng(seed)
    means, resampled = [], np.zeros(num)
    for task in sorted(values):
        sums, sizes = _clusters(values[task], None if groups is None else groups[task])
        means.append(sums.sum() / sizes.sum())
        resampled += _resampled_means(sums, sizes, num, rng) / len(values)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean(means)), float(low), float(high))


def macro_difference(
    before: Mapping[str, ArrayLike],
    after: Mapping[str, ArrayLike],
    groups: Mapping[str, ArrayLike] | None = None,
    *,
    num: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Plain mean over tasks of the paired difference; arguments as :func:`macro_mean`."""
    _same_tasks(before, after, "before", "after")
    difference = {task: _differences(before[task], after[task]) for task in before}
    return macro_mean(difference, groups, num=num, seed=seed, level=level)


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """Two-sided p-value of McNemar's exact test, Eq. (2); 1 when nothing changed.

    Args:
        before: ``(n,)`` verdicts, bool or 0/1.
        after: ``(n,)`` verdicts of the same items.

    Raises:
        ValueError: a value is neither 0 nor 1, or lengths differ.
    """
    difference = _differences(before, after)
    for name, verdicts in (("before", before), ("after", after)):
        values = np.asarray(verdicts, dtype=np.float64)
        if not np.isin(values, (0, 1)).all():
            odd = values[~np.isin(values, (0, 1))][0]
            raise ValueError(
                f"McNemar's test compares verdicts, 0 or 1, but {name} holds {odd:g}; "
                "for graded values use paired_difference"
            )
    broken, repaired = int((difference < 0).sum()), int((difference > 0).sum())
    n, term, tail = broken + repaired, 1, 0
    for k in range(min(broken, repaired) + 1):
        tail += term  # term = n choose k
        term = term * (n - k) // (k + 1)
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def win_tie_lose(before: ArrayLike, after: ArrayLike, band: float = 0.0) -> WinTieLose:
    """Count pairs by the sign of ``after - before``; within ``band`` (inclusive) it is a tie.

    Args:
        before: ``(n,)`` values.
        after: ``(n,)`` values of the same items.
        band: half-width of the tie, >= 0, in the values' unit.
    """
    if not band >= 0:
        raise ValueError(f"band is a width >= 0, got {band}")
    difference = _differences(before, after)
    win, lose = int((difference > band).sum()), int((difference < -band).sum())
    return WinTieLose(win, len(difference) - win - lose, lose)


def _vector(values: ArrayLike) -> Floats:
    """Finite numbers ``(n,)``, n >= 1."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values form one non-empty row, got the shape {array.shape}")
    if not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"value {index} is {array[index]}; leave out what could not be scored")
    return array


def _differences(before: ArrayLike, after: ArrayLike) -> Floats:
    """``after - before``, the lengths checked."""
    first, second = _vector(before), _vector(after)
    if len(first) != len(second):
        raise ValueError(f"pairs need equal lengths: {len(first)} before, {len(second)} after")
    return second - first


def _same_tasks(
    a: Mapping[str, ArrayLike], b: Mapping[str, ArrayLike], name_a: str, name_b: str
) -> None:
    odd = sorted(set(a) ^ set(b))
    if odd:
        raise ValueError(f"{name_a} and {name_b} have different tasks; in one only: {odd}")


def _clusters(values: ArrayLike, groups: ArrayLike | None) -> tuple[Floats, Floats]:
    """Sum and size of each cluster, in an order that depends on nothing but those."""
    array = _vector(values)
    ids = np.arange(len(array)) if groups is None else np.asarray(groups)
    if ids.shape != array.shape:
        raise ValueError(f"one group a value: {array.shape} values, {ids.shape} groups")
    names, inverse = np.unique(ids, return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"an interval needs at least two groups, got {len(names)}: one prompt says nothing "
            "about others"
        )
    order = np.lexsort((array, inverse))  # the same addends in the same order, whatever the rows'
    sums = np.bincount(inverse[order], array[order]).astype(np.float64)
    sizes = np.bincount(inverse).astype(np.float64)
    canonical = np.lexsort((sums, sizes))
    return sums[canonical], sizes[canonical]


def _resampled_means(sums: Floats, sizes: Floats, num: int, rng: np.random.Generator) -> Floats:
    """``num`` values of Eq. (1)."""
    count = len(sums)
    chunk = max(1, MAX_DRAWS // count)
    means = []
    for start in range(0, num, chunk):
        drawn = rng.integers(count, size=(min(chunk, num - start), count))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return np.concatenate(means)
