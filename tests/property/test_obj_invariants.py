"""What must hold of every objective here: gradients, kinds, shifts, splits, ranks, order of items.

One table says how each is called; a batch of six items serves all layouts: three pairs, six
labelled items, or two lists of three.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t2i_align.contract import LossOutput, Score, ScoredBatch
from tests.objective_batches import (
    Exact,
    Frozen,
    batch,
    elbo,
    f64,
    objective,
    on_ranks,
    take,
    token,
)

M = f64(0.11, 0.24, 0.16, 0.29, 0.18, 0.32)
R = f64(0.10, 0.25, 0.175, 0.26, 0.20, 0.31)
LISTS = torch.tensor([0, 0, 0, 1, 1, 1])

RANGE = {"type": "smpo", "gamma": 3.0, "value_min": -1.0, "value_max": 2.0}

# case -> (objective, options)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mapo": ("mapo", {"num_timesteps": 20.0}),
    "mapo paper": ("mapo", {"form": "paper", "exponent": 8.0}),
    "dso_dro": ("dso_dro", {}),
    "dso_dro signed": ("dso_dro", {"form": "signed"}),
    "kto": ("kto", {"beta": 9.0}),
    "kto loss_averse": ("kto", {"beta": 9.0, "halo": "loss_averse", "undesirable_weight": 0.5}),
    "kto risk_seeking": ("kto", {"beta": 9.0, "halo": "risk_seeking"}),
    "bco": ("bco", {"beta": 9.0}),
    "rwl": ("rwl", {"tau": 0.5}),
    "rwl raw lists": ("rwl", {"weighting": "raw", "layout": "groups"}),
    "npo": ("npo", {"beta": 9.0}),
    "npo retain": ("npo", {"beta": 9.0, "retain_weight": 2.0}),
    "npo pairs": ("npo", {"beta": 9.0, "layout": "pairs"}),
    "d2o": ("d2o", {"beta": 9.0, "alpha": 9.0}),
    "llm_dro": ("llm_dro", {"tau": 9.0, "num_slots": 8, "initial_value": 0.5}),
    "dspo": ("dspo", {"beta": 0.7}),
    "dspo sdxl": ("dspo", {"beta": 9.0, "form": "sdxl"}),
    "lipo": ("lipo", {"beta": 9.0}),
    "lipo labels": ("lipo", {"beta": 9.0, "positions": "labels"}),
    "rankdpo ranks": ("rankdpo", {"beta": 9.0, "psi": "ranks", "positions": "labels"}),
    "list_mle": ("list_mle", {"beta": 9.0}),
    "capo": ("capo", {"beta": 9.0}),
    "capo all": ("capo", {"beta": 9.0, "pairs": "all"}),
    "tdpo": ("tdpo", {"beta": 9.0}),
    "tkto": ("tkto", {"beta": 9.0}),
    "dcpo": ("dcpo", {"beta": 9.0}),
    "dpo smpo": ("dpo", {"beta": 9.0, "weight": RANGE}),
    "dpo smpo seen": ("dpo", {"beta": 9.0, "weight": "smpo"}),
    "dpo madpo": ("dpo", {"beta": 9.0, "weight": {"type": "madpo", "threshold": 0.6, "width": 1}}),
    "dpo noise_em": ("dpo", {"beta": 9.0, "weight": "noise_em"}),
    "dpo modpo": ("dpo", {"beta": 9.0, "modpo_weight": 0.6}),
    "dpo anchored": ("dpo", {"beta": 9.0, "sft_weight": 2.0}),
    "tdpo anchored": ("tdpo", {"beta": 9.0, "sft_weight": 2.0}),
    "dcpo anchored": ("dcpo", {"beta": 9.0, "sft_weight": 2.0}),
    "dpop anchored": ("dpop", {"beta": 9.0, "sft_weight": 2.0}),
    "dso_dro anchored": ("dso_dro", {"sft_weight": 2.0}),
}
TENSORS = {"dspo", "dspo sdxl"}
NO_REFERENCE = {"mapo", "mapo paper", "dso_dro", "dso_dro signed", "rwl", "rwl raw lists"}
NO_REFERENCE |= {"dso_dro anchored"}
# a likelihood beside the margin: mean error on elbo, -log p per token on tokens
OWN_ERROR = {"npo retain"} | {case for case in CASES if case.endswith(" anchored")}
# detached weights of both labels are constants to autograd: the derivative is another loss's, which
# tests/unit/test_margin_weights.py has. Likewise link beta_dpo (test_links.py: weighed pairs) and
# dpo_safeguard (its own file: the loser's gradient is scaled), which are not in the table.
DETACHED = {"dpo noise_em"}


def made(case: str) -> Any:
    name, options = CASES[case]
    return objective(name, **options)


def facts(layout: str) -> dict[str, Any]:
    """What the data says of the six items."""
    values = f64(0.3, 1.4, 0.9, -0.2, 0.8, 0.1)
    if layout == "pairs":
        return {"num_pairs": 3, "prompts": torch.arange(6), "values": values}
    known: dict[str, Any] = {"values": values, "prompts": torch.tensor([0, 1, 2, 0, 1, 2])}
    if layout == "items":
        return known | {"labels": torch.tensor([1, -1, 1, -1, 1, -1])}
    return known | {"groups": LISTS, "ranks": torch.tensor([2, 0, 1, 2, 0, 1])}


def scored(case: str, m: Tensor, r: Tensor = R) -> ScoredBatch:
    """Errors as a batch of the case's layout; predictions whose errors they are, where asked for.

    With target 0 the prediction is the root of the error in two elements, the reference's with
    opposite sign in the second.
    """
    extra: list[dict[str, Tensor]] = [{}, {}]
    if case in TENSORS:
        sign = torch.tensor([1.0, -1.0], dtype=m.dtype)
        preds = [m.sqrt()[:, None, None].expand(-1, 1, 2), r.sqrt()[:, None, None] * sign]
        extra = [{"pred": p, "target": torch.zeros_like(p)} for p in preds]
    reference = None if case in NO_REFERENCE else elbo(r, **extra[1])
    return batch(elbo(m, **extra[0]), reference, **facts(made(case).needs.layout))


def run(case: str, given: ScoredBatch, stats: Any = None) -> LossOutput:
    it = made(case)
    return it(given, it.init_state(), stats or Exact())


@pytest.mark.parametrize("case", [case for case in CASES if case not in DETACHED])
def test_gradient_is_that_of_finite_differences(case: str) -> None:
    """Means over the batch are held, as the gradient holds them; BCO's running mean is one."""
    stats = Frozen()

    def loss(m: Tensor) -> Tensor:
        return run(case, scored(case, m), stats.start()).loss

    assert torch.autograd.gradcheck(loss, (M.clone().requires_grad_(),), atol=1e-6)


def test_gradient_of_the_plain_likelihood() -> None:
    """``sft``: two draws of errors, and tokens some of which are padding."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    weight = f64(2.0, 0.5)

    def loss(score: Score) -> Tensor:
        return objective("sft")(batch(score, weight=weight), {}, Exact()).loss

    m = f64(0.1, 0.3, 0.2, 0.6).view(2, 2).requires_grad_()
    logp = f64(-0.5, -1.5, -9.0, -2.0, 3.0, 3.0).view(2, 3).requires_grad_()
    assert loss(elbo(m)).item() == pytest.approx((2 * 0.2 + 0.5 * 0.4) / 2)
    assert loss(token(logp, mask)).item() == pytest.approx((2 * 1.0 + 0.5 * 2.0) / 2)
    assert torch.autograd.gradcheck(lambda x: loss(elbo(x)), (m,))
    assert torch.autograd.gradcheck(lambda x: loss(token(x, mask)), (logp,))


@pytest.mark.parametrize("case", CASES)
def test_loss_is_the_mean_of_its_examples_and_metrics_are_of_examples(case: str) -> None:
    out = run(case, scored(case, M.clone().requires_grad_()))
    torch.testing.assert_close(out.loss, out.per_example.mean())
    assert out.loss.requires_grad and len(out.per_example) in (2, 3, 6)
    for name, value in out.metrics.items():
        assert value.dtype == torch.float32 and not value.requires_grad, name
        assert len(value) in (2, 3, 6), name
    assert not any(v.requires_grad for v in out.state.values())


@pytest.mark.parametrize("case", sorted(set(CASES) - NO_REFERENCE - TENSORS - OWN_ERROR))
def test_tokens_with_the_same_log_ratio_have_the_same_loss(case: str) -> None:
    """Every kind gives log p; -m/2 for an error m, a sum over tokens here split in two."""
    first = torch.full((6,), -0.3, dtype=torch.float64)
    logp = [torch.stack([first, -0.5 * x - first], 1) for x in (M, R)]
    layout = facts(made(case).needs.layout)
    given = batch(token(logp[0]), token(logp[1]), **layout)
    assert "token" in made(case).needs.kinds
    torch.testing.assert_close(run(case, given).loss, run(case, scored(case, M)).loss)


REGRESSIONS = {"rwl", "rwl raw lists", "llm_dro", "capo", "capo all", "dspo"}


@pytest.mark.parametrize("case", sorted(set(CASES) - REGRESSIONS))
def test_the_good_are_pulled_down_and_the_bad_pushed_up(case: str) -> None:
    """Signs of dL/d error: never against the label (lists: best and worst of each)."""
    m = M.clone().requires_grad_()
    given = scored(case, m)
    (gradient,) = torch.autograd.grad(run(case, given).loss, m)
    good, bad = [0, 1, 2], [3, 4, 5]
    if given.labels is not None:
        good, bad = [0, 2, 4], [1, 3, 5]
    elif given.groups is not None:
        good, bad = [1, 4], [0, 3]  # by rank and by value
    assert (gradient[good] >= 0).all() and (gradient[bad] <= 0).all()
    assert gradient.abs().sum().item() > 0


# -- policy at the reference -----------------------------------------------------------------------

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("case", "value"),
    [
        ("kto", 0.5),
        ("kto loss_averse", (1 + LN2) * 0.75),
        ("kto risk_seeking", 1 - LN2),
        ("bco", LN2),
        ("npo", 2 / 9.0 * LN2 / 2),  # half of the items are bad
        ("npo pairs", 2 / 9.0 * LN2),
        ("d2o", LN2),
        ("tdpo", LN2),
        ("dcpo", LN2),
        ("dpo smpo", LN2),
        ("dpo smpo seen", LN2),
        ("dpo noise_em", LN2),
        ("dpo anchored", LN2 + 2 * (0.11 + 0.24 + 0.16) / 3),
        ("tdpo anchored", LN2 + 2 * (0.11 + 0.24 + 0.16) / 3),
        ("dcpo anchored", LN2 + 2 * (0.11 + 0.24 + 0.16) / 3),
        ("dpop anchored", LN2 + 2 * (0.11 + 0.24 + 0.16) / 3),
        ("tkto", 0.5),
        ("list_mle", math.log(6)),  # all 3! rankings alike
        ("dspo sdxl", 0.25),
    ],
)
def test_policy_at_the_reference(case: str, value: float) -> None:
    given = scored(case, M, M)
    if case == "dspo sdxl":
        score = given.scores["policy"]
        given = batch(score, score, num_pairs=3)
    assert run(case, given).loss.item() == pytest.approx(value, abs=1e-7)


# -- shifts, splits, order -------------------------------------------------------------------------

error = st.floats(0.01, 1.0)
six = st.lists(error, min_size=6, max_size=6).map(lambda x: torch.tensor(x, dtype=torch.float64))
SHIFT = "dso_dro d2o list_mle capo tdpo dcpo bco".split()
SHIFT += ["dpo smpo", "dpo madpo", "dpo noise_em", "dpo modpo"]
SHIFT += ["capo all", "lipo labels", "rankdpo ranks"]  # places by the policy jump at near ties


@pytest.mark.parametrize("case", SHIFT)
@settings(deadline=None, max_examples=20)
@given(six, six, st.floats(0.0, 0.5))
def test_a_constant_on_all_errors_changes_nothing(
    case: str, m: Tensor, r: Tensor, c: float
) -> None:
    """Only differences count; BCO's first running mean moves along."""
    before, after = run(case, scored(case, m, r)), run(case, scored(case, m + c, r))
    torch.testing.assert_close(before.loss, after.loss, atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.0, 0.05))
def test_kto_moves_its_reference_point_along_while_it_is_positive(c: float) -> None:
    """All errors fall by c: rewards rise by c beta / 2, and so does their reference point."""
    low = M - 0.1
    before, after = run("kto", scored("kto", low)), run("kto", scored("kto", low - c))
    assert before.metrics["kto/kl"][0] > 0
    torch.testing.assert_close(before.loss, after.loss)


GLOBAL = {"kto", "kto loss_averse", "kto risk_seeking", "tkto", "bco", "rwl", "dspo sdxl"}
GLOBAL |= {"dpo smpo seen"}
SPLITS = sorted(set(CASES) - GLOBAL)


def halves(case: str, whole: ScoredBatch) -> list[ScoredBatch]:
    """The records of a batch dealt to two batches of equal size (thirds for three pairs)."""
    layout = made(case).needs.layout
    if layout == "pairs":
        return [take(whole, [k, k + 3], num_pairs=1) for k in range(3)]
    if layout == "groups":
        return [take(whole, [0, 1, 2]), take(whole, [3, 4, 5])]
    return [take(whole, [0, 3, 4]), take(whole, [1, 2, 5])]


@pytest.mark.parametrize("case", SPLITS)
@settings(deadline=None, max_examples=10)
@given(six, six)
def test_split_batch_averages_to_the_whole(case: str, m: Tensor, r: Tensor) -> None:
    whole = scored(case, m, r)
    parts = torch.stack([run(case, part).loss for part in halves(case, whole)])
    torch.testing.assert_close(run(case, whole).loss, parts.mean())


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_are_one_process(case: str) -> None:
    """Loss, gradient and state of records dealt to ranks are those of the batch on one process."""
    m = M.clone().requires_grad_()
    whole = run(case, scored(case, m))
    (known,) = torch.autograd.grad(whole.loss, m)
    parts = halves(case, scored(case, m))
    outs = on_ranks(lambda k, stats: run(case, parts[k], stats), len(parts))
    loss = torch.stack([out.loss for out in outs]).mean()
    (gradient,) = torch.autograd.grad(loss, m)
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(gradient, known)
    for out in outs:
        assert out.state.keys() == whole.state.keys()
        for name, value in whole.state.items():
            torch.testing.assert_close(out.state[name], value)


LAYOUT_LISTS = [case for case in CASES if made(case).needs.layout == "groups"]


@pytest.mark.parametrize("case", LAYOUT_LISTS)
@settings(deadline=None, max_examples=10)
@given(st.permutations(range(6)))
def test_the_order_of_items_does_not_matter(case: str, order: list[int]) -> None:
    whole = scored(case, M)
    torch.testing.assert_close(run(case, take(whole, order)).loss, run(case, whole).loss)


@pytest.mark.parametrize("case", CASES)
def test_what_it_declares_is_what_it_reads(case: str) -> None:
    """A batch with only the views, labels and values asked for is enough."""
    needs = made(case).needs
    whole = scored(case, M)
    assert set(whole.scores) == set(needs.views)
    known = facts(needs.layout)
    if not needs.labels:
        known.pop("labels", None)
    if not needs.values:
        known.pop("values", None)
    given = batch(whole.scores["policy"], whole.scores.get("reference"), **known)
    torch.testing.assert_close(run(case, given).loss, run(case, whole).loss)
    assert made(case).citation.startswith("@")


@pytest.mark.parametrize("case", CASES)
def test_record_weights_scale_their_records(case: str) -> None:
    """Loss = mean of weight times example; weights of 1 change nothing."""
    plain = run(case, scored(case, M))
    num = 3 if made(case).needs.layout == "pairs" else 6
    record = torch.arange(num) if made(case).needs.layout != "groups" else LISTS
    for weight in (torch.ones(num).double(), 0.5 + record.double()):
        out = run(case, replace(scored(case, M), weight=weight))
        per_record = weight[[0, 3]] if made(case).needs.layout == "groups" else weight
        expected = (per_record * plain.per_example).mean()
        torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("case", ["dso_dro", "npo pairs"])
def test_a_kept_tie_counts_nothing_where_the_loss_is_odd(case: str) -> None:
    m = M.clone().requires_grad_()
    tie = replace(scored(case, m), preference=torch.full((3,), 0.5).double())
    (gradient,) = torch.autograd.grad(run(case, tie).loss, m)
    assert gradient.abs().max().item() < 1e-15
