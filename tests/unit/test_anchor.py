"""The anchor on every objective that takes one, and the advice of the doctor that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align.contract import ScoredBatch
from t2i_align.errors import RecipeError
from t2i_align.objectives import OBJECTIVES
from t2i_align.protocols import LocalStats
from t2i_align.recipe import load_recipe, shipped
from t2i_align.registry import load
from t2i_align.train.alarms import ALARMS, Facts, History
from tests.objective_batches import batch, elbo, f64, objective, token

TAKING = {
    name: cls.needs.kinds
    for name in OBJECTIVES
    if "sft_weight" in (cls := load(OBJECTIVES, name, "objective")).Options.model_fields
}
FIXED = {"inversion_view": "reference"}
OWN: dict[str, dict[str, Any]] = {
    "inpo": FIXED,
    "smpo": {"value_min": 0.0, "value_max": 1.0, "winner": "label", **FIXED},
}


def pairs(m: Tensor, preference: Tensor, kind: str) -> ScoredBatch:
    """Two pairs of items of errors m, or of log-probabilities -m."""
    extra = {"preference": preference, "values": f64(0.9, 0.7, 0.3, 0.1), "num_pairs": 2}
    if kind == "token":
        return batch(token(-m), token(f64(-0.2, -0.2, -0.4, -0.1)), **extra)
    shown = m[:, None, None] * torch.ones(4, 1, 3, dtype=m.dtype)
    tensors = {"pred": shown, "target": torch.zeros_like(shown)}
    return batch(elbo(m, **tensors), elbo(f64(0.2, 0.2, 0.4, 0.1)), **extra)


def test_all_objectives_of_pairs_with_a_margin_take_it() -> None:
    names = {"dcpo", "dpo", "dpo_safeguard", "dpop", "dso_dro", "inpo", "smpo", "tdpo"}
    assert set(TAKING) == names, "spo and d3po have no likelihood of a picture; others are no pairs"


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n, kinds in TAKING.items() for k in ("elbo", "token") if k in kinds],
)
def test_it_adds_the_winners_own_loss_and_pulls_on_winners_alone(name: str, kind: str) -> None:
    """loss(w) - loss(0) = w mean(m_w); of the second pair either item won with 3/4 and 1/4."""
    m = f64(0.3, 0.1, 0.5, 0.2).requires_grad_()
    given = pairs(m, f64(1.0, 0.75), kind)
    both = [objective(name, sft_weight=w, **OWN.get(name, {})) for w in (0.0, 7.0)]
    plain, anchored = (o(given, o.init_state(), LocalStats()).loss for o in both)
    (gradient,) = torch.autograd.grad(anchored - plain, m)
    kept = (0.3 + 0.75 * 0.1 + 0.25 * 0.2) / 2
    assert (anchored - plain).item() == pytest.approx(7.0 * kept, abs=1e-12)
    assert torch.allclose(gradient, 7.0 / 2 * f64(1.0, 0.75, 0.0, 0.25), atol=1e-12)


def test_items_without_pairs_have_no_winner_to_hold() -> None:
    with pytest.raises(RecipeError, match="sft_weight is an anchor on pairs"):
        load_recipe("scenes_dso_dro", ["objective.form=signed", "objective.sft_weight=3"])


@pytest.mark.parametrize("name", ["inpo", "smpo"])
def test_noise_of_the_policys_own_making_is_no_anchor(name: str) -> None:
    """With it 150 steps of inpo lost .24: the winners' error ended 1.5 below the reference's."""
    with pytest.raises(RecipeError, match="set inversion_view: reference"):
        load_recipe(f"scenes_{name}", ["objective.sft_weight=30"])
    fixed = ["objective.sft_weight=30", "objective.inversion_view=reference"]
    assert load_recipe(f"scenes_{name}", fixed).objective.model_dump()["sft_weight"] == 30


@pytest.mark.parametrize("recipe", ["scenes_inpo", "scenes_mapo", "scenes_dpo"])
def test_the_doctor_names_the_anchor_where_there_is_one(recipe: str) -> None:
    """Winners unlearned by .1 and losers by .2, with a little noise, for 60 steps."""
    read = load_recipe(str(shipped()[recipe]))
    facts = Facts.of(read, read.needs, 32)
    history = History(facts)
    for step in range(1, 61):
        noise = 0.001 * (step % 3)
        history.add(step, {"watch/winner_gap": 0.1 + noise, "watch/loser_gap": 0.2 - noise})
    alarm = ALARMS["winner_error"]
    value = alarm.holds(history)
    assert value is not None
    advice = alarm.advice(history, value)
    said = {
        "scenes_inpo": "add an anchor (objective.sft_weight)",
        "scenes_dpo": "raise the anchor (objective.sft_weight, 30.0)",
    }
    for other in said.values():
        assert (other in advice) == (other == said.get(recipe)), advice
    assert "dpo_safeguard" in advice
