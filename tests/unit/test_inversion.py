"""Inversion against worked numbers, and the events it makes; its order is a property test.

Toy of the worked numbers: a network that says e = .2 x, a reference .25 x, x_0 = 1 (winner) and -.5
(loser), the schedule of Stable Diffusion.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align.contract import (
    DrawSpec,
    Event,
    Inversion,
    LossOutput,
    ScoredBatch,
    Seeds,
)
from t2i_align.errors import ModelError
from t2i_align.objectives.inpo import InPO, InPOOptions
from t2i_align.objectives.smpo import SmPO, SmPOOptions
from t2i_align.process.convert import Prediction, to_x0_eps
from t2i_align.process.elbo import elbo_score
from t2i_align.process.inversion import (
    PATHS,
    Noises,
    Step,
    draw_inverted,
    exact_path,
    invert,
    released_path,
)
from t2i_align.process.schedule import VP, Process, Rectified, broadcast, noised
from t2i_align.protocols import LocalStats

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SD = VP((1 - BETAS).cumprod(0))
FLOW = Rectified(1000.0)
PAIR = torch.tensor([[1.0], [-0.5]])


def linear(factor: float, process: Process = SD) -> Noises:
    """A network that predicts ``factor x``."""
    return Noises(lambda x, time, cond: factor * x, process, "epsilon")


def inverted(x_0: Tensor, tau: list[int], how: Inversion) -> Tensor:
    """x at the end of the paths of the toy network."""
    path = PATHS[how.grid](SD, torch.tensor(tau), how.num_steps)
    return noised(x_0, invert(x_0, {}, path, linear(0.2), how, None), *path.end())


# -- the worked numbers ----------------------------------------------------------------------------


def test_schedule_of_the_vectors() -> None:
    want = {0: 0.99915, 1: 0.99829603, 101: 0.89298054, 250: 0.67379263, 999: 0.00466010}
    want |= {201: 0.75214340, 301: 0.58881870, 401: 0.42288152, 501: 0.27499907}
    for t, abar in want.items():
        assert SD.alphas_cumprod[t].item() == pytest.approx(abar, abs=5e-9)


@pytest.mark.parametrize(
    ("num", "starts"),
    [
        (10, [-99, 1, 101, 201, 301, 401, 501, 601, 701, 801]),
        (5, [-199, 1, 201, 401, 601]),
    ],
)
def test_v3a_released_grid(num: int, starts: list[int]) -> None:
    """A step from t goes to t + 1000 / n, taken while t is below the drawn level."""
    drawn = [0, 1, 2, 250, 301, 302, 999]
    path = released_path(SD, torch.tensor(drawn), num)
    assert path.time[0, :-1].tolist() == starts
    assert path.time[0, -1].item() == starts[-1] + 1000 // num
    assert path.num_steps.tolist() == [sum(s < tau for s in starts) for tau in drawn]


def test_v3b_states_of_the_released_path() -> None:
    """One call with four levels: every item stops on its own."""
    found = inverted(torch.ones(4, 1), [1, 50, 150, 250], Inversion(grid="released"))
    want = torch.tensor([1.00199994, 1.00540878, 0.96246165, 0.89021778])
    torch.testing.assert_close(found[:, 0], want, atol=1.5e-7, rtol=0)


def vector_loss(
    objective: Any, tau: int, values: Tensor | None = None
) -> tuple[Event, ScoredBatch, LossOutput]:
    """The toy pair through event, scores and objective."""
    how = objective.inversion
    level = (tau + 0.5) / 1000
    spec = DrawSpec(inversion=how, min_level=level, max_level=level + 1e-9)
    seeds = Seeds(torch.tensor([3, 3]), torch.tensor([5, 6]))
    event = draw_inverted(PAIR, {}, spec, seeds, linear(0.2))
    assert event.x_t is not None and event.time is not None
    assert event.time.flatten().tolist() == [tau, tau]
    x = event.x_t[:, 0]
    scores = {
        view: elbo_score(factor * x, event, frozenset())
        for view, factor in {"policy": 0.2, "reference": 0.25}.items()
    }
    one = torch.tensor([0]), torch.tensor([1]), torch.ones(1)
    batch = ScoredBatch(scores, *one, values=values, lam=event.lam)
    return event, batch, objective(batch, objective.init_state(), LocalStats())


@pytest.mark.parametrize(
    ("tau", "target_w", "u", "loss"),
    [(250, 0.12145598, 0.13160149, 0.62950975), (301, 0.19161883, 0.01448858, 0.68592913)],
)
def test_v3c_and_v3e_loss_of_the_released_path(
    tau: int, target_w: float, u: float, loss: float
) -> None:
    """At 250 the path ends at 301, beside the level of target and scores; at 301 they agree."""
    options = InPOOptions(beta=50.0, inversion_eta=0.0, inversion_grid="released")
    event, batch, out = vector_loss(InPO(options), tau)
    assert event.target is not None
    assert event.target.flatten().tolist() == pytest.approx([target_w, -target_w / 2], abs=2e-7)
    assert out.metrics["logits/std"].item() == pytest.approx(u, abs=2e-6)
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    if tau == 250:
        m, r = (batch.scores[view].error for view in ("policy", "reference"))
        assert m is not None and m.flatten().tolist() == pytest.approx(
            [0.00320215, 0.00080054], abs=1e-7
        )
        assert r is not None and r.flatten().tolist() == pytest.approx(
            [0.01022090, 0.00255522], abs=1e-7
        )


def test_v3f_deviation_of_the_fresh_noise() -> None:
    """Eta .1 on the steps from -99, 1, 101 and 201; and it is what a step adds to x."""
    path = released_path(SD, torch.tensor([250]), 10)
    want = [0.002065, 0.004098, 0.026096, 0.036179]
    for k, std in enumerate(want):
        ends = slice(k, k + 2)
        step = Step(path.time[:, ends], path.alpha[:, ends], path.sigma[:, ends])
        assert (0.1 * step.scatter * path.sigma[:, k + 1]).item() == pytest.approx(std, abs=5e-7)
    how = Inversion(eta=0.1, grid="released")
    one = released_path(SD, torch.tensor([1]), 10)
    fresh = torch.full((1, 10, 1), 2.0)
    x_0 = torch.ones(1, 1)
    ends = [
        noised(x_0, invert(x_0, {}, one, linear(0.2), how, z), *one.end()) for z in (None, fresh)
    ]
    assert (ends[1] - ends[0]).item() == pytest.approx(2 * 0.002065, abs=1e-6)


def test_v4c_renoise_on_the_released_path() -> None:
    how = Inversion(5, renoise=True, grid="released")
    found = inverted(torch.ones(3, 1), [1, 150, 250], how)
    want = torch.tensor([1.00200237, 0.96049627, 0.78800970])
    torch.testing.assert_close(found[:, 0], want, atol=2e-7, rtol=0)
    options = SmPOOptions(beta=50.0, inversion_steps=5, inversion_grid="released")
    values = torch.tensor([0.2150, 0.2080], dtype=torch.float64)
    event, _, out = vector_loss(SmPO(options), 250, values)
    assert event.target is not None
    assert event.target[0].item() == pytest.approx(-0.05749675, abs=2e-7)
    assert out.metrics["logits/std"].item() == pytest.approx(0.07288012, abs=1e-6)
    assert out.loss.item() == pytest.approx(0.65737091, abs=1e-6)


# -- events ----------------------------------------------------------------------------------------


def wavy(process: Process, prediction: Prediction) -> Noises:
    """A network that is neither linear nor blind to time and conditioning."""

    def predict(x: Tensor, time: Tensor, cond: Any) -> Tensor:
        level = process.level(time.clamp(min=0)).float()
        return torch.sin(2 * x) + broadcast(level * cond["c"], x)

    return Noises(predict, process, prediction)


CASES: list[tuple[Process, Prediction, Inversion]] = [
    (SD, "epsilon", Inversion(eta=0.1)),
    (SD, "v_prediction", Inversion(7, renoise=True, eta=0.3)),
    (SD, "epsilon", Inversion(eta=0.1, grid="released")),
    (SD, "v_prediction", Inversion(5, renoise=True, grid="released")),
    (FLOW, "velocity", Inversion(eta=0.1)),
    (Rectified(1000.0, 3.0), "velocity", Inversion(6, renoise=True)),
]


@pytest.mark.parametrize(("process", "prediction", "how"), CASES)
@pytest.mark.parametrize("shape", [(2,), (1, 2, 3), (1, 2, 3, 2)])
def test_a_batch_is_its_items(
    process: Process, prediction: Prediction, how: Inversion, shape: tuple[int, ...]
) -> None:
    """Any rank, every item at its own level, several draws: the batch changes nothing."""
    torch.manual_seed(1)
    x_0, cond = torch.randn(5, *shape), {"c": torch.arange(5.0)}
    seeds = Seeds(torch.arange(5) + 7, torch.arange(5) + 70)
    spec, noises = DrawSpec(num_draws=2, inversion=how), wavy(process, prediction)
    whole = draw_inverted(x_0, cond, spec, seeds, noises)
    assert whole.x_t is not None and whole.target is not None
    assert whole.x_t.shape == whole.target.shape == (5, 2, *shape)
    for i in range(5):
        one = slice(i, i + 1)
        part = draw_inverted(
            x_0[one], {"c": cond["c"][one]}, spec, Seeds(seeds.time[one], seeds.noise[one]), noises
        )
        assert part.x_t is not None and part.target is not None and part.time is not None
        torch.testing.assert_close(part.x_t[0], whole.x_t[i])
        torch.testing.assert_close(part.target[0], whole.target[i])
        assert whole.time is not None and torch.equal(part.time[0], whole.time[i])


@pytest.mark.parametrize(("process", "prediction", "how"), CASES)
def test_target_is_the_residual_of_x_t(
    process: Process, prediction: Prediction, how: Inversion
) -> None:
    """The target says (x_0, (x_t - alpha x_0) / sigma) at the drawn time, in the network's type."""
    torch.manual_seed(2)
    x_0, seeds = torch.randn(6, 3), Seeds(torch.arange(6), torch.arange(6))
    spec = DrawSpec(inversion=how, min_level=0.05)
    event = draw_inverted(x_0, {"c": torch.ones(6)}, spec, seeds, wavy(process, prediction))
    assert event.x_t is not None and event.target is not None and event.time is not None
    alpha, sigma = process.coefficients(event.time[:, 0])
    got_x0, eps = to_x0_eps(prediction, event.target[:, 0], event.x_t[:, 0], alpha, sigma)
    torch.testing.assert_close(got_x0, x_0, atol=2e-4, rtol=1e-4)
    want = (event.x_t[:, 0] - broadcast(alpha, x_0) * x_0) / broadcast(sigma, x_0)
    torch.testing.assert_close(eps, want, atol=2e-4, rtol=1e-4)
    assert event.lam is not None and torch.equal(event.lam, process.level(event.time))


def test_the_path_ends_at_the_drawn_level() -> None:
    """Exact: on every integer of the schedule. The mean number of steps is (n + 1) / 2."""
    tau = torch.arange(1000)
    path = exact_path(SD, tau, 10)
    alpha, sigma = path.end()
    assert torch.equal(torch.stack([alpha, sigma]), torch.stack(SD.coefficients(tau)))
    assert path.num_steps.float().mean().item() == pytest.approx(5.5, abs=0.01)
    beyond = released_path(SD, tau, 10)
    landed = beyond.time[0][beyond.num_steps]
    assert (landed[:902] - tau[:902]).min() == 0 and (landed[:902] - tau[:902]).max() == 99
    assert (landed[902:] == 901).all()  # and below the highest levels
    mean = beyond.num_steps.float().mean().item()
    assert mean == pytest.approx(5.5 + 0.9, abs=0.1)


@pytest.mark.parametrize("process", [SD, FLOW, Rectified(1000.0, 3.0)], ids=["sd", "flow", "sd3"])
@pytest.mark.parametrize("renoise", [False, True])
def test_nothing_breaks_at_the_smallest_levels(process: Process, renoise: bool) -> None:
    """The residual of a short path is the network's noise at the sample, however small sigma is."""
    kind: Prediction = "epsilon" if process is SD else "velocity"
    x_0, noises, cond = torch.tensor([[0.3], [-2.0]]), wavy(process, kind), {"c": torch.ones(2)}
    low = process.time(torch.tensor([0.0, 1e-9]))
    path = exact_path(process, low, 10)
    r = invert(x_0, cond, path, noises, Inversion(renoise=renoise), None)
    first = process.time(torch.tensor([0.0, 0.0]))
    slope = noises(x_0, first, cond)
    want = slope if process is SD else slope + x_0
    torch.testing.assert_close(r, want, atol=2e-2 if process is SD else 1e-6, rtol=0)
    spec = DrawSpec(inversion=Inversion(renoise=renoise, eta=0.1), max_level=1e-9)
    seeds = Seeds(torch.arange(2), torch.arange(2))
    event = draw_inverted(x_0, cond, spec, seeds, noises)
    assert event.x_t is not None and event.target is not None
    assert event.target.isfinite().all()
    assert (event.x_t[:, 0] - x_0).abs().max() < 0.1


def test_fresh_noise_is_the_items_own_and_has_the_right_size() -> None:
    """A silent network on x_0 = 0: r is the sum of what (4) adds, damped by w on the way.

    var' = w^2 var + (eta scatter)^2, over the steps; winner and loser share the level, not the
    noise.
    """
    how = Inversion(eta=0.5)
    spec = DrawSpec(inversion=how, min_level=0.6505, max_level=0.6506)
    silent = Noises(lambda x, time, cond: torch.zeros_like(x), SD, "epsilon")
    seeds = Seeds(torch.tensor([4, 4, 4]), torch.tensor([8, 9, 8]))
    event = draw_inverted(torch.zeros(3, 20_000), {}, spec, seeds, silent)
    assert event.target is not None and event.time is not None
    assert event.time.flatten().tolist() == [650] * 3
    r = event.target[:, 0]
    path, var = exact_path(SD, torch.tensor([650]), 10), 0.0
    for k in range(7):
        ends = slice(k, k + 2)
        step = Step(path.time[:, ends], path.alpha[:, ends], path.sigma[:, ends])
        var = step.kept.item() ** 2 * var + (0.5 * step.scatter.item()) ** 2
    assert r[0].std().item() == pytest.approx(math.sqrt(var), rel=0.02)
    assert torch.equal(r[0], r[2])
    assert abs(torch.corrcoef(r[:2])[0, 1].item()) < 0.03


def test_the_network_is_asked_only_for_items_on_their_way() -> None:
    """Rows predicted: the sum of the items' own steps; ReNoise doubles them; no gradient."""
    for how in (Inversion(), Inversion(renoise=True)):
        asked: list[int] = []

        def predict(x: Tensor, time: Tensor, cond: Any, asked: list[int] = asked) -> Tensor:
            asked.append(len(x))
            return 0.2 * x

        tau = torch.tensor([50, 950, 301])
        path = exact_path(SD, tau, 10)
        invert(torch.ones(3, 1), {}, path, Noises(predict, SD, "epsilon"), how, None)
        assert sum(asked) == (1 + 10 + 4) * (2 if how.renoise else 1)
        assert max(asked) == 3 and asked[-1] == 1


def test_who_inverted_is_on_the_event() -> None:
    seeds = Seeds(torch.arange(1), torch.arange(1))
    for view, depends in {"policy": True, "reference": False, "ema": True}.items():
        spec = DrawSpec(inversion=Inversion(view=view))  # type: ignore[arg-type]
        event = draw_inverted(torch.ones(1, 1), {}, spec, seeds, linear(0.2))
        assert event.depends_on_policy is depends


def test_released_grid_is_refused_on_flows() -> None:
    spec = DrawSpec(inversion=Inversion(grid="released"))
    seeds = Seeds(torch.arange(1), torch.arange(1))
    with pytest.raises(ModelError, match=r"inversion_grid: got 'released'.*\n.*exact"):
        draw_inverted(torch.ones(1, 1), {}, spec, seeds, linear(0.2, FLOW))


def test_a_network_of_another_shape_is_told() -> None:
    wide = Noises(lambda x, time, cond: torch.ones(len(x), 3), SD, "epsilon")
    path = exact_path(SD, torch.tensor([500]), 4)
    with pytest.raises(ValueError, match=r"predictions of shape \(1, 3\) for \(1, 2\)"):
        invert(torch.ones(1, 2), {}, path, wide, Inversion(4), None)
