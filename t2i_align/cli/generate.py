"""``t2i-align generate``: pictures or clips from a model, with or without a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def generate(
    model: Annotated[str, typer.Option(help="Folder or hub id of the pipeline.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and metadata.jsonl.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A .txt (one a line) or .jsonl file (key 'prompt').")
    ] = None,
    lora: Annotated[
        str | None, typer.Option(help="Adapter folder, file or hub id (load_lora_weights).")
    ] = None,
    denoiser: Annotated[
        str | None, typer.Option(help="unet/ or transformer/ folder of a full fine-tuning run.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=16, help="Side in pixels; left out: 512.", show_default=False)
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="HxW in pixels, e.g. 768x1344, where it is not square.")
    ] = None,
    num_frames: Annotated[int, typer.Option(min=1, help="Video: frames of a clip.")] = 1,
    frame_rate: Annotated[float, typer.Option(min=0.1, help="Video: frames a second.")] = 25.0,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 30,
    guidance_scale: Annotated[float, typer.Option(min=1, help="1 turns guidance off.")] = 5.0,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Text tokens of T5; left out: the pipeline's default.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 4,
    seed: Annotated[
        int, typer.Option(min=0, help="The noise is a function of it and the prompt.")
    ] = 0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the network.")
    ] = "float32",
) -> None:
    """Generate pictures or clips; continues where an interrupted call stopped."""
    import torch
    from rich.console import Console

    from t2i_align.cli.quiet import hush
    from t2i_align.errors import UserError
    from t2i_align.generators.diffusers_options import DiffusersOptions
    from t2i_align.rollout import generate as sampling

    hush()
    texts = list(prompt or []) + (sampling.read_prompts(prompts) if prompts else [])
    if not texts:
        raise UserError("generate needs prompts", "give --prompt TEXT or --prompts FILE")
    sides = None if size is None else sampling.read_size(size, resolution)
    options = DiffusersOptions(
        name_or_path=model,
        revision=revision,
        resolution=max(16, min(sides)) if sides else resolution or 512,
        sample_size=sides,
        num_frames=num_frames,
        frame_rate=frame_rate,
        dtype=dtype,
        max_sequence_length=max_sequence_length,
    )
    generator = sampling.opened(options, "cuda" if torch.cuda.is_available() else "cpu")
    sampling.load_weights(generator, lora, denoiser)
    settings = sampling.Settings(
        num_inference_steps,
        guidance_scale,
        negative_prompt,
        seed,
        images_per_prompt,
        batch_size,
        lora,
        denoiser,
    )
    console = Console(stderr=True)
    made = sampling.generate(generator, texts, settings, out, console)
    console.print(f"{made} new of {len(texts) * images_per_prompt} pictures in {out}")
