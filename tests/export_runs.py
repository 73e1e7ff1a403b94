"""Finished runs without the training: a claimed folder and a checkpoint of random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.process.seeds import normals
from t2i_align.recipe import load_recipe
from t2i_align.train import output
from t2i_align.train.checkpoint import Checkpoints, TrainState
from tests import runs

PROMPTS = ["a cat", "two dogs and a red umbrella on a boat"]
SEEDS = torch.tensor([3, 4])
CALL = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 64}


@dataclass
class Made:
    """A run's folder and the generator that holds the same weights."""

    folder: Path
    generator: Any


def randomise(module: nn.Module, seed: int = 5) -> dict[str, Tensor]:
    """Fill what is trained with numbers large enough to see; returns copies by name."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            noise = torch.randn(p.shape, generator=draws)
            if "lora_A" in name or "lora_B" in name:
                p.copy_(0.25 * noise)
            else:  # magnitudes of DoRA, or the weights themselves
                p.add_(0.2 * noise * p.abs())
    trained = ((k, p) for k, p in module.named_parameters() if p.requires_grad)
    return {k: p.detach().clone() for k, p in trained}


def make(
    folder: Path,
    model: Path,
    lora: Mapping[str, Any] | None,
    step: int = 3,
    section: Mapping[str, Any] | None = None,
) -> Made:
    """A run under ``folder``, of a diffusers pipeline unless ``section`` says another model."""
    given = {"name_or_path": str(model), **(section or {"resolution": 64})}
    sections: dict[str, Any] = {
        "model": given | ({"lora": dict(lora)} if lora else {}),
        "objective": {"type": "dpo", "beta": 500.0},
        "data": {"type": "pickapic", "path": str(folder / "pairs.parquet")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(runs.write_recipe(folder, "run", sections), run_checks=False)
    generator = recipe.chosen("model")(recipe.model)
    generator.load_module(0, reference=False)
    out = folder / "run"
    output.claim(out, recipe.to_dict(), resume=False, version="0")
    save(out, step, randomise(generator.module))
    return Made(out, generator)


def save(out: Path, step: int, weights: dict[str, Tensor], ema: Any = None) -> None:
    """One more checkpoint of a run."""
    state = TrainState(step, 8 * step, weights, {"state": {}, "param_groups": []}, {}, ema or {})
    Checkpoints(out / "checkpoints", None).save(state)


def ours(g: Any) -> Tensor:
    """The policy's images."""
    steps, guidance = CALL["num_inference_steps"], CALL["guidance_scale"]
    inputs = g.prepare_sampling(PROMPTS, num_steps=int(steps), guidance=guidance)
    return torch.stack([m.data for m in g.decode(g.rollout(inputs, SEEDS, "policy").sample)])


def theirs(pipe: Any) -> Tensor:
    """A stock pipeline's images of the same prompts and noise."""
    pipe.set_progress_bar_config(disable=True)
    latents = normals(SEEDS, (4, 8, 8)).to(pipe.dtype)
    return pipe(prompt=PROMPTS, latents=latents, output_type="pt", **CALL).images.float()
