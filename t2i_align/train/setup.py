"""What every run has before its parts are built: recipe, process group, folder, clock."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from rich.console import Console

import t2i_align
from t2i_align.checks_distributed import alone
from t2i_align.checks_model import distilled_warning, unfit_model
from t2i_align.errors import RecipeError
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.protocols import Generator
from t2i_align.recipe import Recipe
from t2i_align.train import output
from t2i_align.train.log import Phases


class Setup:
    """A claimed output folder and the processes that share it.

    Args:
        recipe: validated.
        console: for lines and progress.
        claim: False leaves the output folder alone, for what builds caches only.
    """

    def __init__(self, recipe: Recipe, console: Console, *, claim: bool = True) -> None:
        """Start accelerate and claim the folder."""
        self.recipe, self.console = recipe, console
        self.phases = Phases()
        self.folder = Path(recipe.output_dir).expanduser()
        minutes = recipe.train.distributed.timeout_minutes
        tracker = None if recipe.train.report_to == "none" else recipe.train.report_to
        self.accelerator = Accelerator(
            mixed_precision=recipe.train.mixed_precision,
            log_with=tracker,
            project_dir=str(self.folder),
            kwargs_handlers=[
                # other processes wait while the first builds the cache, which may take days
                InitProcessGroupKwargs(
                    timeout=timedelta(days=7) if minutes is None else timedelta(minutes=minutes)
                ),
                # buffers never change (eval mode); those of a quantised base are all its weights
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
        if found := alone(recipe, self.accelerator.num_processes):
            raise RecipeError(found)
        self.main = self.accelerator.is_main_process
        resume = recipe.train.resume_from_checkpoint is not None
        if self.main and claim:
            output.claim(
                self.folder, recipe.to_dict(), resume=resume, version=t2i_align.__version__
            )
        self.accelerator.wait_for_everyone()

    def generator(self) -> Generator:
        """The recipe's, on this process's device, nothing loaded."""
        made: Generator = self.recipe.chosen("model")(self.recipe.model, self.accelerator.device)
        if isinstance(made, DiffusersGenerator):
            made.mixed_precision = self.recipe.train.mixed_precision
        return made

    @property
    def micro(self) -> int:
        """Records of one forward, over all processes."""
        return self.recipe.train.train_batch_size * self.accelerator.num_processes

    @property
    def records_per_step(self) -> int:
        """Records of one optimizer step, over all processes."""
        return self.micro * self.recipe.train.gradient_accumulation_steps

    def say(self, text: str) -> None:
        """One line, from the main process."""
        if self.main:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def recheck(self) -> None:
        """Ask again what the model's own files tell, now that a hub id has been fetched.

        Raises:
            RecipeError: it is a model the objective cannot be trained on.
        """
        found = list(unfit_model(self.recipe))
        if found:
            raise RecipeError(found)
        warning = distilled_warning(self.recipe)
        if warning is not None:
            self.say(warning)

    def anyone(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        mine = torch.tensor(float(flag), device=self.accelerator.device)
        total: torch.Tensor = self.accelerator.reduce(mine, "sum")  # type: ignore[assignment]
        return bool(total > 0)
