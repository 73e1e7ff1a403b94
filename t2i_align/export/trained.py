"""What a run trained: its recipe, one of its checkpoints, and the network to put it into."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.generators.adapters import AdaptOptions
from t2i_align.recipe import Recipe, noted_recipe
from t2i_align.train.checkpoint import Checkpoints, verify
from t2i_align.train.output import RUN_FILE, recipe_in

PLAIN = {
    "gradient_checkpointing": False,
    "quantization": None,
    "attention": "sdpa",
    "offload_frozen": False,
}
ROUND = re.compile(r"round-\d+")


@dataclass(frozen=True)
class Trained:
    """A run's trained weights.

    Args:
        folder: the run's ``output_dir``.
        recipe: as it was resolved.
        checkpoint: folder of the weights.
        averaged: whether these are the averaged ones.
        weights: trained parameters by name.
    """

    folder: Path
    recipe: Recipe
    checkpoint: Path
    averaged: bool
    weights: dict[str, Tensor]

    @property
    def options(self) -> AdaptOptions:
        """The recipe's ``model`` section."""
        return self.recipe.model

    @property
    def type(self) -> str:
        """The generator's name in the table."""
        return str(self.options.model_dump(include={"type"})["type"])

    def generator(self, device: str) -> Any:
        """The run's generator, its network loaded as it was before training.

        What only made training faster or smaller is left out: an adapter is the same without, and
        nothing can be merged into quantised weights.

        Args:
            device: ``meta`` builds the network without weights.
        """
        changes = {k: v for k, v in PLAIN.items() if k in type(self.options).model_fields}
        options = self.options.model_copy(update=changes)
        made = self.recipe.chosen("model")(options, device)
        made.load_module(self.recipe.seed, reference=False)
        return made


def open_run(
    name: Path, which: str = "latest", averaged: bool | None = None, model: str | None = None
) -> Trained:
    """Find what a run trained.

    Args:
        name: its ``output_dir``; of a run in rounds, the last round counts.
        which: ``latest`` or the number of a step.
        averaged: the averaged weights or the last ones; None: averaged where the run averages.
        model: base model instead of the recipe's, where that has moved.

    Raises:
        ModelError: no run, no good checkpoint, or no averaged weights in it.
    """
    from safetensors.torch import load_file

    folder = last_round(name.expanduser())
    if not (folder / RUN_FILE).is_file():
        raise ModelError(
            f"no run of t2i-align in '{name}' (no {RUN_FILE} there)",
            "give the output_dir of t2i-align train, or an adapter file with --model",
        )
    recipe = noted_recipe(recipe_in(folder / RUN_FILE), str(folder / RUN_FILE))
    if model is not None:
        options = recipe.model.model_copy(update={"name_or_path": model})
        recipe = recipe.model_copy(update={"model": options})
    checkpoint = find_checkpoint(folder, which)
    has_average = (checkpoint / "ema.safetensors").is_file()
    if averaged and not has_average:
        raise ModelError(
            f"--ema: {checkpoint.name} holds no averaged weights",
            "leave --ema out, or train with train.ema_decay",
        )
    use = has_average if averaged is None else averaged
    weights = load_file(checkpoint / f"{'ema' if use else 'weights'}.safetensors")
    return Trained(folder, recipe, checkpoint, use, weights)


def last_round(folder: Path) -> Path:
    """The last round's folder of a run in rounds, else the folder itself."""
    if (folder / RUN_FILE).is_file() or not folder.is_dir():
        return folder
    rounds = [p for p in folder.iterdir() if ROUND.fullmatch(p.name) and (p / RUN_FILE).is_file()]
    return max(rounds, key=lambda p: p.name, default=folder)


def find_checkpoint(folder: Path, which: str) -> Path:
    """A verified checkpoint of a run.

    Raises:
        ModelError: there is no good one, or none of that step.
    """
    known = Checkpoints(folder / "checkpoints", None).all()
    steps = {int(p.name.removeprefix("step-")): p for p in known}
    if which == "latest":
        good = next((p for p in reversed(known) if not verify(p)), None)
        if good is None:
            raise ModelError(f"no good checkpoint in '{folder}'", "train, or give another run")
        return good
    found = steps.get(int(which)) if which.isdigit() else None
    if found is None:
        there = ", ".join(str(s) for s in steps) or "none"
        raise ModelError(f"--checkpoint: no step '{which}'; there are {there}", "or use latest")
    problem = verify(found)
    if problem:
        raise ModelError(f"--checkpoint: {found.name}: {problem}", "use another step")
    return found


def put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy trained values into a network.

    Raises:
        ModelError: the network has other parameters.
    """
    own = dict(module.named_parameters())
    odd = sorted(k for k, v in weights.items() if k not in own or own[k].shape != v.shape)
    if odd:
        there = tuple(own[odd[0]].shape) if odd[0] in own else None
        raise ModelError(
            f"the run trained {odd[0]} {tuple(weights[odd[0]].shape)}, the base model has {there}",
            "give the base model of the run with --model",
        )
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
