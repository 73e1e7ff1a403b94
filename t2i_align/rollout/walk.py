r"""Walking a denoiser's grid of levels with a noisy kernel, so that every step has a likelihood.

    (1)  x_{i+1} = mu(x_i, prediction_i) + n_i xi_i,    kernels in process/transition.py

The grid is that of the pipeline's own scheduler (times repeated by multistep schedulers once), or
equal steps of the canonical level where a family has none. It ends where the scheduler's own does:
at time 0 (``set_alpha_to_one: false``, SD1.5 and SDXL: the last step is noisy too), else at the
data, a step without noise and so without a likelihood.

States are rounded to the dtype they are kept in before anything else sees them, and old likelihoods
are those of the rounded ones, so scoring a kept transition again starts from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from t2i_align.contract import Event, Rollout, Sample, Score, TensorDict, map_dict
from t2i_align.errors import ModelError
from t2i_align.generators.scoring import DETACH, SAME
from t2i_align.process.convert import Prediction
from t2i_align.process.kernels import FLOW_ONLY, Form, Kernel
from t2i_align.process.schedule import Process, Rectified
from t2i_align.process.seeds import derive, normals, uniform01
from t2i_align.process.transition import (
    Coefficients,
    Level,
    coefficients,
    density,
    log_prob,
    probe,
    step_inputs,
    step_mean,
)

Scorer = Callable[[Event, frozenset[str]], Score]
"""Scores an event under the sampled view, guided as the rollout is."""


@dataclass(frozen=True)
class Grid:
    """Times of N steps and the levels they start from and end at.

    Args:
        times: ``(N,)`` the model's own, falling.
        lam: ``(N + 1,)`` canonical levels.
        alpha: ``(N + 1,)`` float64.
        sigma: ``(N + 1,)`` float64.
    """

    times: Tensor
    lam: Tensor
    alpha: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        """How many steps, N."""
        return len(self.times)


def sampled_process(process: Process, plan: Any) -> Process:
    """The process as a sampler runs it.

    A network that is told the level s before the warp, sigma = k s / (1 + (k - 1) s), has a k of
    its own for each size (CogView4), and what is sampled may have another than what is stored. At
    any step of the sampler k = sigma (1 - s) / (s (1 - sigma)).

    Args:
        process: of the generator.
        plan: a diffusers scheduler with its timesteps set, or None.
    """
    if plan is None or not isinstance(process, Rectified) or not process.told_level:
        return process
    s = torch.as_tensor(plan.timesteps).double().cpu() / process.time_scale
    sigma = torch.as_tensor(plan.sigmas).double().cpu()[: len(s)]
    k = sigma * (1 - s) / (s * (1 - sigma))
    inside = (s < 1) & (sigma < 1)
    return replace(process, shift=float(k[inside].mean())) if bool(inside.any()) else process


def grid_of(process: Process, num_steps: int, plan: Any) -> Grid:
    """The grid of a scheduler, or of the process alone.

    Args:
        process: of the generator.
        num_steps: N where there is no scheduler.
        plan: a diffusers scheduler with its timesteps set, or None.
    """
    if plan is None:
        times = process.time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1])
    else:
        times = torch.as_tensor(plan.timesteps).cpu().unique(sorted=True).flip(0)
        if not isinstance(process, Rectified):
            times = times.round().long()
    clean = plan is None or plan.config.get("set_alpha_to_one", True)
    end = process.coefficients(torch.zeros_like(times[:1]))
    lam = process.level(torch.zeros_like(times[:1]))
    if clean or times[-1] == 0:
        end, lam = (torch.ones(1), torch.zeros(1)), torch.zeros(1)
    alpha, sigma = (
        torch.cat([a, b]).double()
        for a, b in zip(process.coefficients(times), end, strict=True)
    )  # fmt: skip
    return Grid(times, torch.cat([process.level(times), lam]).float(), alpha, sigma)


class Steps:
    """Every step of a grid under a kernel, as numbers.

    Args:
        process: of the generator.
        grid: its levels.
        kernel: of the noise.
        amount: how much of it.
        form: of the log-density.

    Raises:
        ModelError: a kernel of flow models on another process.
    """

    def __init__(
        self, process: Process, grid: Grid, kernel: Kernel, amount: float, form: Form
    ) -> None:
        """Compute them in float64, keep them in float32."""
        if kernel in FLOW_ONLY and not isinstance(process, Rectified):
            raise ModelError(
                f"rollout.kernel: {kernel} is a step of rectified flows, and this model is none",
                "use ddim, ddpm or cps",
            )
        self.process, self.grid = process, grid
        now = Level(grid.alpha[:-1], grid.sigma[:-1])
        step = coefficients(kernel, amount, now, Level(grid.alpha[1:], grid.sigma[1:]))
        self.noisy = step.std > 0
        scale, offset = (torch.full_like(step.std, torch.nan) for _ in range(2))
        scale[self.noisy], offset[self.noisy] = density(step.std[self.noisy], form)
        self.table = step_inputs(now, step, None)
        self.table |= {"scale": scale.float(), "offset": offset.float()}

    def inputs(self, step: Tensor, device: torch.device) -> TensorDict:
        """An event's ``inputs`` for step numbers of any shape."""
        return map_dict(self.table, lambda x: x[step].to(device))

    def event(
        self,
        step: Tensor,
        x_t: Tensor,
        x_next: Tensor,
        cond: TensorDict,
        *,
        same: Tensor | None = None,
        detach: bool = False,
    ) -> Event:
        """Transitions to be scored.

        Args:
            step: ``(B, S)`` step numbers, int64 on the CPU.
            x_t: ``(B, S, *L)``.
            x_next: ``(B, S, *L)``.
            cond: ``(B, ...)``.
            same: ``(B,)`` first item with the same state, see generators/scoring.py.
            detach: no gradient through the unconditional branch.

        Raises:
            ValueError: a step without noise has no likelihood.
        """
        if not bool(self.noisy[step].all()):
            raise ValueError("a step with standard deviation 0 has no likelihood; leave it out")
        inputs = self.inputs(step, x_t.device)
        if same is not None:
            inputs[SAME] = same.to(x_t.device)
        if detach:
            inputs[DETACH] = torch.ones(len(step), dtype=torch.bool)
        return Event(
            kind="transition",
            cond=cond,
            mask=torch.ones_like(step, dtype=torch.bool).to(x_t.device),
            x_t=x_t,
            time=self.grid.times[step].to(x_t.device),
            lam=self.grid.lam[step].to(x_t.device),
            x_next=x_next,
            inputs=inputs,
        )


@dataclass(frozen=True)
class Draws:
    """Randomness of a batch of prompts: a function of (run seed, prompt, visit, stream).

    Args:
        run_seed: of the run.
        ids: names the B prompts.
        visits: how often each was sampled before.
    """

    run_seed: int
    ids: Sequence[str]
    visits: Sequence[int]

    def _seeds(self, stream: str) -> list[int]:
        pairs = zip(self.ids, self.visits, strict=True)
        return [derive(self.run_seed, name, visit, f"rollout/{stream}") for name, visit in pairs]

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """``(B, *shape)`` standard normal, on the CPU."""
        return normals(torch.tensor(self._seeds(stream)), shape)

    def uniform(self, stream: str) -> Tensor:
        """``(B,)`` float64 in [0, 1)."""
        pairs = zip(self.ids, self.visits, strict=True)
        rows = [uniform01(self.run_seed, n, v, f"rollout/{stream}") for n, v in pairs]
        return torch.tensor(rows, dtype=torch.float64)

    def choice(self, stream: str, num: int) -> Tensor:
        """``(B,)`` int64, uniform in [0, num)."""
        return (self.uniform(stream) * num).long().clamp(max=num - 1)


@dataclass(frozen=True)
class Walk:
    """One sampler: predicts, proposes, steps.

    Args:
        steps: of the grid.
        scorer: the sampled view.
        prediction: what the network predicts.
        dtype: in which states are kept.
        device: where they are computed.
    """

    steps: Steps
    scorer: Scorer
    prediction: Prediction
    dtype: torch.dtype
    device: torch.device

    def kept(self, x: Tensor) -> Tensor:
        """A state as it will be read again, float32 on the device."""
        return x.to(self.dtype).float().to(self.device)

    def predict(self, i: int, x: Tensor, cond: TensorDict) -> tuple[Tensor, Tensor]:
        """``(prediction, x_0)`` at step i, ``(B, *L)`` each."""
        time = self.steps.grid.times[i].expand(len(x))
        score = self.scorer(probe(self.steps.process, x, time, cond), frozenset({"pred", "mean"}))
        assert score.pred is not None and score.mean is not None
        return score.pred[:, 0], score.mean[:, 0]

    def _numbers(self, i: int, num: int) -> TensorDict:
        return self.steps.inputs(torch.full((num, 1), i), self.device)

    def mean(self, i: int, x: Tensor, pred: Tensor) -> Tensor:
        """Where step i leads without its noise, ``(B, *L)``."""
        n = self._numbers(i, len(x))
        now = Level(n["alpha"], n["sigma"])
        step = Coefficients(n["to_x0"], n["to_eps"], n["std"])
        return step_mean(self.prediction, pred[:, None], x[:, None], now, step)[:, 0]

    def step(self, i: int, mean: Tensor, noise: Tensor) -> Tensor:
        """Eq. (1), as kept; ``(B, *L)``."""
        return self.kept(mean + self.steps.table["std"][i].item() * noise.to(mean.device))

    def logp(self, i: int, x_next: Tensor, mean: Tensor) -> Tensor:
        """Log-density of a step, ``(B,)``."""
        n = self._numbers(i, len(x_next))
        return log_prob(x_next[:, None], mean[:, None], n["scale"], n["offset"])[:, 0]


def trajectories(
    walk: Walk, cond: TensorDict, draws: Draws, shape: Sequence[int], which: int, first: int
) -> Rollout:
    """One whole trajectory of each prompt.

    Args:
        walk: the sampler.
        cond: ``(B, ...)``.
        draws: randomness.
        shape: of a latent.
        which: number of the trajectory, so that a prompt may have several.
        first: first step that is kept.

    Returns:
        The end, an event of the kept noisy steps ``(B, S)``, and its score when sampled.
    """
    x = walk.kept(draws.normal(f"start/{which}", shape))
    numbers: list[int] = []
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(len(walk.steps.grid)):
        pred, _ = walk.predict(i, x, cond)
        mean = walk.mean(i, x, pred)
        after = walk.step(i, mean, draws.normal(f"step{i}/{which}", shape))
        if i >= first and bool(walk.steps.noisy[i]):
            numbers.append(i)
            kept.append((x, after, walk.logp(i, after, mean)))
        x = after
    sample = Sample({"x0": x}, cond)
    if not kept:
        return Rollout(sample)
    step = torch.tensor([numbers] * len(x))
    x_t, x_next, logp = (torch.stack([row[k] for row in kept], 1) for k in range(3))
    event = walk.steps.event(step, x_t, x_next, cond)
    dims = torch.full_like(event.mask, x[0].numel(), dtype=torch.int64)
    return Rollout(sample, event, Score("transition", logp, event.mask, dims, "mean"))
