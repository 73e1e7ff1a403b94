"""Truths of every link in the table, a new one included, and of weights over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_cases import f64, margins, on_ranks, pairs, tokens
from torch import Tensor

from t2i_align.contract import LossOutput
from t2i_align.objectives.dpo import DPO, DPOOptions
from t2i_align.objectives.links import LINKS, pair_losses
from t2i_align.objectives.picks import Picked
from t2i_align.protocols import LocalStats, Stats

VARIANTS: list[str | dict[str, Any]] = [
    *LINKS,
    {"type": "ipo", "form": "paper"},
    {"type": "sppo", "form": "paper"},
    {"type": "f_dpo", "divergence": "forward_kl"},
    {"type": "f_dpo", "divergence": "js"},
    {"type": "f_dpo", "divergence": "alpha", "alpha": 0.3},
    {"type": "alpha_dpo", "alpha": 0.4, "adaptive": False},
    {"type": "aot", "pairing": "unpaired"},
    {"type": "beta_dpo", "selection": "weigh"},
]
# -log sigmoid at heart: ln 2 where policy and reference are one
LN2 = ["aot", "beta_dpo", "cdpo", "cringe", "f_dpo", "rdpo", "sigmoid"]
# loss(u) - loss(-u), the pull of the label: a link of u alone
OF_U = ["alpha_dpo", "cdpo", "dmpo", "exo", "hinge", "ipo", "rdpo", "sigmoid", "todo"]
reward = st.floats(-6, 6)
rewards = st.lists(st.tuples(reward, reward), min_size=1, max_size=6)


def named(variant: str | dict[str, Any]) -> str:
    return variant if isinstance(variant, str) else "-".join(str(v) for v in variant.values())


class Frozen:
    """Statistics that do not move with the margins: what is detached is a constant."""

    def gather(self, x: Tensor) -> Tensor:
        return f64(0.4, -0.3, 1.1, 0.2, 2.0)

    def mean(self, x: Tensor) -> Tensor:
        return f64(0.55)[0]


def state_of(link: Picked) -> dict[str, Tensor]:
    return {k: v.double() for k, v in link.init_state().items()}


def losses(
    variant: str | dict[str, Any], u_w: Tensor, u_l: Tensor, stats: Stats, p: Tensor | None = None
) -> Tensor:
    link = Picked(LINKS, "link", variant)
    known = torch.linspace(0.4, -0.2, len(u_w), dtype=torch.float64)
    m = margins(u_w, u_l, preference=p, stats=stats, beta=0.5, reference=known)
    return pair_losses(link, m, state_of(link))[0]


# weights of pairs are constants to autograd, not to a finite difference: see the next test
SMOOTH = [v for v in VARIANTS if named(v) != "beta_dpo-weigh"]


@pytest.mark.parametrize("variant", SMOOTH, ids=named)
def test_gradients_by_finite_differences(variant: str | dict[str, Any]) -> None:
    u_w, u_l = f64(0.8, -0.3, 2.1, 0.2), f64(0.5, 0.4, -0.6, 0.9)
    p = f64(1.0, 0.5, 0.8, 1.0)
    wrapped = lambda a, b: losses(variant, a, b, Frozen(), p)  # noqa: E731
    assert torch.autograd.gradcheck(wrapped, (u_w.requires_grad_(), u_l.requires_grad_()))


def test_gradient_of_weighed_pairs() -> None:
    """dL_i/du_i = -(n v_i / sum v) b s(-b u_i); v and b = beta' / beta as the loss has them."""
    u = f64(0.8, -0.3, 0.1, 0.2).requires_grad_()
    link = {"type": "beta_dpo", "selection": "weigh", "inside": "reward"}
    losses(link, u, 0 * u.detach(), LocalStats()).sum().backward()
    a = u.detach()
    mean, std = a.mean() / 10, a.std() / 10
    v = torch.softmax(-0.5 * ((a - mean) / std).square(), 0)
    b = 1 + 0.6 * ((v * a).sum() - mean)
    torch.testing.assert_close(u.grad, -4 * v * b * torch.sigmoid(-b * a))


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_the_step_widens_the_margin_at_the_start(variant: str | dict[str, Any]) -> None:
    """Policy = reference: descent raises u_w - u_l."""
    u_w, u_l = f64(0.0, 0.0).requires_grad_(), f64(0.0, 0.0).requires_grad_()
    losses(variant, u_w, u_l, LocalStats()).sum().backward()
    assert u_w.grad is not None and u_l.grad is not None
    assert (u_l.grad - u_w.grad > 0).all()


@pytest.mark.parametrize("name", LN2)
def test_policy_equal_to_reference_costs_ln_2(name: str) -> None:
    """Whatever a link's parameters; cringe has half of two of them, rdpo (1 - 2e) / (1 - 2e)."""
    zero = f64(0.0, 0.0)
    assert losses(name, zero, zero, LocalStats()).tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize(
    ("divergence", "gap"),
    [("reverse_kl", 0.3), ("forward_kl", 0.1572016956), ("js", 0.1029763182)],
)
def test_gap_that_a_divergence_makes_of_the_rewards(divergence: str, gap: float) -> None:
    """The logit inside at rewards .8 and .5, from loss = log(1 + e^-gap).

    js: log s(.8) - log s(.5); forward KL: e^-.5 - e^-.8.
    """
    variant = {"type": "f_dpo", "divergence": divergence, "inside": "reward"}
    got = losses(variant, f64(0.8), f64(0.5), LocalStats()).item()
    assert -math.log(math.expm1(got)) == pytest.approx(gap, abs=1e-9)


def test_values_at_zero_of_the_others() -> None:
    """At u_w = u_l = 0.

    hinge 1; ipo 1/4; sppo 1/2; nca 2 ln 2; apo 1; exo and dmpo -ln 2 - ln(e (1 - e)) / 2;
    todo ln(1 + sqrt e) at alpha 1/2; alpha-DPO with p = 1/2 and a = .9999 / 2.
    """
    half = lambda e: -math.log(2) - math.log(e * (1 - e)) / 2  # noqa: E731
    a = 0.9999 / 2
    expected = {
        "alpha_dpo": (0.5**a - (1 - a) - a / 2) / (a * (a - 1)),
        "apo_down": 1.0,
        "apo_zero": 1.0,
        "dmpo": half(0.01),
        "exo": half(0.001),
        "hinge": 1.0,
        "ipo": 0.25,
        "nca": 2 * math.log(2),
        "sppo": 0.5,
        "todo": math.log(1 + math.exp(0.5)),
    }
    assert sorted([*expected, *LN2]) == sorted(LINKS)  # none is left out
    for name, value in expected.items():
        got = losses(name, f64(0.0), f64(0.0), LocalStats()).item()
        assert got == pytest.approx(value, abs=1e-7), name


@settings(deadline=None, max_examples=30)
@given(rewards, reward)
def test_links_of_the_margin_do_not_see_a_common_shift(
    values: list[tuple[float, float]], shift: float
) -> None:
    u_w, u_l = (torch.tensor(x, dtype=torch.float64) for x in zip(*values, strict=True))
    for name in OF_U:
        there = losses(name, u_w, u_l, Frozen())
        torch.testing.assert_close(losses(name, u_w + shift, u_l + shift, Frozen()), there)


@settings(deadline=None, max_examples=30)
@given(rewards)
def test_log_sigmoid_links_are_antisymmetric(values: list[tuple[float, float]]) -> None:
    """-log s(u) + log s(-u) = -u: swapping winner and loser changes the loss by the logit.

    cDPO's by 1 - 2e of it, rDPO's by 1 / (1 - 2e).
    """
    u_w, u_l = (torch.tensor(x, dtype=torch.float64) for x in zip(*values, strict=True))
    for name, slope in (("sigmoid", 1.0), ("cdpo", 0.8), ("rdpo", 1 / 0.8)):
        there, back = losses(name, u_w, u_l, LocalStats()), losses(name, u_l, u_w, LocalStats())
        torch.testing.assert_close(back - there, slope * (u_w - u_l))


@settings(deadline=None, max_examples=30)
@given(rewards)
def test_floors(values: list[tuple[float, float]]) -> None:
    """What is said to be bounded below is: no link but rdpo falls under 0."""
    u_w, u_l = (torch.tensor(x, dtype=torch.float64) for x in zip(*values, strict=True))
    for name, row in LINKS.items():
        got = losses(name, 5 * u_w, 5 * u_l, Frozen())
        assert not row.bounded_below or (got >= -1e-12).all(), name


@settings(deadline=None, max_examples=20)
@given(rewards)
def test_losses_do_not_depend_on_the_order_of_pairs(values: list[tuple[float, float]]) -> None:
    u_w, u_l = (torch.tensor(x, dtype=torch.float64) for x in zip(*values, strict=True))
    back = torch.arange(len(values) - 1, -1, -1)
    for variant in VARIANTS:
        if variant == "aot":
            continue  # its reference margins would have to be turned round as well
        there = losses(variant, u_w, u_l, LocalStats())
        reverse = losses(variant, u_w[back], u_l[back], LocalStats())
        torch.testing.assert_close(reverse.sum(), there.sum(), msg=named(variant))


BATCHED: list[tuple[dict[str, Any], str]] = [
    ({"link": "beta_dpo"}, "beta_dpo/mean"),
    ({"link": {"type": "beta_dpo", "selection": "weigh"}}, "beta_dpo/std"),
    ({"link": "alpha_dpo"}, ""),
    ({"weight": {"type": "noise_em", "decay": 0.5}}, "noise_em/rate"),
    ({"weight": {"type": "smpo"}}, "smpo/max"),
]


@pytest.mark.parametrize(("options", "key"), BATCHED)
def test_two_ranks_with_half_a_batch_each_are_one_with_all(
    options: dict[str, Any], key: str
) -> None:
    """Loss, gradient and state, over three steps whose state is handed on."""
    torch.manual_seed(3)
    rho, values = torch.randn(3, 16, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    whole = three_steps(options, rho, values, LocalStats())
    share = [torch.tensor([0, 1, 2, 3, 8, 9, 10, 11]), torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])]
    work: Callable[[int, Stats], Any] = lambda rank, stats: three_steps(  # noqa: E731
        options, rho[:, share[rank]], values[:, share[rank]], stats
    )
    halves = on_ranks(work)
    for step, (out, gradient) in enumerate(whole):
        parts = [half[step] for half in halves]
        per_pair = torch.cat([part.per_example for part, _ in parts])
        torch.testing.assert_close(per_pair, out.per_example, atol=1e-6, rtol=1e-6)
        for rank, (part, own) in enumerate(parts):
            # each rank averages over half as many pairs
            torch.testing.assert_close(own / 2, gradient[share[rank]], atol=1e-6, rtol=1e-6)
            for name, value in part.state.items():
                torch.testing.assert_close(value, out.state[name])
        assert not key or key in out.state
    alone = three_steps(options, rho[:, share[0]], values[:, share[0]], LocalStats())
    gaps = [a.per_example - w.per_example[:4] for (a, _), (w, _) in zip(alone, whole, strict=True)]
    assert torch.stack(gaps).abs().max() > 1e-4  # without the other rank it is another loss


def three_steps(
    options: dict[str, Any], rho: Tensor, values: Tensor, stats: Stats
) -> list[tuple[LossOutput, Tensor]]:
    """Outputs and gradients of three micro-batches in a row."""
    from dataclasses import replace

    objective = DPO(DPOOptions(beta=2.0, **options))
    state, out = objective.init_state(), []
    for step in range(len(rho)):
        logp = rho[step].clone().requires_grad_()
        batch = pairs(tokens(logp), tokens(torch.zeros_like(logp)))
        one = objective(replace(batch, values=values[step]), state, stats)
        (gradient,) = torch.autograd.grad(one.loss, logp)
        out.append((one, gradient))
        state = one.state
    return out
