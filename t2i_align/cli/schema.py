"""``t2i-align schema``: the JSON schema of recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def schema(
    out: Annotated[Path | None, typer.Argument(help="File to write; stdout when left out.")] = None,
) -> None:
    """Write the JSON schema of recipes, for completion and checks while typing in an editor."""
    from t2i_align.cli.show import print_json
    from t2i_align.recipe_schema import recipe_schema

    if out is None:
        print_json(recipe_schema())
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(recipe_schema(), indent=2) + "\n", encoding="utf-8")
    typer.echo(f"wrote {out}; first line of a recipe: # yaml-language-server: $schema={out}")
