"""The stock pipeline as the oracle: its pictures, and every step of its loop."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.latents import PACKINGS
from t2i_align.process.seeds import generator as rng

if TYPE_CHECKING:
    from tests.backbones import Case

PROMPTS = ["a cat", "a much longer prompt about two dogs and a red umbrella on a boat"]
SEEDS = torch.tensor([3, 4])  # of the prompts' noise


def packed(g: DiffusersGenerator, latent: Tensor) -> Any:
    """Model latents as the pipeline keeps them (lists are a matter of its denoiser call only)."""
    if g.layout.packing == "list":
        return latent
    return PACKINGS[g.layout.packing].pack(latent, g.config)


def unpacked(g: DiffusersGenerator, latent: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`packed`."""
    if g.layout.packing == "list":
        return latent
    return PACKINGS[g.layout.packing].unpack(latent, shape, g.config)


def apart(g: DiffusersGenerator) -> bool:
    """Mates would pad a prompt and nothing masks it, so the pipeline is asked prompt by prompt."""
    return g.layout.alone and g.layout.ragged


def stock(
    case: Case, g: DiffusersGenerator, latent: Tensor, num_steps: int, guidance: float
) -> Any:
    """What the stock pipeline makes of the same prompts and noise."""
    if not apart(g):
        return stock_batch(case, g, latent, num_steps, guidance, PROMPTS)
    each = zip(latent.split(1), PROMPTS, strict=True)
    return torch.cat([stock_batch(case, g, x, num_steps, guidance, [p]) for x, p in each])


def stock_batch(
    case: Case,
    g: DiffusersGenerator,
    latent: Tensor,
    num_steps: int,
    guidance: float,
    prompts: list[str],
) -> Any:
    """One call of the stock pipeline."""
    size = g.size
    call: dict[str, Any] = {
        "prompt": list(prompts),  # a pipeline may write into it
        "height": size.height,
        "width": size.width,
        "num_inference_steps": num_steps,
        "latents": packed(g, latent) if case.packs else latent,
        "output_type": "pt",
        **case.call,
    }
    if "generator" in inspect.signature(g.pipe.scheduler.step).parameters:  # it may draw noise
        seeds = [int(SEEDS[PROMPTS.index(p)]) for p in prompts]
        call["generator"] = [rng(seed + 1) for seed in seeds]
    if g.layout.media == "video":
        call["num_frames"] = size.num_frames
    if case.guidance_arg is not None:
        call[case.guidance_arg] = guidance if guidance > 1 else case.no_guidance
    else:
        g.pipe.guider = g.pipe.guider.new(guidance_scale=guidance)
    if case.negative is not None and guidance > 1:
        call["negative_prompt"] = [case.negative] * len(prompts)
    output = g.pipe(**call)
    found = output.frames if g.layout.media == "video" else output.images
    return found.transpose(1, 2) if g.layout.media == "video" else found


@dataclass(frozen=True)
class Step:
    """What a pipeline hands its scheduler.

    Args:
        prediction: of the network, guided.
        time: the scheduler's.
        x_t: the latents as the network saw them.
        sigma: their noise level in the scheduler's own tables.
    """

    prediction: Tensor
    time: Tensor
    x_t: Tensor
    sigma: Tensor


def sigma_now(scheduler: Any, time: Tensor) -> Tensor:
    """Sigma of a scheduler's next step, variance preserving or rectified."""
    if not hasattr(scheduler, "sigmas"):
        return (1 - scheduler.alphas_cumprod[time.long()]).sqrt()
    sigma = torch.as_tensor(scheduler.sigmas[scheduler.step_index or 0]).double()
    name = type(scheduler).__name__
    flow = name.startswith(("FlowMatch", "FlowMap")) or scheduler.config.get("use_flow_sigmas")
    return sigma if flow else sigma / (1 + sigma.square()).sqrt()  # of unit signal otherwise


@contextmanager
def steps_of(pipe: Any) -> Iterator[list[Step]]:
    """Every step a pipeline takes."""
    seen: list[Step] = []
    scheduler = pipe.scheduler
    original = scheduler.step

    def step(model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        scaled = sample.clone()
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(scaled, timestep)
        time = torch.as_tensor(timestep)
        seen.append(Step(model_output.clone(), time, scaled, sigma_now(scheduler, time)))
        return original(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = step
    try:
        yield seen
    finally:
        del scheduler.step


def loop(case: Case, g: DiffusersGenerator, noise: Tensor, guidance: float) -> list[Step]:
    """The pipeline's four steps for both prompts, however many calls that takes."""
    with steps_of(g.pipe) as steps:
        stock(case, g, noise, 4, guidance)
    num = len(steps) // (len(PROMPTS) if apart(g) else 1)
    same = [steps[i::num] for i in range(num)]
    return [
        replace(
            each[0],
            prediction=torch.cat([s.prediction for s in each]),
            x_t=torch.cat([s.x_t for s in each]),
        )
        for each in same
    ]
