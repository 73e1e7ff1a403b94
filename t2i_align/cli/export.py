"""``t2i-align export``: what a run trained, in the formats other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    source: Annotated[
        Path, typer.Argument(help="output_dir of a run, or an adapter file (then with --model).")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    format: Annotated[
        Literal["peft", "kohya", "merged"],
        typer.Option(
            help="peft: load_lora_weights; kohya: one file for ComfyUI and A1111; merged: a whole "
            "pipeline."
        ),
    ] = "peft",
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        typer.Option(
            help="Precision; left out: float32, and the recipe's model.dtype for a merged run."
        ),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="latest, or the number of a step.")] = "latest",
    ema: Annotated[
        bool | None,
        typer.Option("--ema/--no-ema", help="Averaged weights; left out: where the run averages."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model of an adapter file, or instead of the recipe's.")
    ] = None,
    scores: Annotated[
        list[Path] | None, typer.Option(help="--out of t2i-align eval, for the card; repeatable.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of a merged model.")] = "5GB",
) -> None:
    """Write trained weights in a format other programs load, with a model card."""
    from t2i_align.export.program import Request
    from t2i_align.export.program import export as run
    from t2i_align.quiet import hush

    hush()
    request = Request(
        source, format, out, dtype, checkpoint, ema, model, tuple(scores or ()), max_shard_size
    )
    typer.echo(f"wrote {', '.join(run(request))} to {out}")
