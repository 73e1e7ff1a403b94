"""Rules from numbers to preferences: margins, ties, gates, dominance, and what they never do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i_align.data.label import decide, hand_out
from t2i_align.data.label_rules import (
    Pairs,
    RuleOptions,
    all_pairs,
    best_worst,
    binary,
    pareto,
    passing,
    ranked,
    standardised,
)
from t2i_align.errors import DataError, RecipeError, UserError
from t2i_align.explain import validate

EIGHTHS = st.integers(-16, 16).map(lambda k: k / 8)  # exact, so that margins are met exactly
GROUPS = st.lists(st.tuples(EIGHTHS, st.booleans()), max_size=6)
MARGINS = st.integers(0, 8).map(lambda k: k / 8)
YES = np.ones(9, bool)


def array(*values: float) -> np.ndarray:
    return np.array(values, float)


def options(**given: Any) -> RuleOptions:
    return RuleOptions.model_validate({"judges": ["scenes_exact"]} | given)


def test_best_against_worst() -> None:
    """Of 3, 1, 2 the pair is (0, 1); nearer than the margin, or exactly at it, it is a tie."""
    values = array(3, 1, 2)
    assert best_worst(values, YES[:3], 0) == Pairs(((0, 1),))
    assert best_worst(values, YES[:3], 1.5) == Pairs(((0, 1),))
    assert best_worst(values, YES[:3], 2.0) == Pairs((), ((0, 1),))
    assert best_worst(array(1, 1, 1), YES[:3], 0) == Pairs((), ((0, 2),))
    assert best_worst(array(1), YES[:1], 0) == best_worst(array(), YES[:0], 0) == Pairs()


def test_all_pairs_split_at_the_margin() -> None:
    """Of 0, 1, 3 with margin 1: 1 - 0 ties, 3 - 0 and 3 - 1 decide."""
    assert all_pairs(array(0, 1, 3), YES[:3], 1) == Pairs(((2, 0), (2, 1)), ((0, 1),))


def test_a_sample_that_fails_a_gate_never_wins() -> None:
    """It loses to the worst that passes, however high its number; of two that fail nothing."""
    passes = np.array([True, False, True, False])
    values = array(1, 9, 2, 8)
    assert best_worst(values, passes, 0) == Pairs(((2, 3),))
    assert all_pairs(values, passes, 5) == Pairs(((0, 1), (0, 3), (2, 1), (2, 3)), ((0, 2),))
    assert ranked(values, passes, 0) == (1, 2, 0, 2)
    assert binary(values, passes, 0, 1.5) == (-1, -1, 1, -1)
    assert best_worst(values, np.zeros(4, bool), 0) == Pairs()
    two = np.stack([values, values], 1)
    assert pareto(two, passes, 0) == Pairs(((0, 1), (2, 0), (0, 3), (2, 1), (2, 3)))


def test_gates_are_exceeded_not_met() -> None:
    values = np.array([[0.5, 1.0], [0.6, 1.0], [0.6, 2.0]])
    assert passing(values, [0.5, 1.0]).tolist() == [False, False, True]


def test_dominance() -> None:
    """(2, 2) beats (1, 2) and (1, 1); (3, 0) is incomparable; near in all judges is a tie."""
    values = np.array([[2, 2], [1, 2], [1, 1], [3, 0]], float)
    assert pareto(values, YES[:4], 0) == Pairs(((0, 1), (0, 2), (1, 2)))
    assert pareto(values, YES[:4], 1) == Pairs((), ((0, 1), (0, 2), (1, 2)))
    assert pareto(values[:, :1], YES[:4], 0) == all_pairs(values[:, 0], YES[:4], 0)


def test_ranks_are_measured_from_their_best() -> None:
    """With margin 1: 5 and 4 share a rank, 3 does not although it is near 4."""
    assert ranked(array(3, 5, 4, 0), YES[:4], 1) == (1, 0, 0, 2)
    assert ranked(array(3, 5, 4, 3), YES[:4], 0) == (2, 0, 1, 2)


def test_binary_labels_leave_a_band_out() -> None:
    values = array(0.2, 0.4, 0.5, 0.6, 0.8)
    assert binary(values, YES[:5], 0, 0.5) == (-1, -1, 1, 1, 1)
    assert binary(values, YES[:5], 0.25, 0.5) == (-1, None, None, None, 1)


@given(GROUPS, MARGINS)
def test_no_rule_contradicts_itself_or_a_shift(
    group: list[tuple[float, bool]], margin: float
) -> None:
    """Winners pass and lose to nobody they beat, gaps exceed the margin, constants do nothing."""
    values, passes = np.array([v for v, _ in group]), np.array([g for _, g in group], bool)
    columns = np.stack([values, values[::-1]], 1) if len(values) else np.zeros((0, 2))
    rules = ((best_worst, values), (all_pairs, values), (pareto, columns))
    for rule, numbers in rules:
        found = rule(numbers, passes, margin)
        assert found == rule(numbers + 3.0, passes, margin)
        for winner, loser in found.decided:
            gap = np.max(numbers[winner] - numbers[loser])
            assert passes[winner] and (not passes[loser] or gap > margin)
            assert (loser, winner) not in found.decided
        for i, j in found.ties:
            assert i < j and passes[i] and passes[j]
            assert np.max(np.abs(numbers[i] - numbers[j])) <= margin
    ranks = ranked(values, passes, margin)
    assert set(ranks) == set(range(len(set(ranks))))
    for winner, loser in all_pairs(values, passes, margin).decided:
        assert ranks[winner] <= ranks[loser] or not passes[winner]
    for i, rank in enumerate(ranks):
        others = [values[k] for k, r in enumerate(ranks) if r == rank and passes[i]]
        assert max(others, default=0) - min(others, default=0) <= margin


@given(GROUPS, MARGINS)
def test_all_pairs_follow_the_samples(group: tuple[list[float], list[bool]], margin: float) -> None:
    """Samples in another order give the same preferences among the same samples."""
    values, passes = np.array([v for v, _ in group]), np.array([g for _, g in group], bool)
    n = len(values)
    turned = all_pairs(values[::-1].copy(), passes[::-1].copy(), margin)
    back = {(n - 1 - w, n - 1 - x) for w, x in turned.decided}
    assert back == set(all_pairs(values, passes, margin).decided)


def test_several_judges_count_in_standard_deviations() -> None:
    """(0, 2, 4) and (10, 20, 60) have deviations sqrt(8/3) and sqrt(1400/3), means 2 and 30."""
    values = np.array([[0, 10], [2, 20], [4, 60], [np.nan, 7]], float)
    values[3] = np.nan
    found = standardised(values)
    by_hand = [[-2 / (8 / 3) ** 0.5, -20 / (1400 / 3) ** 0.5], [0, -10 / (1400 / 3) ** 0.5]]
    assert found[:2] == pytest.approx(np.array(by_hand))
    assert np.isnan(found[3]).all()
    assert standardised(values[:, :1]) is not None
    assert (standardised(values[:, :1])[:3] == values[:3, :1]).all()
    assert (standardised(np.ones((3, 2))) == 0).all()


def test_decisions_orient_group_and_count() -> None:
    """Groups may be interleaved; a sample without a number is left out, a lone one says nothing."""
    groups = ["g", "h", "g", "g", "h", "s"]
    numbers = {"scenes_exact": array(0.9, 0.5, np.nan, 0.1, 0.5, 1.0)}
    found = decide(groups, numbers, options(ties="keep"))
    assert [(x.id, x.members, x.preference) for x in found.labels] == [
        ("g#0-1", (0, 3), 1.0),
        ("h#0-1", (1, 4), 0.5),
    ]
    assert found.counts == {
        **{"samples": 6, "unscored": 1, "groups": 3, "single": 1},
        **{"labels": 2, "ties": 1, "undecided": 0},
    }
    assert decide(groups, numbers, options()).counts["labels"] == 1


def test_less_is_better_where_the_card_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from t2i_align.judges import base

    card = base.judge_card("scenes_exact")
    lower = card.model_copy(update={"direction": "lower is better"})
    monkeypatch.setattr(base, "judge_card", lambda name: lower)
    numbers = {"scenes_exact": array(0.9, 0.1)}
    (label,) = decide(["g", "g"], numbers, options()).labels
    assert label.members == (1, 0)
    found = decide(["g", "g"], numbers, options(rule="binary", threshold=0.5)).labels
    assert [x.label for x in found] == [-1, 1]
    gated = options(gates={"scenes_exact": 0.05})
    assert decide(["g", "g"], numbers, gated).labels == []
    neither = card.model_copy(update={"direction": "none"})
    monkeypatch.setattr(base, "judge_card", lambda name: neither)
    with pytest.raises(UserError, match="has no better end \\(its card says 'none'\\)"):
        decide(["g", "g"], numbers, options())


def test_gates_use_judges_that_do_not_decide() -> None:
    numbers = {"scenes_exact": array(0.9, 0.5, 0.1), "scenes_clip": array(0.1, 0.8, 0.7)}
    found = decide(["g"] * 3, numbers, options(gates={"scenes_clip": 0.5}))
    assert [x.members for x in found.labels] == [(1, 0)]


def test_media_are_held_until_their_last_use_only() -> None:
    """Interleaved groups: every label gets its members, and the stream is read once."""
    numbers = {"scenes_exact": array(*(k % 7 for k in range(40)))}
    groups = [f"g{k % 3}" for k in range(40)]
    labels = decide(groups, numbers, options(rule="all")).labels
    found = list(hand_out((f"m{k}" for k in range(40)), labels))
    assert [label for label, _ in found] == labels and len(labels) > 200
    assert all(things == tuple(f"m{k}" for k in x.members) for x, things in found)
    with pytest.raises(DataError, match="became fewer"):
        list(hand_out(range(39), labels))


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"judges": []}, "judges"),
        ({"judges": ["scenes_exakt"]}, "did you mean 'scenes_exact'"),
        ({"judges": ["scenes_exact"], "rule": "binary"}, "rule binary needs a threshold"),
        ({"judges": ["scenes_exact"], "threshold": 1.0}, "best_worst takes no threshold"),
        ({"judges": ["scenes_exact"], "rule": "pareto"}, "pareto compares several judges"),
        ({"judges": ["scenes_exact", "scenes_exact"]}, "a judge is named twice"),
        (
            {"judges": ["scenes_exact"], "report_judges": ["scenes_exact"]},
            "scenes_exact: a held-out judge neither decides nor gates",
        ),
        (
            {"judges": ["scenes_exact"], "rule": "ranked", "ties": "keep"},
            "ties: keep goes with best_worst, all, pareto, not ranked",
        ),
        ({"judges": ["scenes_exact"], "margin": -1.0}, "margin"),
        ({"judges": ["scenes_exact"], "gates": {"nobody": 1.0}}, "unknown judge 'nobody'"),
    ],
)
def test_options_that_make_no_sense(given_: dict[str, Any], said: str) -> None:
    found, problems = validate(RuleOptions, given_, (), lambda _: "here")
    assert found is None
    assert said in str(RecipeError(problems))
