"""``t2i-align cache build``: what a run would pay for once, paid before, by several processes.

    records -> latents and text (each process a share of the prompts)
            -> reference errors (each process every n-th micro-batch), where the run would keep them

Micro-batches are those of the run, so numbers are what it would have computed. Everything is
written in whole shards, so a build that is killed goes on from the last ones.
"""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from rich.console import Console

from t2i_align.data.label_source import build_source
from t2i_align.data.reference_cache import values_of
from t2i_align.errors import DataError, RecipeError, UserError
from t2i_align.progress import progress
from t2i_align.protocols import Generator, Objective
from t2i_align.quiet import hushing
from t2i_align.recipe import Recipe
from t2i_align.train.compiled import compile_views
from t2i_align.train.offline import StoredFeed, prepared
from t2i_align.train.reference import Kept, kept_reference, load_mode
from t2i_align.train.setup import Setup
from t2i_align.train.start import start_from

Failure = tuple[type[UserError], str, str]


class Builder:
    """The parts of a run that fill its caches.

    Args:
        recipe: validated.
        console: for lines and progress.
    """

    def __init__(self, recipe: Recipe, console: Console) -> None:
        """Start accelerate; no output folder is touched.

        Raises:
            DataError: the objective trains on no records.
        """
        if recipe.needs.feed == "trajectory":
            raise DataError(
                "there is nothing to cache: the objective trains on samples of the policy alone",
                "train by the recipe as it is",
            )
        self.recipe, self.console = recipe, console
        self.setup = Setup(recipe, console, claim=False)
        self.objective: Objective = recipe.chosen("objective")(recipe.objective)
        self.generator: Generator = self.setup.generator()
        self.setup.recheck()

    def encode(self, share: tuple[int, int] | None = None) -> dict[str, int]:
        """Latents and text; returns how many were new."""
        made = prepared(self.setup, self.generator, self.objective, share).report
        return {"media": made.encoded_media, "prompts": made.encoded_prompts}

    def reference(self) -> tuple[StoredFeed, Kept] | None:
        """Load the network and open the place of its reference errors; None where none are kept."""
        needs, recipe = self.objective.needs, self.recipe
        if needs.feed != "stored" or "reference" not in needs.views:
            return None
        feed = StoredFeed(self.setup, self.generator, self.objective)
        self.generator.free_encoders(keep_decoder=False)
        mode = load_mode(recipe, needs)  # nothing is trained, so no copy is ever made
        self.generator.load_module(recipe.seed, reference=True, reference_mode=mode)
        views = self.generator.views
        if recipe.model.start_from is not None:
            start_from(views, recipe.model.start_from)
        kept = kept_reference(self.setup, self.generator, feed, needs)
        if kept is None:
            feed.close()
            return None
        if recipe.train.channels_last:  # as the engine does, so that kernels are the run's
            for net in {id(n): n for n in (views.module, views.reference) if n}.values():
                net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        compile_views(views, recipe.train.compile)
        return feed, kept

    def score(self, feed: StoredFeed, kept: Kept, index: int = 0, num: int = 1) -> int:
        """Ask the reference for every ``num``-th micro-batch; returns how many items were new."""
        size, total = self.recipe.train.train_batch_size, feed.num_positions
        starts = range(index * size, total, num * size)
        asked = 0
        shown = self.console if self.console.is_terminal else None
        with kept, progress(shown, "reference", len(starts), unit="micro-batches") as bar:
            for count, at in enumerate(starts, 1):
                if kept.store.get(feed.keys(at)) is None:
                    asked += self._ask(feed, kept, at)
                bar.reach(count)
        return asked

    @torch.no_grad()
    def _ask(self, feed: StoredFeed, kept: Kept, at: int) -> int:
        drawn = feed.at(at)
        assert drawn.keys is not None
        with self.setup.accelerator.autocast():
            live = self.generator.score(drawn.event, "reference")
        kept.store.put(drawn.keys, values_of(live))
        return len(drawn.keys)


def build(recipe: Recipe, console: Console, num_processes: int = 1) -> dict[str, Any]:
    """Fill the caches of a recipe.

    Args:
        recipe: validated.
        console: for lines and progress.
        num_processes: that share the work, one a GPU in turn.

    Returns:
        How many ``media``, ``prompts`` and ``reference`` items were new.

    Raises:
        UserError: of one of the processes; what is stored stays.
    """
    builder = Builder(recipe, console)
    made = {"media": 0, "prompts": 0, "reference": 0}
    if num_processes > 1:
        # judges score once, before several processes read the labels
        build_source(recipe.chosen("data"), recipe.data, recipe.cache.dir, console)
        for shared in spread(encode_share, recipe, num_processes):
            made = {k: v + shared.get(k, 0) for k, v in made.items()}
    new = builder.encode()
    made = {k: v + new.get(k, 0) for k, v in made.items()}
    opened = builder.reference()
    if opened is None:
        return made
    feed, kept = opened
    try:
        if num_processes > 1:
            shares = spread(score_share, recipe, num_processes)
            made["reference"] = sum(shared["reference"] for shared in shares)
        else:
            made["reference"] = builder.score(feed, kept)
    finally:
        feed.close()
    return made


def encode_share(recipe: Recipe, index: int, num: int) -> dict[str, int]:
    """One process's latents and text."""
    builder = Builder(recipe, quiet())
    try:
        return builder.encode((index, num))
    except DataError:  # nothing usable in this share; the pass over all records says what is wrong
        return {}


def score_share(recipe: Recipe, index: int, num: int) -> dict[str, int]:
    """One process's reference errors."""
    builder = Builder(recipe, quiet())
    opened = builder.reference()
    if opened is None:
        return {"reference": 0}
    try:
        return {"reference": builder.score(*opened, index, num)}
    finally:
        opened[0].close()


def quiet() -> Console:
    """A console nobody sees."""
    return Console(file=io.StringIO())


Task = Callable[[Recipe, int, int], dict[str, int]]


def spread(task: Task, recipe: Recipe, num: int) -> list[dict[str, int]]:
    """Run a task in ``num`` fresh processes.

    Raises:
        UserError: one of them failed, or was killed.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num, context, hushing()) as pool:
            jobs = [pool.submit(guarded, task, recipe, k, num) for k in range(num)]
            done = [job.result() for job in jobs]
    except BrokenProcessPool as error:
        raise UserError(
            "a process of the build was killed; what was stored stays",
            "run again, it goes on from there; with fewer --num-processes if memory ran out",
        ) from error
    for result in done:
        if isinstance(result, tuple):
            kind, message, fix = result
            raise kind(message, fix)
    return [result for result in done if isinstance(result, dict)]


def guarded(task: Task, recipe: Recipe, index: int, num: int) -> dict[str, int] | Failure:
    """A task on this process's GPU; an error for a user comes back as a value."""
    if torch.cuda.is_available() and not torch.cuda.is_initialized():
        torch.cuda.set_device(index % torch.cuda.device_count())
    try:
        return task(recipe, index, num)
    except RecipeError as error:  # its problems do not fit through a pipe
        return UserError, error.message, error.fix
    except UserError as error:
        return type(error), error.message, error.fix
