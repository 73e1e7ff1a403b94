"""``t2i-align cite``: the papers behind a recipe."""

from __future__ import annotations

from typing import Annotated

import typer


def cite(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, read as YAML.")
    ] = None,
) -> None:
    """Print BibTeX of the objective, the model family and the data of a recipe."""
    from t2i_align.cite import citations
    from t2i_align.recipe import load_recipe

    typer.echo("\n\n".join(citations(load_recipe(recipe, overrides or (), run_checks=False))))
