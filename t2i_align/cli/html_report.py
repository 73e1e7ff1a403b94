"""``t2i-align report``: a comparison as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    before: Annotated[Path, typer.Argument(help="Evaluation folder of the baseline.")],
    after: Annotated[Path, typer.Argument(help="Evaluation folder of the other model.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    run: Annotated[
        list[Path] | None,
        typer.Option(help="Output folder of a training run: curves, recipe; may be repeated."),
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(help="JSON with further tables: 'sections', 'seconds'.")
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Alignment report",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write two evaluations as one offline HTML file: numbers, pictures, curves, provenance."""
    from t2i_align.errors import UserError
    from t2i_align.evaluate.report import build_report, read_extras

    if out.exists() and not force:
        raise UserError(
            f"'{out}' exists and is not overwritten", "choose another --out, or add --force"
        )
    extras = read_extras(summary) if summary else []
    build_report(before, after, out, runs=run or [], extras=extras, title=title)
    typer.echo(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
