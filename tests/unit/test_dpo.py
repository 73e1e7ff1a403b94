"""Diffusion-DPO against numbers worked out by hand from the released formula (float64 where
stated).

V1.a: m_w=.1000 m_l=.1200 r_w=.1004 r_l=.1201, beta 2000. D = (m_w - m_l) - (r_w - r_l) = -.0200 +
    .0197 = -.0003,
u = -(2000/2) D = .3, loss = log(1 + e^-.3) = .5543552445, dL/dm_w = (beta/2) sigmoid(-u) =
425.5574832.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pair_cases import pairs, tokens
from torch import Tensor

from t2i_align.contract import Event, LossOutput, Score, ScoredBatch
from t2i_align.objectives.dpo import DPO, DPOOptions
from t2i_align.process.convert import target, to_x0_eps
from t2i_align.process.elbo import elbo_score
from t2i_align.protocols import LocalStats


def elbo(errors: Tensor) -> Score:
    """A score of given mean errors, one draw an item."""
    error = errors[:, None]
    ones = torch.ones_like(error)
    return Score("elbo", -0.5 * error, ones.bool(), ones.long(), "mean", error=error)


def run(
    m: Tensor, r: Tensor, beta: float, preference: float = 1.0, smoothing: float = 0.0
) -> LossOutput:
    """Winners first, losers second."""
    num = len(m) // 2
    index = torch.arange(num)
    batch = ScoredBatch(
        scores={"policy": elbo(m), "reference": elbo(r)},
        chosen=index,
        rejected=index + num,
        preference=torch.full((num,), preference, dtype=m.dtype),
    )
    objective = DPO(DPOOptions(beta=beta, label_smoothing=smoothing))
    return objective(batch, {}, LocalStats())


def f64(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def test_v1a_loss_and_gradient() -> None:
    m = f64(0.1000, 0.1200).requires_grad_()
    out = run(m, f64(0.1004, 0.1201), 2000.0)
    out.loss.backward()
    assert m.grad is not None
    assert out.loss.item() == pytest.approx(0.5543552445, abs=1e-9)
    assert m.grad[0].item() == pytest.approx(425.5574832, abs=1e-6)
    assert m.grad[1].item() == pytest.approx(-425.5574832, abs=1e-6)


def test_v1b_mean_of_logsigmoid_not_logsigmoid_of_mean() -> None:
    m, r = f64(0.1, 0.2, 0.12, 0.19), f64(0.1004, 0.2002, 0.1201, 0.1905)
    out = run(m, r, 5000.0)
    assert out.loss.item() == pytest.approx(0.7618710061, abs=1e-9)
    assert out.metrics["rewards/accuracies"].mean().item() == 0.5
    assert out.loss.item() != pytest.approx(math.log(2), abs=1e-3)


def test_v1f_margin_between_captions() -> None:
    """Errors of one image under two captions: u = -1000 (-.0030 + .0024) = .6."""
    out = run(f64(0.1000, 0.1030), f64(0.1004, 0.1028), 2000.0)
    assert out.loss.item() == pytest.approx(0.4374879505, abs=1e-9)


E_ = torch.tensor([[[1.0, 0.0], [-1.0, 2.0]]], dtype=torch.float64)
PRED_W = torch.tensor([[[0.9, 0.1], [-1.0, 1.9]]], dtype=torch.float64)
PRED_L = torch.tensor([[[0.8, 0.0], [-0.8, 2.2]]], dtype=torch.float64)
REF_W = torch.tensor([[[0.8, 0.1], [-1.0, 1.8]]], dtype=torch.float64)
REF_L = torch.tensor([[[0.8, 0.1], [-0.8, 2.1]]], dtype=torch.float64)


def scored(preds: Tensor, noise: Tensor) -> Score:
    """The suite's own error computation on ``(B, 1, 2, 2)`` predictions, one draw."""
    num = preds.shape[0]
    event = Event(
        kind="elbo",
        cond={},
        mask=torch.ones(num, 1, dtype=torch.bool),
        x_t=noise.unsqueeze(1),
        time=torch.zeros(num, 1),
        target=noise.unsqueeze(1),
    )
    return elbo_score(preds, event, frozenset())


def test_v1c_through_predictions_with_gradient() -> None:
    """From tensors.

    U = 1, loss .3132616875, dL/dpred_w = +6.723535534 (pred_w - e), loser the negative.
    """
    preds = torch.stack([PRED_W, PRED_L]).float().requires_grad_()
    noise = torch.stack([E_, E_]).float()
    refs = torch.stack([REF_W, REF_L]).float()
    batch = ScoredBatch(
        scores={"policy": scored(preds, noise), "reference": scored(refs, noise)},
        chosen=torch.tensor([0]),
        rejected=torch.tensor([1]),
        preference=torch.ones(1),
    )
    out = DPO(DPOOptions(beta=100.0))(batch, {}, LocalStats())
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.3132616875, abs=1e-6)
    assert preds.grad is not None
    torch.testing.assert_close(preds.grad[0], 6.723535534 * (preds[0] - noise[0]).detach())
    torch.testing.assert_close(preds.grad[1], -6.723535534 * (preds[1] - noise[1]).detach())
    gap = out.metrics["error_gap/chosen"].item(), out.metrics["error_gap/rejected"].item()
    assert gap == pytest.approx((0.0075 - 0.0225, 0.03 - 0.025), abs=1e-6)


@pytest.mark.parametrize("beta", [100.0, 800.0])
def test_v1c_sum_form_is_eight_times_the_beta(beta: float) -> None:
    """Sums over 4 elements without 1/2 at beta 100: u = -100 (.03 - .12 - .09 + .10) = 8.

    Ours is 2 x 4 times smaller, so the sum form's beta is ours / (2 D): 800 here, loss 3.354e-4.
    """
    m, r = (
        torch.stack([(p - E_).square().mean() for p in preds])
        for preds in ((PRED_W, PRED_L), (REF_W, REF_L))
    )
    out = run(m, r, beta)
    sums = 4 * torch.cat([m, r])
    theirs = -100.0 * ((sums[0] - sums[1]) - (sums[2] - sums[3])).item()
    assert theirs == pytest.approx(8.0, abs=1e-12)
    assert out.metrics["logits/std"].item() == pytest.approx(theirs * beta / 800, abs=1e-6)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-beta / 100)), abs=1e-12)


def test_v1d_policy_equals_reference_is_ln2_with_gradient() -> None:
    m = f64(0.3, 0.4).requires_grad_()
    out = run(m, m.detach(), 5000.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert m.grad is not None and m.grad[0].item() == pytest.approx(1250.0)  # beta/2 * sigmoid(0)


def test_flow_vector_8_7() -> None:
    """x0_w=[1,-1], x0_l=[.5,.5], e=[.2,.4], t=.6.

    Errors .01 .045 against .025 .025: u = 1.75 at beta 100.
    """
    x_0 = torch.tensor([[1.0, -1.0], [0.5, 0.5]])
    eps = torch.tensor([[0.2, 0.4], [0.2, 0.4]])
    alpha, sigma = torch.full((2,), 0.4), torch.full((2,), 0.6)
    v = target("velocity", x_0, eps, alpha, sigma)
    torch.testing.assert_close(v, torch.tensor([[-0.8, 1.4], [-0.3, -0.1]]))
    x_t = alpha[:, None] * x_0 + sigma[:, None] * eps
    torch.testing.assert_close(x_t, torch.tensor([[0.52, -0.16], [0.32, 0.44]]))
    policy = v + torch.tensor([[0.1, -0.1], [0.3, 0.0]])
    reference = v + torch.tensor([[0.2, -0.1], [0.2, 0.1]])
    m, r = ((p - v).square().mean(1).double() for p in (policy, reference))
    assert run(m, r, 100.0).loss.item() == pytest.approx(0.1602241504, abs=1e-6)
    scaled = run(m, r, 100.0 * 0.4**2)  # beta_t = beta (1 - t)^2, the derivation's weight
    assert scaled.loss.item() == pytest.approx(0.5629153336, abs=1e-6)
    got_x0, got_eps = to_x0_eps("velocity", policy, x_t, alpha, sigma)
    assert (got_eps[0] - eps[0]).square().mean().item() == pytest.approx(0.0016, abs=1e-7)
    assert (got_x0[0] - x_0[0]).square().mean().item() == pytest.approx(0.0036, abs=1e-7)


def test_v_prediction_identity_of_8_7() -> None:
    """abar = .6, error of v [.1, -.2]: error of eps = sqrt(abar) of it, so .6 x .025 = .015."""
    x_0, eps = f64(1.0, -1.0)[None], f64(0.2, 0.4)[None]
    alpha, sigma = f64(0.6).sqrt(), f64(0.4).sqrt()
    x_t = alpha * x_0 + sigma * eps
    off = f64(0.1, -0.2)[None]
    v = target("v_prediction", x_0, eps, alpha, sigma) + off
    got = to_x0_eps("v_prediction", v, x_t, alpha, sigma)[1]
    assert off.square().mean().item() == pytest.approx(0.025, abs=1e-15)
    assert (got - eps).square().mean().item() == pytest.approx(0.015, abs=1e-12)


def weighed(weight: Tensor | None) -> tuple[Score, Score, Tensor]:
    """Scores of V1.c's tensors, two draws an item: its own, and one off by .1 everywhere more."""
    noise = torch.stack([E_, E_]).float()
    target_ = torch.stack([noise, noise], 1)
    event = Event(
        "elbo", {}, torch.ones(2, 2).bool(), x_t=target_, time=torch.zeros(2, 2), target=target_,
        weight=weight,
    )  # fmt: skip
    first = torch.stack([PRED_W, PRED_L]).float()
    preds = torch.stack([first, noise - 0.1], 1).flatten(0, 1).requires_grad_()
    known = torch.stack([REF_W, REF_L]).float()
    refs = torch.stack([known, noise + 0.2], 1).flatten(0, 1)
    policy, reference = (elbo_score(p, event, frozenset()) for p in (preds, refs))
    return policy, reference, preds


def test_unit_weights_of_an_event_by_hand() -> None:
    """logp = -w error / 2 for each draw; an item is the mean over its draws.

    Errors .0075 .01 | .03 .01 and references .0225 .04 | .025 .04, weights 2 0 | 3 .5:
    twice the log-ratios are (2 x .015 + 0) / 2 = .015 and (-3 x .005 + .5 x .03) / 2 = 0. At beta
    100, u = 50 x .015 = .75. dL/dpred of a draw = (beta/2) s(-u) (w / 2 draws) (2/4) (pred - e).
    """
    weight = torch.tensor([[2.0, 0.0], [3.0, 0.5]])
    policy, reference, preds = weighed(weight)
    errors = torch.tensor([[0.0075, 0.01], [0.03, 0.01]])
    assert policy.error is not None
    torch.testing.assert_close(policy.error, errors)  # what is measured has no weight in it
    torch.testing.assert_close(policy.logp, -0.5 * weight * errors)
    batch = ScoredBatch(
        {"policy": policy, "reference": reference},
        torch.tensor([0]),
        torch.tensor([1]),
        torch.ones(1),
    )
    out = DPO(DPOOptions(beta=100.0))(batch, {}, LocalStats())
    (gradient,) = torch.autograd.grad(out.loss, preds)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.75)), abs=1e-6)
    pull = 50 / (1 + math.exp(0.75)) * torch.tensor([1.0, 1.0, -1.0, -1.0]) * weight.flatten() / 4
    noise = E_.float().expand(4, 1, 2, 2).reshape(preds.shape)
    torch.testing.assert_close(gradient, pull.view(4, 1, 1, 1) * (preds.detach() - noise))
    alike = weighed(torch.full((2, 2), 3.0))[0].logp
    torch.testing.assert_close(alike, 3 * weighed(None)[0].logp)


def test_kept_tie_and_label_smoothing_are_cdpo() -> None:
    """u = .3: smoothing .1 gives .5843552445; a tie averages both directions."""
    m, r = f64(0.1000, 0.1200), f64(0.1004, 0.1201)
    assert run(m, r, 2000.0, smoothing=0.1).loss.item() == pytest.approx(0.5843552445, abs=1e-9)
    tie = run(m, r, 2000.0, preference=0.5).loss.item()
    assert tie == pytest.approx((math.log1p(math.exp(-0.3)) + math.log1p(math.exp(0.3))) / 2)


def test_token_scores_use_the_joint_log_ratio() -> None:
    """rho = beta sum_u (log p - log p_ref) over unmasked tokens only."""
    logp = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    ref = torch.tensor([[-2.0, -2.0, 5.0], [-1.0, -1.0, -0.5]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    score = lambda x: Score("token", x, mask, torch.ones_like(x).long(), "sum")  # noqa: E731
    batch = ScoredBatch(
        {"policy": score(logp), "reference": score(ref)},
        torch.tensor([0]),
        torch.tensor([1]),
        torch.ones(1, dtype=torch.float64),
    )
    out = DPO(DPOOptions(beta=0.1))(batch, {}, LocalStats())
    assert out.metrics["rewards/chosen"].item() == pytest.approx(0.1)
    assert out.metrics["rewards/rejected"].item() == pytest.approx(-0.05)
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-0.15)))


def test_metrics_by_time_bin_and_std() -> None:
    m, r = torch.tensor([0.1, 0.2, 0.12, 0.19]), torch.tensor([0.1004, 0.2002, 0.1201, 0.1905])
    index = torch.arange(2)
    batch = ScoredBatch(
        {"policy": elbo(m), "reference": elbo(r)},
        index,
        index + 2,
        torch.ones(2),
        lam=torch.tensor([[0.05], [0.95], [0.05], [0.95]]),
    )
    out = DPO(DPOOptions(beta=5000.0))(batch, {}, LocalStats())
    first, last = out.metrics["rewards/accuracies/t0"], out.metrics["rewards/accuracies/t4"]
    assert first[0] == 1.0 and first[1].isnan() and last[1] == 0.0 and last[0].isnan()
    torch.testing.assert_close(
        out.metrics["logits/std"], torch.tensor([0.75, -0.75]), atol=1e-3, rtol=0
    )


def test_the_anchor_adds_the_winners_error() -> None:
    """Eq. (4): loss(w) - loss(0) = w mean(m_w), and its gradient reaches winners only."""
    m, r = f64(0.3, 0.1, 0.5, 0.2).requires_grad_(), f64(0.2, 0.2, 0.4, 0.1)
    batch = ScoredBatch(
        scores={"policy": elbo(m), "reference": elbo(r)},
        chosen=torch.tensor([0, 1]),
        rejected=torch.tensor([2, 3]),
        preference=torch.ones(2, dtype=m.dtype),
    )
    plain, anchored = (
        DPO(DPOOptions(beta=3.0, sft_weight=w))(batch, {}, LocalStats()).loss for w in (0.0, 7.0)
    )
    (gradient,) = torch.autograd.grad(anchored - plain, m)
    assert (anchored - plain).item() == pytest.approx(7.0 * (0.3 + 0.1) / 2, abs=1e-12)
    assert torch.allclose(gradient, f64(3.5, 3.5, 0.0, 0.0))


def two_objectives(a: float, link: str = "sigmoid") -> LossOutput:
    """Rewards .8 and .5 at beta 1, a second judge's values 1.0 and .4, labels' share a."""
    rho = f64(0.8, 0.5)
    batch = replace(pairs(tokens(rho), tokens(0 * rho)), values=f64(1.0, 0.4))
    objective = DPO(DPOOptions(beta=1.0, modpo_weight=a, link=link))
    return objective(batch, {}, LocalStats())


def test_modpo_by_hand() -> None:
    """U = .3 / a - ((1 - a) / a) .6: 0 at a = 1/2 and .2 at a = 3/4; a = 1 is DPO."""
    for a, u in ((0.5, 0.0), (0.75, 0.2), (1.0, 0.3)):
        assert two_objectives(a).loss.item() == pytest.approx(math.log1p(math.exp(-u)), abs=1e-12)
    assert two_objectives(0.75).metrics["rewards/margins"].item() == pytest.approx(0.3)


def test_modpo_reaches_links_of_both_rewards() -> None:
    """Items have rewards (rho - (1 - a) v) / a: 2 .8 - 1 = .6 and 2 .5 - .4 = .6 at a = 1/2.

    nca: -log s(.6) - 1/2 log s(-.6) - 1/2 log s(-.6).
    """
    nca = math.log1p(math.exp(-0.6)) + math.log1p(math.exp(0.6))
    assert two_objectives(0.5, "nca").loss.item() == pytest.approx(nca, abs=1e-12)


def test_modpo_is_minimised_by_the_weighted_reward() -> None:
    """Labels follow sigmoid(r_w - r_l); rho = a r + (1 - a) v has u = r_w - r_l, slope 0 there.

    With preference s(r_w - r_l) the gradient of the loss is s(u) - preference.
    """
    a, r, v = 0.3, f64(1.2, -0.4), f64(-0.7, 0.9)
    rho = (a * r + (1 - a) * v).requires_grad_()
    label = torch.sigmoid(r[0] - r[1])
    batch = replace(pairs(tokens(rho), tokens(f64(0.0, 0.0)), label), values=v)
    out = DPO(DPOOptions(beta=1.0, modpo_weight=a))(batch, {}, LocalStats())
    (gradient,) = torch.autograd.grad(out.loss, rho)
    assert gradient.abs().max() < 1e-12
    assert out.metrics["logits/std"].item() == pytest.approx(1.6)


def test_needs_follow_the_options() -> None:
    assert not DPO.needs.values and not DPO(DPOOptions()).needs.values
    assert DPO(DPOOptions(modpo_weight=0.5)).needs.values
    assert DPO(DPOOptions(weight="smpo")).needs.values
    assert not DPO(DPOOptions(weight="noise_em")).needs.values
    assert not DPO(DPOOptions(link="rdpo")).needs.bounded_below
    assert DPO.needs.bounded_below  # the class's own declaration is untouched
    rho = f64(0.8, 0.5)
    with pytest.raises(ValueError, match="modpo_weight needs a judge's value of every item"):
        objective = DPO(DPOOptions(modpo_weight=0.5))
        objective(pairs(tokens(rho), tokens(rho)), {}, LocalStats())


def test_gradients_of_everything_at_once_by_finite_differences() -> None:
    """Link, weight, second objective, anchor and record weights together."""
    objective = DPO(
        DPOOptions(
            beta=0.7,
            link={"type": "f_dpo", "divergence": "js"},
            weight={"type": "madpo", "threshold": 0.1, "width": 0.5},
            modpo_weight=0.6,
            sft_weight=0.2,
        )
    )
    known, values = f64(-1.1, -0.7, -0.9, -1.4), f64(0.3, 0.1, -0.2, 0.4)

    def loss(logp: Tensor) -> Tensor:
        batch = pairs(tokens(logp), tokens(known), f64(1.0, 0.5))
        batch = replace(batch, values=values, weight=f64(2.0, 0.5))
        return objective(batch, {}, LocalStats()).loss

    assert torch.autograd.gradcheck(loss, (f64(-1.0, -0.5, -2.0, -0.3).requires_grad_(),))


def test_state_is_that_of_link_and_weight_and_is_logged() -> None:
    objective = DPO(DPOOptions(beta=1.0, link="beta_dpo", weight="noise_em"))
    state = objective.init_state()
    assert {k: v.item() for k, v in state.items()} == pytest.approx(
        {"beta_dpo/mean": 0.0, "beta_dpo/std": 0.0, "noise_em/rate": 0.1}
    )
    rho = torch.tensor([0.8, 0.2, 0.5, 0.4])
    out = objective(pairs(tokens(rho), tokens(0 * rho)), state, LocalStats())
    assert set(out.state) == set(state) and state["beta_dpo/mean"].item() == 0.0
    for name, value in out.state.items():
        assert value.dtype == torch.float32 and not value.requires_grad
        assert out.metrics[name].tolist() == [value.item()] * 2
    assert DPO(DPOOptions()).init_state() == {}
