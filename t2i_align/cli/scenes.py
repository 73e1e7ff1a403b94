"""``t2i-align scenes``: rebuild the embedded world's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def scenes(
    what: Annotated[
        Literal["renders", "pairs"],
        typer.Argument(help="renders: ground truth; pairs: preferences."),
    ],
    out: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    num: Annotated[int, typer.Option(min=1, help="Pictures, or training prompts to pair.")] = 1000,
    model: Annotated[str | None, typer.Option(help="Pipeline that draws the pairs.")] = None,
    denoiser: Annotated[str | None, typer.Option(help="Its denoiser, if fine-tuned.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, places and noise.")] = 0,
) -> None:
    """Write renders of training prompts, or pairs of a model's own samples judged exactly."""
    import torch
    from rich.console import Console

    from t2i_align.cli.quiet import hush
    from t2i_align.errors import UserError
    from t2i_align.generators.diffusers_family import DiffusersGenerator
    from t2i_align.generators.diffusers_options import DiffusersOptions
    from t2i_align.rollout.generate import load_weights
    from t2i_align.scenes.build import write_renders
    from t2i_align.scenes.pairs import build_pairs

    hush()
    console = Console(stderr=True)
    if what == "renders":
        write_renders(out, num, seed)
        console.print(f"{num} renders in {out}")
        return
    if model is None:
        raise UserError("scenes pairs needs a model to draw them", "give --model FOLDER")
    options = DiffusersOptions(name_or_path=model, resolution=64)
    generator = DiffusersGenerator(options, "cuda" if torch.cuda.is_available() else "cpu")
    load_weights(generator, None, denoiser)
    counts = build_pairs(generator, out, num_prompts=num, console=console, seed=seed)
    console.print(
        f"{counts['pairs']} pairs ({counts['ties']} ties) in {out}; "
        f"{counts['right']:.3f} of their pictures are right"
    )
