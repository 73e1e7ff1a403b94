"""``t2i-align quickstart``: the embedded world, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of everything it makes.")] = Path(
        "outputs/quickstart"
    ),
    recipe: Annotated[
        str, typer.Option(help="Recipe that trains the bundled base.")
    ] = "scenes_dpo",
    per_task: Annotated[int, typer.Option(min=2, help="Held-out pictures of each task.")] = 100,
    prompt_seed: Annotated[int, typer.Option(min=0, help="Which held-out prompts.")] = 0,
) -> None:
    """Evaluate the bundled base, align it, evaluate again: table, summary.json, report.html."""
    from rich.console import Console

    from t2i_align.cli.show import print_rows
    from t2i_align.evaluate.compare import table
    from t2i_align.scenes.quickstart import quickstart as run

    console = Console(stderr=True)
    summary, page = run(out, recipe, per_task, prompt_seed, console)
    print_rows("GenEval's tasks on held-out prompts, same noise", table(summary))
    typer.echo(f"{summary['seconds']['total']:.0f} seconds; report: {page}")
