"""``t2i-align adapter``: arithmetic of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

adapter = typer.Typer(
    no_args_is_help=True, help="Scale, add and interpolate adapters (peft's keys)."
)
Out = Annotated[Path, typer.Option(help="File to write, or a folder for it.")]
Rank = Annotated[
    int | None, typer.Option(min=1, help="Cut the result to this rank and say what that loses.")
]


@adapter.command()
def scale(
    file: Annotated[Path, typer.Argument(help="Adapter file or folder.")],
    weight: Annotated[float, typer.Option(help="Factor of the update.")],
    out: Out,
    rank: Rank = None,
) -> None:
    """Multiply an adapter by a number."""
    from t2i_align.export import arithmetic
    from t2i_align.export.adapter import read_adapter
    from t2i_align.export.store import store

    typer.echo(store(arithmetic.scale(read_adapter(file), weight), out, rank))


@adapter.command()
def add(
    files: Annotated[list[Path], typer.Argument(help="Adapter files or folders.")],
    out: Out,
    weight: Annotated[
        list[float] | None, typer.Option(help="One an adapter, in order; left out: 1 each.")
    ] = None,
    rank: Rank = None,
) -> None:
    """Add adapters of the same layers; the rank of the sum is the sum of the ranks."""
    from t2i_align.export import arithmetic
    from t2i_align.export.adapter import read_adapter
    from t2i_align.export.store import store

    weights = weight or [1.0] * len(files)
    typer.echo(store(arithmetic.add([read_adapter(f) for f in files], weights), out, rank))


@adapter.command()
def interpolate(
    first: Annotated[Path, typer.Argument(help="The adapter at weight 0.")],
    second: Annotated[Path, typer.Argument(help="The adapter at weight 1.")],
    weight: Annotated[float, typer.Option(help="t of (1 - t) first + t second.")],
    out: Out,
    rank: Rank = None,
) -> None:
    """Go from one adapter to another."""
    from t2i_align.export import arithmetic
    from t2i_align.export.adapter import read_adapter
    from t2i_align.export.store import store

    made = arithmetic.interpolate(read_adapter(first), read_adapter(second), weight)
    typer.echo(store(made, out, rank))
