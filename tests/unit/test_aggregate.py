"""Statistics of evaluation: closed forms, coverage, and what must not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from itertools import product
from math import sqrt
from typing import Any

import numpy as np
import pytest

from t2i_align.evaluate import aggregate
from t2i_align.evaluate.aggregate import (
    Interval,
    WinTieLose,
    bootstrap_mean,
    macro_difference,
    macro_mean,
    mcnemar,
    paired_difference,
    win_tie_lose,
)

Z = 1.959964  # 97.5 % quantile of the standard normal


def half_width(interval: Interval) -> float:
    return (interval.high - interval.low) / 2


def test_bernoulli_interval_is_the_normal_one() -> None:
    """m = 0.3, n = 2000: the bootstrap's spread is sqrt(m (1 - m) / n) = 0.010247."""
    values = np.arange(2000) < 600
    found = bootstrap_mean(values, num=8000)
    expected = Z * sqrt(0.3 * 0.7 / 2000)
    assert found.mean == 0.3
    assert found.low == pytest.approx(0.3 - expected, abs=0.06 * expected)
    assert found.high == pytest.approx(0.3 + expected, abs=0.06 * expected)


def test_level_sets_the_width() -> None:
    """Quantiles of the normal: 1.6449 at 90 %, 1.96 at 95 %."""
    values = np.random.default_rng(0).normal(size=1000)
    wide, narrow = (half_width(bootstrap_mean(values, num=8000, level=v)) for v in (0.95, 0.9))
    assert wide / narrow == pytest.approx(Z / 1.644854, rel=0.04)


def test_two_values_are_enumerated() -> None:
    """Of {0, 1} a resample's mean is 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    assert bootstrap_mean([0, 1], level=0.4) == Interval(0.5, 0.5, 0.5)  # middle 40 %
    assert bootstrap_mean([0, 1], level=0.6) == Interval(0.5, 0.0, 1.0)


def test_clusters_of_unequal_size_are_enumerated() -> None:
    """Clusters {1, 1, 1} and {0}: drawn twice (1), once each (3/4), twice the other (0).

    The mean of all values is 3/4, and so is a resample's in half of the cases: clusters weigh by
    their size, Eq. (1).
    """
    found = bootstrap_mean([1, 0, 1, 1], ["a", "b", "a", "a"], level=0.4)
    assert found == Interval(0.75, 0.75, 0.75)
    assert astuple(bootstrap_mean([1, 0, 1, 1], ["a", "b", "a", "a"], level=0.6))[1:] == (0, 1)


def test_copies_of_an_image_add_no_certainty() -> None:
    """Four equal images a prompt: by prompts the interval stays, by images it halves."""
    prompts = np.random.default_rng(1).random(300) < 0.4
    images, groups = np.repeat(prompts, 4), np.repeat(np.arange(300), 4)
    single = bootstrap_mean(prompts, num=4000)
    assert bootstrap_mean(images, groups, num=4000) == single
    assert half_width(bootstrap_mean(images, num=4000)) == pytest.approx(
        half_width(single) / 2, rel=0.08
    )


def test_coverage_with_clusters() -> None:
    """Over 400 experiments a 90 % interval holds the truth in 90 % (sd 1.5 %) of them.

    60 prompts with a right-rate of their own (Beta(1, 1), mean 1/2) and 4 images each. By images,
    as if they were independent, it holds it less often: variance 1/4 /4 + 1/12 * 3/4 against 1/16
    a prompt, sd ratio sqrt(2), so 1.645 / sqrt(2) sigma, 75.5 %.
    """
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(60), 4)
    held = {True: 0, False: 0}
    for experiment in range(400):
        values = rng.random(240) < np.repeat(rng.random(60), 4)
        for clustered in held:
            ids = groups if clustered else None
            found = bootstrap_mean(values, ids, num=400, seed=experiment, level=0.9)
            held[clustered] += found.low <= 0.5 <= found.high
    assert held[True] / 400 == pytest.approx(0.9, abs=0.045)
    assert held[False] / 400 == pytest.approx(0.755, abs=0.065)


def test_pairing_removes_what_both_share() -> None:
    """after = before + 1: the difference has no spread, however much the images differ."""
    before = np.random.default_rng(3).integers(0, 100, 200).astype(float)
    assert paired_difference(before, before + 1) == Interval(1, 1, 1)
    assert half_width(bootstrap_mean(before)) > 1


def test_equal_arrays_differ_by_zero_exactly() -> None:
    values = np.random.default_rng(4).random(50)
    groups = np.arange(50) // 3
    assert paired_difference(values, values, groups) == Interval(0, 0, 0)
    tasks = {"a": values, "b": values[:9]}
    assert macro_difference(tasks, tasks) == Interval(0, 0, 0)
    assert mcnemar(values > 0.5, values > 0.5) == 1
    assert win_tie_lose(values, values) == WinTieLose(0, 50, 0)


def test_swapping_before_and_after_flips_the_sign() -> None:
    rng = np.random.default_rng(5)
    before, after = rng.random(500), rng.random(500)
    forth, back = paired_difference(before, after), paired_difference(after, before)
    assert back.mean == -forth.mean
    assert back.low == pytest.approx(-forth.high, abs=0.15 * half_width(forth))


def shuffled(function: Callable[[Any, Any, Any], Interval]) -> tuple[Interval, Interval]:
    """A function's answer, and the one to shuffled rows of renamed prompts."""
    rng = np.random.default_rng(6)
    before, after, groups = rng.random(90), rng.random(90), rng.integers(0, 20, 90)
    order, names = rng.permutation(90), np.array([f"prompt {i}" for i in rng.permutation(20)])
    moved = function(before[order], after[order], names[groups[order]])
    return function(before, after, groups), moved


@pytest.mark.parametrize(
    "function",
    [
        lambda before, after, groups: bootstrap_mean(after),
        lambda before, after, groups: bootstrap_mean(after, groups),
        paired_difference,
        lambda before, after, groups: macro_difference(
            {"b": before, "a": after}, {"a": before, "b": after}, {"a": groups, "b": groups}
        ),
    ],
    ids=["mean", "cluster mean", "paired", "macro"],
)
def test_order_of_rows_and_names_of_prompts_do_not_matter(function: Any) -> None:
    """Exactly, not only up to resampling."""
    first, second = shuffled(function)
    assert first == second


def test_the_order_of_tasks_does_not_matter_and_the_seed_does() -> None:
    rng = np.random.default_rng(7)
    tasks = {name: rng.random(40) for name in "abc"}
    backwards = dict(reversed(tasks.items()))
    assert macro_mean(tasks) == macro_mean(backwards)
    assert macro_mean(tasks) != macro_mean(tasks, seed=1)


def test_memory_is_bounded_without_changing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(8).random(70)
    whole = bootstrap_mean(values, num=500)
    monkeypatch.setattr(aggregate, "MAX_DRAWS", 1000)
    assert bootstrap_mean(values, num=500) == whole


def test_macro_average_is_the_mean_of_means_with_the_stratified_spread() -> None:
    """Tasks of 1000 at 0.5 and 100 at 0.1: mean 0.3; sd = sqrt(.25/1000 + .09/100) / 2."""
    tasks = {"large": np.arange(1000) < 500, "small": np.arange(100) < 10}
    found = macro_mean(tasks, num=8000)
    assert found.mean == pytest.approx(0.3)
    assert half_width(found) == pytest.approx(Z * sqrt(0.25 / 1000 + 0.09 / 100) / 2, rel=0.05)


def test_macro_difference_pairs_inside_each_task() -> None:
    """Differences 1 and 0 without spread average to 1/2 without spread."""
    before = {"a": np.array([3.0, 8.0]), "b": np.array([1.0, 2.0, 3.0])}
    after = {"a": before["a"] + 1, "b": before["b"]}
    assert macro_difference(before, after) == Interval(0.5, 0.5, 0.5)


def verdicts(broken: int, repaired: int, same: int = 7) -> tuple[np.ndarray, np.ndarray]:
    before = np.array([1] * broken + [0] * repaired + [1] * same)
    after = np.array([0] * broken + [1] * repaired + [1] * same)
    return before, after


@pytest.mark.parametrize(
    ("broken", "repaired", "p"),
    [
        (0, 0, 1.0),  # nothing changed
        (0, 5, 2 / 32),  # 2 C(5,0) / 2^5
        (1, 9, 2 * (1 + 10) / 1024),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (3, 12, 2 * (1 + 15 + 105 + 455) / 32768),
        (4, 4, 1.0),  # 2 P[X <= 4] = 1.27 is cut
        (4, 5, 1.0),  # 2 P[X <= 4] = 1 for odd n
    ],
)
def test_mcnemar_by_hand(broken: int, repaired: int, p: float) -> None:
    before, after = verdicts(broken, repaired)
    assert mcnemar(before, after) == p
    assert mcnemar(after, before) == p
    assert mcnemar(before == 1, after == 1) == p


def test_mcnemar_is_the_share_of_coin_flips_at_least_as_uneven() -> None:
    """All 2^7 ways 7 changed images may fall; 1 against 6 or worse."""
    uneven = sum(abs(2 * sum(flips) - 7) >= 5 for flips in product((0, 1), repeat=7))
    assert mcnemar(*verdicts(1, 6)) == uneven / 2**7


def test_mcnemar_of_many_changes_approaches_the_normal() -> None:
    """n = 4000 with 1900 broken: z = (2000 - 1900 - 1/2) / sqrt(1000) = 3.1465, p = 0.001652."""
    assert mcnemar(*verdicts(1900, 2100)) == pytest.approx(0.001652, rel=0.01)


def test_win_tie_lose_has_an_inclusive_band() -> None:
    before, after = [0, 0, 0, 0, 0], [0.25, 0.5, -0.25, -0.5, 1]
    assert win_tie_lose(before, after) == WinTieLose(3, 0, 2)
    assert win_tie_lose(before, after, band=0.25) == WinTieLose(2, 2, 1)
    assert win_tie_lose(before, after, band=0.25).win_rate == 3 / 5
    assert win_tie_lose(after, before, band=0.25) == WinTieLose(1, 2, 2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: bootstrap_mean([]), "one non-empty row, got the shape (0,)"),
        (lambda: bootstrap_mean([[1, 2]]), "one non-empty row, got the shape (1, 2)"),
        (lambda: bootstrap_mean([1, float("nan")]), "value 1 is nan; leave out what could not be"),
        (lambda: bootstrap_mean([1, 2], ["a", "a"]), "needs at least two groups, got 1"),
        (lambda: bootstrap_mean([1, 2], ["a"]), "one group a value: (2,) values, (1,) groups"),
        (lambda: bootstrap_mean([1, 2], level=95), "level lies inside (0, 1) and num is >= 1"),
        (lambda: paired_difference([1, 2], [1]), "pairs need equal lengths: 2 before, 1 after"),
        (lambda: macro_mean({}), "no task to average over"),
        (lambda: macro_difference({"a": [1]}, {"b": [1]}), "different tasks; in one only: ['a', "),
        (lambda: macro_mean({"a": [1, 2]}, {}), "values and groups have different tasks"),
        (lambda: mcnemar([0, 1], [0.5, 1]), "but after holds 0.5; for graded values use paired"),
        (lambda: win_tie_lose([1], [1], band=-1), "band is a width >= 0, got -1"),
    ],
)
def test_what_cannot_be_averaged_is_named(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert text in str(caught.value)
