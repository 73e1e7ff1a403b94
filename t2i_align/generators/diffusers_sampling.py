"""A pipeline's own sampling loop, from captured conditioning and its configured scheduler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t2i_align.contract import SamplingInputs, TensorDict
from t2i_align.generators.guidance import StepGuidance
from t2i_align.process.seeds import generator as rng

Predict = Callable[[Tensor, Tensor, TensorDict], Tensor]


def both_branches(
    predict: Predict, x: Tensor, t: Tensor, inputs: SamplingInputs, *, batched: bool
) -> tuple[Tensor, Tensor]:
    """Predictions (unconditional, conditional), as one batch or two calls."""
    assert inputs.negative is not None
    if batched:
        cond = {k: torch.cat([inputs.negative[k], v]) for k, v in inputs.cond.items()}
        uncond, found = predict(torch.cat([x, x]), t.expand(2 * len(x)), cond).chunk(2)
        return uncond, found
    found = predict(x, t.expand(len(x)), inputs.cond)
    return predict(x, t.expand(len(x)), inputs.negative), found


def stepper(scheduler: Any, noise_seeds: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The scheduler's step ``(prediction, time, x) -> x``.

    CogVideoX's DPM scheduler leaves it to the loop to remember the last data estimate and its time.

    Args:
        scheduler: configured.
        noise_seeds: ``(B,)``; its noise follows from them.
    """
    known = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"return_dict": False}
    if "generator" in known:
        extra["generator"] = [rng(s + 1) for s in noise_seeds.tolist()]
    if "old_pred_original_sample" not in known:
        return lambda pred, t, x: scheduler.step(pred, t, x, **extra)[0]
    last: dict[str, Any] = {"estimate": None, "t": None}

    def step(pred: Tensor, t: Tensor, x: Tensor) -> Tensor:
        x, estimate = scheduler.step(pred, last["estimate"], t, last["t"], x, **extra)
        last.update(estimate=estimate, t=t)
        return x

    return step


@torch.no_grad()
def sample(
    predict: Predict,
    x: Tensor,
    noise_seeds: Tensor,
    inputs: SamplingInputs,
    guidance: StepGuidance,
) -> Tensor:
    """Denoise unit noise to model latents.

    Args:
        predict: ``(x, time, cond) -> prediction`` in the scheduler's convention.
        x: unit noise ``(B, *L)``.
        noise_seeds: ``(B,)``; a stochastic scheduler's noise follows from them.
        inputs: prompts and the scheduler as the pipeline set it.
        guidance: joins the branches.
    """
    scheduler = copy.deepcopy(inputs.plan)
    if hasattr(scheduler, "init_noise_sigma"):
        x = x * scheduler.init_noise_sigma
    step = stepper(scheduler, noise_seeds)
    batched = guidance.layout.branches == "uncond_first"
    num = len(scheduler.timesteps)
    for i, t in enumerate(scheduler.timesteps):
        t = t.to(x.device)
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if inputs.negative is None:
            pred = predict(x_in, t.expand(len(x)), inputs.cond)
        else:
            branches = both_branches(predict, x_in, t, inputs, batched=batched)
            pred = guidance(branches, i, num, t).to(branches[0].dtype)
        x = step(pred, t, x)
    return x
