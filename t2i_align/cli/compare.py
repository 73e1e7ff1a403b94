"""``t2i-align compare``: two evaluations, pair by pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    before: Annotated[Path, typer.Argument(help="Evaluation folder of the baseline.")],
    after: Annotated[Path, typer.Argument(help="Evaluation folder of the other model.")],
    despite: Annotated[
        list[str] | None,
        typer.Option(help="A setting that differs on purpose, e.g. guidance_scale; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, machine readable.")] = False,
) -> None:
    """Compare two evaluations on the same prompts and noise: differences with paired intervals."""
    from t2i_align.cli.show import print_json, print_rows
    from t2i_align.evaluate.compare import compare as paired
    from t2i_align.evaluate.compare import mcnemar_line, table

    result = paired(before, after, despite or ())
    if as_json:
        print_json(result)
        return
    odd = "".join(f" ({text})" for text in result["despite"])
    print_rows(f"{before} -> {after}{odd}", table(result))
    said = mcnemar_line(result)
    if said is not None:
        typer.echo(said)
