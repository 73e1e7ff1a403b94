"""Entry point of ``t2i-align train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from t2i_align.errors import StorageError
from t2i_align.later import importing
from t2i_align.recipe import Recipe


def train(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe to the end, all its rounds where it has some.

    Args:
        recipe: from :func:`t2i_align.recipe.load_recipe`.
        console: where progress goes; standard error by default.

    Returns:
        The run's summary, also written to ``<output_dir>/summary.json``.
    """
    with importing():
        from accelerate import PartialState

        from t2i_align.train.checkpoint import is_storage_failure
        from t2i_align.train.rounds import train_rounds

    program = train_one if recipe.rounds is None else train_rounds
    try:
        summary = program(recipe, console or Console(stderr=True))
    except OSError as error:
        if not is_storage_failure(error):
            raise
        raise StorageError(
            f"could not write to {recipe.output_dir}: {error}; checkpoints are intact",
            "free disk space, then continue with train.resume_from_checkpoint=latest",
        ) from error
    PartialState().destroy_process_group()  # rounds share it, so no single run may
    return summary


def train_one(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Run a recipe without rounds."""
    with importing():
        from t2i_align.folder_lock import occupied
        from t2i_align.generators.attention import float32_on_cpu
        from t2i_align.train.loop import Run
        from t2i_align.train.output import RUN_FILE

    with occupied(Path(recipe.output_dir).expanduser(), RUN_FILE), float32_on_cpu():
        return Run(recipe, console).run()
