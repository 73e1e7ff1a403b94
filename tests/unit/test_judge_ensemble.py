"""Ensembles: the rules by hand, gates, failures by name, and the held-out judge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align.catalog import find_root
from t2i_align.contract import Media
from t2i_align.errors import UserError
from t2i_align.judges import ensemble_rules as rules
from t2i_align.judges import facts
from t2i_align.judges.base import Scores, judge_card, load
from t2i_align.judges.ensemble import Ensemble, EnsembleOptions
from t2i_align.scenes import golden

NAN = math.nan
TWO = [
    {"judge": "scenes_exact", "weight": 3.0, "mean": 0.5, "std": 0.25},
    {"judge": "saturation", "mean": 0.1, "std": 0.05, "direction": -1},
]


def ensemble(**options: Any) -> Ensemble:
    given = {"members": TWO, "held_out": ["sharpness"]} | options
    made = EnsembleOptions.model_validate(given)
    return Ensemble(Path(), made, torch.device("cpu"), torch.float32)


def columns(**values: list[float]) -> dict[str, Scores]:
    return {
        name: Scores(torch.tensor(row), tuple("broken" if v != v else None for v in row))
        for name, row in values.items()
    }


def combine(judge: Ensemble, exact: list[float], saturation: list[float], groups: str) -> Tensor:
    return judge.combine(columns(scenes_exact=exact, saturation=saturation), list(groups)).values


# --- the rules ---------------------------------------------------------------------------------


def test_the_z_score_by_hand() -> None:
    """z = (1, -1) and, with saturation counted down, (-2, 0): (3 * 1 - 2) / 4, (3 * -1 + 0) / 4."""
    found = combine(ensemble(), [0.75, 0.25], [0.2, 0.1], "ab")
    assert found.tolist() == pytest.approx([0.25, -0.75])


def test_the_minimum_and_a_lower_quantile() -> None:
    judge = ensemble(rule="quantile")
    assert combine(judge, [0.75, 0.25], [0.2, 0.1], "ab").tolist() == pytest.approx([-2, -1])
    judge = ensemble(rule="quantile", quantile=0.25)
    assert combine(judge, [0.75, 0.25], [0.2, 0.1], "ab").tolist() == pytest.approx([-1.25, -0.75])


def test_the_product_is_a_weighted_geometric_mean() -> None:
    def sigmoid(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    expected = (sigmoid(1) ** 3 * sigmoid(-2)) ** 0.25
    found = combine(ensemble(rule="product"), [0.75], [0.2], "a")
    assert found.item() == pytest.approx(expected)


def test_a_gate_closes_in_the_judges_own_direction() -> None:
    """scenes_exact below 0.5 and saturation above 0.2 close; on the gate is still open."""
    members = [TWO[0] | {"gate": 0.5}, TWO[1] | {"gate": 0.2, "weight": 0, "mean": None}]
    judge = ensemble(rule="product", members=members)
    found = combine(judge, [0.5, 0.49, 0.9, 0.9], [0.2, 0.1, 0.21, 0.1], "abcd")
    assert found[1] == 0 and found[2] == 0
    assert found[0].item() == pytest.approx(0.5)  # sigmoid(0): the gate alone does not vote
    assert found[3] > found[0]


def test_ranks_are_taken_within_a_prompt() -> None:
    values = torch.tensor([0.1, 0.3, 0.3, 0.2, 9.0, NAN])
    ranks = rules.group_ranks(values, list("aaaabb"))
    # a: 0.1 below all; 0.3 twice above two and equal to one; b: alone, since NaN ranks nobody
    assert ranks[:5].tolist() == pytest.approx([0, 2.5 / 3, 2.5 / 3, 1 / 3, 0.5])
    assert ranks[5].isnan()
    stretched = rules.group_ranks(values.exp() * 7, list("aaaabb"))
    assert torch.equal(stretched[:5], ranks[:5])  # any increasing map gives the same ranks


def test_the_rank_rule_depends_on_its_group_and_the_others_do_not() -> None:
    exact, saturation = [0.2, 0.8, 0.5], [0.1, 0.1, 0.3]
    bare = [{k: m[k] for k in m if k not in ("mean", "std")} for m in TWO]
    rank = ensemble(rule="rank", members=bare)
    assert combine(rank, exact, saturation, "aaa").tolist() == pytest.approx(
        [(3 * 0 + 0.75) / 4, (3 * 1 + 0.75) / 4, (3 * 0.5 + 0) / 4]
    )
    assert combine(rank, exact, saturation, "abc").tolist() == pytest.approx([0.5] * 3)
    for rule in ("z_score", "product", "quantile"):
        together = combine(ensemble(rule=rule), exact, saturation, "aaa")
        alone = [
            combine(ensemble(rule=rule), [e], [s], "a").item()
            for e, s in zip(exact, saturation, strict=True)
        ]
        assert together.tolist() == pytest.approx(alone, abs=1e-6)


def test_a_nearly_constant_judge_does_not_drown_the_others() -> None:
    members = [TWO[0], TWO[1] | {"std": 1e-9}]
    with_floor = ensemble(members=members, std_floor=0.05)
    found = combine(with_floor, [0.75], [0.2], "a")
    assert found.item() == pytest.approx(0.25)  # as with std 0.05


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["z_score", "rank", "product", "quantile"])
def test_a_members_failure_is_named(rule: str) -> None:
    given = columns(scenes_exact=[0.5, NAN, 0.7], saturation=[0.1, 0.1, NAN])
    found = ensemble(rule=rule).combine(given, list("aaa"))
    assert found.values.isnan().tolist() == [False, True, True]
    assert found.reasons == (None, "scenes_exact: broken", "saturation: broken")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": ["saturation"]}, "saturation: named twice; a held-out judge is not a member"),
        ({"members": [TWO[0], TWO[0]]}, "scenes_exact: named twice"),
        ({"held_out": []}, "at least 1 item"),
        ({"members": TWO[:1]}, "at least 2 items"),
        ({"members": [TWO[0], {"judge": "b"}]}, "rule z_score needs mean and std of b"),
        ({"members": [TWO[0], TWO[1] | {"gate": 1.0}]}, "gates (saturation) go with rule product"),
        ({"members": [TWO[0], TWO[1] | {"weight": 0}]}, "weight 0 and no gate; hold it out"),
        (
            {"rule": "product", "members": [m | {"weight": 0, "gate": 0.0} for m in TWO]},
            "every weight is 0",
        ),
    ],
)
def test_options_are_checked_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ensemble(**options)
    assert message in str(error.value)


def test_members_are_judges_of_the_catalogue_with_a_direction() -> None:
    with pytest.raises(UserError, match="unknown judge 'sharpnes'; known"):
        ensemble(held_out=["sharpnes"])
    with pytest.raises(UserError, match="judge 'saturation' has no better end") as error:
        ensemble(members=[TWO[0], {k: v for k, v in TWO[1].items() if k != "direction"}])
    assert error.value.fix == "give the member direction: 1 or -1"
    with pytest.raises(UserError, match="'ensemble_scenes' is an ensemble; name its judges"):
        ensemble(held_out=["ensemble_scenes"])


# --- the bundled example -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> Ensemble:
    judge = load("ensemble_scenes")
    assert isinstance(judge, Ensemble)
    return judge


def test_columns_hold_members_and_the_held_out_judge(bundled: Ensemble) -> None:
    texts = [own for own, _ in golden.CASES[:3]]
    media = [golden.drawn(text, i) for i, text in enumerate(texts)]
    found = bundled.members(media, texts)
    assert list(found) == ["scenes_clip", "scenes_vlm", "scenes_exact"]
    for name, scores in found.items():
        assert torch.equal(scores.values, load(name).score(media, texts).values)
    z = [
        (found[m.judge].values - m.mean) / m.std  # type: ignore[operator]
        for m in bundled.options.members
    ]
    own = bundled.score(media, texts).values
    assert own.tolist() == pytest.approx(torch.stack(z).mean(0).tolist(), abs=1e-5)
    assert torch.equal(own, bundled.combine(found, texts).values)


def test_a_broken_picture_is_one_nan(bundled: Ensemble) -> None:
    media = [golden.drawn("a photo of a bed", 3), Media("image", b"no image")]
    found = bundled.score(media, ["a photo of a bed"] * 2)
    assert found.values.isnan().tolist() == [False, True]
    assert str(found.reasons[1]).startswith("scenes_clip: not an image")


def test_golden_values(bundled: Ensemble) -> None:
    card = judge_card("ensemble_scenes")
    path = find_root() / "reward_models" / card.name / str(card.golden)
    values = [row["value"] for row in golden.compute("ensemble_scenes")]
    known = [row["value"] for row in json.loads(path.read_text())]
    assert values == pytest.approx(known, abs=card.details["golden_tolerance"])
    assert bundled.options.held_out == ("scenes_exact",)


def test_numbers_belong_to_the_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member's new version or weights are another ensemble, though its own card is the same."""
    made = ensemble()
    first = made.depends_on
    assert list(first) == ["scenes_exact", "saturation"]
    assert first["saturation"]["version"] == judge_card("saturation").version
    changed = judge_card("saturation").model_copy(update={"version": 99})
    monkeypatch.setattr(
        facts, "judge_card", lambda n: changed if n == "saturation" else judge_card(n)
    )
    assert made.depends_on["saturation"]["version"] == 99
    assert made.depends_on["scenes_exact"] == first["scenes_exact"]


def test_a_member_that_cannot_be_reached_makes_the_ensemble_so() -> None:
    made = ensemble()
    there = Scores(torch.tensor([0.5]), (None,))
    gone = Scores(torch.tensor([NAN]), ("no connection",), unreachable=True)
    found = made.combine({"scenes_exact": there, "saturation": gone}, ["p"])
    assert found.unreachable and found.reasons == ("saturation: no connection",)
    with pytest.raises(UserError, match="'x' cannot be reached: saturation: no connection"):
        found.kept("x")
    assert not made.combine({"scenes_exact": there, "saturation": there}, ["p"]).unreachable
