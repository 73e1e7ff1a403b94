"""``t2i-align scenes``: rebuild the embedded world's data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def scenes(
    what: Annotated[
        Literal["vae", "sdxl", "sd3", "renders", "pairs"],
        typer.Argument(
            help="vae: train the autoencoder; sdxl: train the text encoders and start a UNet; "
            "sd3: a fresh transformer around the SDXL's frozen parts; renders: ground truth; "
            "pairs: preferences."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder (vae, sdxl) or parquet file to write.")],
    num: Annotated[int, typer.Option(min=1, help="Pictures, or training prompts to pair.")] = 1000,
    model: Annotated[str | None, typer.Option(help="Pipeline that draws the pairs.")] = None,
    denoiser: Annotated[str | None, typer.Option(help="Its denoiser, if fine-tuned.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Folder of the autoencoder, for sdxl.")] = None,
    base: Annotated[Path | None, typer.Option(help="Folder of the SDXL, for sd3.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Pictures of a prompt, for pairs.")] = 4,
    winners: Annotated[
        Literal["samples", "renders"],
        typer.Option(help="Own samples, or correct renders over wrong samples."),
    ] = "samples",
    pairing: Annotated[
        Literal["best_worst", "all"], typer.Option(help="Which own samples of a prompt meet.")
    ] = "best_worst",
    held_out: Annotated[
        bool, typer.Option(help="Held-out prompts: to measure judges, never to train.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, places, weights and noise.")] = 0,
) -> None:
    """Rebuild the embedded world, step by step; see recipes/scenes_base.yaml."""
    from rich.console import Console

    from t2i_align.cli.quiet import hush
    from t2i_align.errors import UserError
    from t2i_align.scenes import build
    from t2i_align.scenes.pairs import PairSettings

    hush()
    console = Console(stderr=True)
    if what == "vae":
        build.autoencoder(out, seed)
    elif what == "renders":
        build.write_renders(out, num, seed)
        console.print(f"{num} renders in {out}")
    elif what == "sdxl":
        if vae is None:
            raise UserError("scenes sdxl needs an autoencoder", "give --vae FOLDER")
        share = build.start_sdxl(vae, out, seed)
        console.print(f"{out}; facts of held-out prompts read off right: {share:.3f}")
    elif what == "sd3":
        if base is None:
            raise UserError("scenes sd3 needs a trained SDXL", "give --base FOLDER")
        console.print(f"{build.new_sd3(base, out, seed)}")
    elif model is None:
        raise UserError("scenes pairs needs a model to draw them", "give --model FOLDER")
    else:
        settings = PairSettings(num, samples, winners, pairing, held_out, seed)
        counts = build.draw_pairs(model, denoiser, out, settings, console)
        console.print(
            f"{counts['pairs']} pairs ({counts['ties']} ties) in {out}; "
            f"{counts['right']:.3f} of their pictures are right"
        )
