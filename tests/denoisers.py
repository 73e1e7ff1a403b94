"""A tiny denoiser with adapters and an event to score: what tests of ways to train begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_align.contract import DrawSpec, Event, Seeds
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from tests.tiny import pipeline_folder

PROMPTS = ["a cat", "a much longer prompt about two dogs and a red umbrella on a boat"]
SEEDS = torch.tensor([3, 4])


def folders(where: Path, *families: str) -> dict[str, Path]:
    """Tiny pipelines by family."""
    return {name: pipeline_folder(name, where / name) for name in families}


def generator(folder: Path, *, reference_mode: str = "auto", **model: Any) -> DiffusersGenerator:
    """Policy loaded, reference where there are adapters."""
    options = {"name_or_path": str(folder), "resolution": 64, **model}
    made = DiffusersGenerator(DiffusersOptions.model_validate(options))
    made.load_module(0, reference="lora" in model, reference_mode=reference_mode)
    return made


def event(g: DiffusersGenerator) -> Event:
    """Two random latents under two prompts at two levels."""
    torch.manual_seed(5)
    states = [{"x0": torch.randn(4, 8, 8)} for _ in PROMPTS]
    meta = {"original_size": (100, 80), "crop_top_left": (3, 5), "target_size": (64, 64)}
    sample = g.assemble(states, g.encode_prompts(PROMPTS), [meta, meta])
    return g.draw(sample, DrawSpec(), Seeds(SEEDS, SEEDS + 100))


def errors(g: DiffusersGenerator, drawn: Event, view: Any = "policy") -> Tensor:
    """Denoising errors ``(B, 1)`` under a view."""
    error = g.score(drawn, view).error
    assert error is not None
    return error


def train_adapters(g: DiffusersGenerator, by: float = 0.05) -> None:
    """Move every adapter weight off its start, by a fixed amount."""
    with torch.no_grad():
        for name, p in g.module.named_parameters():
            if "lora_" in name:
                p.add_(by * torch.linspace(-1, 1, p.numel()).view_as(p))


def reloaded_images(folder: Path, adapter: str, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures of the stock pipeline, without and with an adapter by ``load_lora_weights``."""
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text())
    absent: dict[str, Any] = {k: None for k, v in index.items() if v == [None, None]}
    pipe: Any = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS, "height": 64, "width": 64, "num_inference_steps": 2}
    drawn = []
    for load in (False, True):
        if load:
            pipe.load_lora_weights(adapter)
        drawn.append(pipe(**call, guidance_scale=1.0, latents=latents, output_type="pt").images)
    return drawn[0], drawn[1]


def our_images(g: DiffusersGenerator) -> tuple[Tensor, Tensor]:
    """Starting noise, and the pictures our own rollout of the policy makes of it."""
    from t2i_align.process.seeds import normals

    inputs = g.prepare_sampling(PROMPTS, num_steps=2, guidance=1.0)
    with torch.no_grad():
        rollout = g.rollout(inputs, SEEDS, "policy")
        images = [m.data for m in g.decode(rollout.sample)]
    return normals(SEEDS, inputs.shape), torch.stack(images)
