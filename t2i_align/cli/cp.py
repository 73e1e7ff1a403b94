"""``t2i-align cp``: a shipped recipe as a file of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def cp(
    name: Annotated[str, typer.Argument(help="A shipped recipe; see t2i-align ls recipes.")],
    dest: Annotated[Path, typer.Argument(help="File, or existing folder, to copy it to.")],
) -> None:
    """Copy a shipped recipe to edit it; never overwrites."""
    from t2i_align.recipe import copy_recipe

    typer.echo(f"wrote {copy_recipe(name, dest)}")
