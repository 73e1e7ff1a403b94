"""``t2i-align scenes``: rebuild the embedded world's models and data, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

scenes = typer.Typer(
    no_args_is_help=True,
    help="Rebuild the embedded world's models and data; see docs/scenes.md for the order.",
)
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
File = Annotated[Path, typer.Argument(help="Parquet file to write.")]
Seed = Annotated[int, typer.Option(min=0, help="Of prompts, places, weights and noise.")]
Model = Annotated[str, typer.Option(help="Pipeline folder that draws the pictures.")]
Denoiser = Annotated[str | None, typer.Option(help="Its denoiser, if fine-tuned.")]
PairFiles = Annotated[
    list[Path] | None, typer.Option("--pairs", help="Parquet of `scenes pairs`; may be repeated.")
]


@scenes.command()
def vae(out: Out, seed: Seed = 0) -> None:
    """Train the autoencoder (about 16 minutes on two cores)."""
    from t2i_align.quiet import hush
    from t2i_align.scenes.vae import train_vae

    hush()
    train_vae(out, seed=seed)


@scenes.command()
def sdxl(
    out: Out,
    vae: Annotated[Path, typer.Option(help="Folder of the autoencoder.")],
    seed: Seed = 0,
) -> None:
    """Train the text encoders and write an SDXL folder with a fresh UNet (2 minutes)."""
    from rich.console import Console

    from t2i_align.quiet import hush
    from t2i_align.scenes.build import start_sdxl

    hush()
    share = start_sdxl(vae, out, seed)
    text = f"{out}; facts of held-out prompts read off right: {share:.3f}"
    Console(stderr=True).print(text)


@scenes.command()
def sd3(
    out: Out,
    base: Annotated[str, typer.Option(help="SDXL folder whose frozen parts it takes.")],
    seed: Seed = 0,
) -> None:
    """Write an SD3 folder with a fresh transformer around an SDXL's frozen parts."""
    from t2i_align.quiet import hush
    from t2i_align.scenes.build import new_sd3

    hush()
    new_sd3(base, out, seed)


@scenes.command()
def renders(
    out: File,
    num: Annotated[int, typer.Option(min=1, help="Pictures.")] = 40_000,
    seed: Seed = 0,
) -> None:
    """Render training prompts (about 800 a second)."""
    from t2i_align.scenes.build import write_renders

    write_renders(out, num, seed)


@scenes.command()
def pairs(
    out: File,
    model: Model,
    denoiser: Denoiser = None,
    num: Annotated[int, typer.Option(min=1, help="Prompts.")] = 1000,
    samples: Annotated[int, typer.Option(min=2, help="Pictures of a prompt.")] = 4,
    winners: Annotated[
        Literal["samples", "renders", "both", "repairs"],
        typer.Option(
            help="Own samples, correct renders over wrong samples, both, or wrong samples put "
            "right over themselves."
        ),
    ] = "samples",
    pairing: Annotated[
        Literal["best_worst", "all"], typer.Option(help="Which own samples of a prompt meet.")
    ] = "best_worst",
    held_out: Annotated[
        bool, typer.Option(help="Held-out prompts: to measure judges, never to train.")
    ] = False,
    guidance_scale: Annotated[float, typer.Option(min=1, help="Of sampling; 1 = off.")] = 3.0,
    lossless: Annotated[
        bool, typer.Option(help="Pictures without loss, seven times the bytes.")
    ] = False,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Text tokens of T5; 16 for bundled/scenes_sd3.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Draw pictures of prompts with a model and pair them by the exact judge."""
    from rich.console import Console

    from t2i_align.generators.diffusers_options import DiffusersOptions
    from t2i_align.quiet import hush
    from t2i_align.scenes.build import draw_pairs
    from t2i_align.scenes.pairs import PairSettings

    hush()
    console = Console(stderr=True)
    settings = PairSettings(
        num, samples, winners, pairing, held_out, seed, guidance_scale, lossless=lossless
    )
    options = DiffusersOptions(
        name_or_path=model, resolution=64, max_sequence_length=max_sequence_length
    )
    counts = draw_pairs(options, denoiser, out, settings, console)
    console.print(
        f"{counts['pairs']} pairs ({counts['ties']} ties) in {out}; "
        f"{counts['right']:.3f} of their pictures are right"
    )


@scenes.command()
def captions(
    out: File,
    pairs: Annotated[list[Path], typer.Option(help="Pair file of own samples; repeatable.")],
    own: Annotated[
        bool, typer.Option("--own", help="Right and wrong picture, each under what it shows.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Put every right picture of pair files under its prompt and under a false one."""
    from t2i_align.scenes.captions import build_captions

    num = build_captions(pairs, out, seed, own=own)
    what = "pairs of captioned pictures" if own else "pictures with two captions"
    typer.echo(f"{num} {what} in {out}")


@scenes.command()
def clip(out: Out, pairs: PairFiles = None, seed: Seed = 0) -> None:
    """Train the learned judge (open_clip), with pairs of a model's samples if given."""
    from rich.console import Console

    from t2i_align.quiet import hush
    from t2i_align.scenes.clip_judge import ClipPlan, train_clip_judge

    hush()
    train_clip_judge(out, ClipPlan(seed=seed), pairs or [], console=Console(stderr=True))


@scenes.command()
def vlm(
    out: Out,
    pairs: Annotated[
        Path | None, typer.Option(help="Parquet of `scenes pairs`, whose pictures join.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of both phases.")] = 5000,
    seed: Seed = 0,
) -> None:
    """Train the tiny vision-language judge (a stock transformers architecture)."""
    from rich.console import Console

    from t2i_align.quiet import hush
    from t2i_align.scenes.vlm import train_vlm

    hush()
    train_vlm(out, steps=steps, seed=seed, samples=pairs, console=Console(stderr=True))
