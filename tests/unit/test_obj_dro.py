"""The two methods called DRO: DSO's m_w - m_l (V4), and Richemond's value regression.

V3 and V4 (rectified flow): x0_w=[1,0,-1,.5], x0_l=[0,.5,1,-.5], e_w=[.2,-.4,.6,.1],
e_l=[-.3,.7,.1,.9], the network is .9 x - .1 and V3's reference .8 x. V3 is DSO's other loss,
``dpo`` on these errors: at t = .25, z = -(beta/2) [(1.878425 - 1.242828125) - (1.7552 - 1.184)] =
-.0321984375 beta, L = log(1 + e^-z), dL/dm_w = (beta/2) sigmoid(-z) = -dL/dm_l.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from t2i_align.contract import Event
from t2i_align.process.convert import target
from t2i_align.process.elbo import elbo_score
from t2i_align.process.schedule import noised
from tests.objective_batches import Exact, batch, elbo, f64, objective, on_ranks, token

X_0 = torch.tensor([[1, 0, -1, 0.5], [0, 0.5, 1, -0.5]], dtype=torch.float64)
EPS = torch.tensor([[0.2, -0.4, 0.6, 0.1], [-0.3, 0.7, 0.1, 0.9]], dtype=torch.float64)


def flow_states(t: float) -> tuple[Tensor, Tensor]:
    """The two noised samples and what a network should say of them, ``(2, 4)`` each."""
    sigma = torch.full((2,), t, dtype=torch.float64)
    v = target("velocity", X_0, EPS, 1 - sigma, sigma)
    return noised(X_0, EPS, 1 - sigma, sigma), v


def flow_errors(t: float, scale: float = 0.9, shift: float = -0.1) -> Tensor:
    """Errors of a network ``scale x + shift`` through the suite's own process."""
    x_t, v = flow_states(t)
    return (scale * x_t + shift - v).square().mean(1)


V3 = [  # t, errors of the policy, of the reference, beta, z, loss
    (0.25, (1.878425, 1.242828125), (1.7552, 1.184), 500.0, -16.09921875, 16.0992188519057),
    (0.25, (1.878425, 1.242828125), (1.7552, 1.184), 1.0, -0.0321984375, 0.7093759861344472),
    (0.8, (0.839717, 0.52019), (0.848448, 0.54996), 500.0, -5.25975, 5.264933147958158),
    (0.8, (0.839717, 0.52019), (0.848448, 0.54996), 1.0, -0.0105195, 0.6984207629811978),
]
Pair = tuple[float, float]


@pytest.mark.parametrize(("t", "policy", "reference", "beta", "z", "loss"), V3)
def test_v3_dso_dpo(
    t: float, policy: Pair, reference: Pair, beta: float, z: float, loss: float
) -> None:
    m, r = flow_errors(t).requires_grad_(), flow_errors(t, 0.8, 0.0)
    assert m.tolist() == pytest.approx(policy, abs=1e-12)
    assert r.tolist() == pytest.approx(reference, abs=1e-12)
    out = objective("dpo", beta=beta)(batch(elbo(m), elbo(r), num_pairs=1), {}, Exact())
    (gradient,) = torch.autograd.grad(out.loss, m)
    pull = beta / 2 / (1 + math.exp(z))
    assert out.metrics["logits/std"].item() == pytest.approx(z, rel=1e-6)
    assert out.loss.item() == pytest.approx(loss, abs=1e-12)
    assert gradient.tolist() == pytest.approx([pull, -pull], rel=1e-9)


@pytest.mark.parametrize(("t", "policy", "reference", "beta", "z", "loss"), V3)
def test_v3_through_scores_of_an_event(
    t: float, policy: Pair, reference: Pair, beta: float, z: float, loss: float
) -> None:
    """The suite's score of predictions: v is e - x_0 and errors are means over the 4 elements.

    dL/dpred_w = (beta/2) sigmoid(-z) (2/4) (pred_w - v_w), the loser's with the other sign.
    """
    x_t, v = (x.float()[:, None] for x in flow_states(t))
    torch.testing.assert_close(v[:, 0], (EPS - X_0).float())
    ones = torch.ones(2, 1)
    event = Event("elbo", {}, ones.bool(), x_t=x_t, time=1000 * t * ones, target=v)
    pred = (0.9 * x_t - 0.1)[:, 0].requires_grad_()
    scores = [elbo_score(p, event, frozenset()) for p in (pred, 0.8 * x_t[:, 0])]
    for score, known in zip(scores, (policy, reference), strict=True):
        assert score.error_per_item().tolist() == pytest.approx(known, abs=1e-6)
    out = objective("dpo", beta=beta)(batch(*scores, num_pairs=1), {}, Exact())
    (gradient,) = torch.autograd.grad(out.loss, pred)
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    pull = beta / 4 / (1 + math.exp(z)) * torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(gradient, pull * (pred.detach() - v[:, 0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("t", "errors", "loss"),
    [(0.25, (1.878425, 1.242828125), 0.635596875), (0.8, (0.839717, 0.52019), 0.319527)],
)
def test_v4_dso(t: float, errors: tuple[float, float], loss: float) -> None:
    m = flow_errors(t).requires_grad_()
    out = objective("dso_dro")(batch(elbo(m), num_pairs=1), {}, Exact())
    (gradient,) = torch.autograd.grad(out.loss, m)
    assert m.tolist() == pytest.approx(errors, abs=1e-9)
    assert out.loss.item() == pytest.approx(loss, abs=1e-9)
    assert gradient.tolist() == [1.0, -1.0]  # no saturation


def test_signed_is_half_of_pairs_when_balanced() -> None:
    m = flow_errors(0.25)
    signed = objective("dso_dro", form="signed")
    out = signed(batch(elbo(m), labels=torch.tensor([1, -1])), {}, Exact())
    assert out.loss.item() == pytest.approx(0.635596875 / 2, abs=1e-9)
    needs = signed.needs
    assert (needs.layout, needs.labels, needs.bounded_below) == ("items", True, False)
    assert objective("dso_dro").needs.coupling == "time"


def test_dso_has_no_floor() -> None:
    """The loser's error carries the loss below anything, which is why the loop guards it."""
    losses = [
        objective("dso_dro")(batch(elbo(f64(0.1, m)), num_pairs=1), {}, Exact()).loss.item()
        for m in (1.0, 1e3, 1e6)
    ]
    assert losses == pytest.approx([0.1 - 1.0, 0.1 - 1e3, 0.1 - 1e6])
    assert not objective("dso_dro").needs.bounded_below


# -- llm_dro: (r, V, log pi, log ref, tau) -> loss, dL/dV, dL/dlog pi ------------------------------

VECTORS = [
    ((1.0, 0.4, -10.0, -10.5, 1.0), 0.005, -0.1, -0.1),
    ((0.0, 0.4, -10.0, -10.5, 1.0), 0.405, 0.9, 0.9),
    ((0.7, 0.2, -35.0, -30.0, 0.1), 0.5, -1.0, -0.1),
]


@pytest.mark.parametrize(("numbers", "loss", "d_value", "d_logp"), VECTORS)
def test_llm_dro_vectors(
    numbers: tuple[float, ...], loss: float, d_value: float, d_logp: float
) -> None:
    """dL/dV is read off the state: a step of size a moves V by -a dL/dV."""
    r, value, logp, ref, tau = numbers
    policy = f64(logp).requires_grad_()
    made = objective("llm_dro", tau=tau, value_learning_rate=0.5, num_slots=4)
    state = {"bias": f64(value)[0], "table": torch.zeros(4, dtype=torch.float64)}
    one = batch(token(policy), token(f64(ref)), values=f64(r), prompts=torch.tensor([6]))
    out = made(one, state, Exact())
    (gradient,) = torch.autograd.grad(out.loss, policy)
    assert out.loss.item() == pytest.approx(loss, abs=1e-9)
    assert gradient.item() == pytest.approx(d_logp, abs=1e-9)
    assert (out.state["bias"] - value).item() == pytest.approx(-0.5 * d_value, abs=1e-9)
    assert out.state["table"].tolist() == pytest.approx([0, 0, -0.5 * d_value, 0], abs=1e-9)
    assert state["table"].sum().item() == 0  # what was given stays as it was


def test_elbo_log_ratio_carries_one_half() -> None:
    """Lr = (r - m)/2: errors .2 -> .1 and tau 4 give d = 1 - 0 - 4 x .05 = .8."""
    made = objective("llm_dro", tau=4.0, num_slots=1)
    one = batch(elbo(f64(0.1)), elbo(f64(0.2)), values=f64(1.0), prompts=torch.tensor([3]))
    assert made(one, made.init_state(), Exact()).loss.item() == pytest.approx(0.32, abs=1e-7)


def test_values_converge_to_the_mean_of_each_prompt() -> None:
    """With the policy at the reference d = r - V, so V(prompt) goes to the mean reward."""
    made = objective("llm_dro", num_slots=7, value_learning_rate=0.2)
    m, prompts = f64(0.1, 0.1, 0.1, 0.1), torch.tensor([2, 2, 10, 10])
    given = batch(elbo(m), elbo(m), values=f64(1.0, 3.0, -4.0, -6.0), prompts=prompts)
    state = made.init_state()
    for _ in range(200):
        out = made(given, state, Exact())
        state = out.state
    assert out.metrics["dro/value"].tolist() == pytest.approx([2, 2, -5, -5], abs=1e-4)
    assert state["table"].dtype == torch.float32 and state["table"].shape == (7,)


def test_ranks_keep_one_table() -> None:
    made = objective("llm_dro", num_slots=5, tau=1.0)
    values, prompts = f64(1.0, 2.0, 3.0, 4.0), torch.tensor([1, 6, 1, 2])  # 1 and 6 share a slot

    def part(index: slice) -> object:
        m = f64(0.1, 0.2, 0.3, 0.4)[index]
        return batch(elbo(m), elbo(m + 0.01), values=values[index], prompts=prompts[index])

    whole = made(part(slice(None)), made.init_state(), Exact())
    halves = [part(slice(0, 2)), part(slice(2, 4))]
    outs = on_ranks(lambda k, stats: made(halves[k], made.init_state(), stats), 2)
    for out in outs:
        torch.testing.assert_close(out.state["table"], whole.state["table"])
        torch.testing.assert_close(out.state["bias"], whole.state["bias"])
    assert whole.state["table"][1] == pytest.approx(0.1 * (1 + 2 + 3) / 3, abs=1e-2)


def test_missing_facts_are_named() -> None:
    one = batch(elbo(f64(0.1)), elbo(f64(0.1)))
    made = objective("llm_dro")
    with pytest.raises(ValueError, match="needs the prompts"):
        made(one, made.init_state(), Exact())
    with pytest.raises(ValueError, match="labelled good or bad"):
        objective("dso_dro", form="signed")(one, {}, Exact())
