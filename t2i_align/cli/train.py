"""``t2i-align train``: run a recipe."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, read as YAML.")
    ] = None,
) -> None:
    """Train by a recipe; continue with train.resume_from_checkpoint=latest."""
    import torch

    from t2i_align.cli.quiet import hush
    from t2i_align.recipe import load_recipe
    from t2i_align.train.run import train as run

    hush()
    run(load_recipe(recipe, overrides or (), cuda=torch.cuda.is_available()))
