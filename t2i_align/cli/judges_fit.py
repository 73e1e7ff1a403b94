"""``t2i-align judges fit``: fit a judge to pairs by a recipe."""

from __future__ import annotations

from typing import Annotated

import typer


def fit(
    recipe: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped judge recipe.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, read as YAML.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="A GPU if there is one when left out.")] = None,
) -> None:
    """Fit a judge to pairs; the same call continues a run that was stopped."""
    import torch
    from rich.console import Console

    from t2i_align.judges.fit_recipe import load_fit_recipe
    from t2i_align.judges.fit_run import fit_judge
    from t2i_align.quiet import hush

    hush()
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    fit_judge(load_fit_recipe(recipe, overrides or ()), console=Console(), device=chosen)
