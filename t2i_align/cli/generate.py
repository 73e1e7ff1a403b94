"""``t2i-align generate``: pictures or clips from a model, with or without a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from t2i_align.cli import options

if TYPE_CHECKING:
    from t2i_align.generators.diffusers_options import DiffusersOptions
    from t2i_align.rollout.generate import Settings

Model = Annotated[str, typer.Option(help="Folder or hub id of the pipeline.")]
Out = Annotated[Path, typer.Option(help="Folder for the pictures and metadata.jsonl.")]
Prompt = Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")]
Prompts = Annotated[
    Path | None, typer.Option(help="A .txt (one a line) or .jsonl file (key 'prompt').")
]
Revision = Annotated[str | None, typer.Option(help="Hub revision of the model.")]
Resolution = Annotated[
    int | None, typer.Option(min=16, help="Side in pixels; left out: 512.", show_default=False)
]
Size = Annotated[
    str | None, typer.Option(help="HxW in pixels, e.g. 768x1344, where it is not square.")
]
NumFrames = Annotated[int, typer.Option(min=1, help="Video: frames of a clip.")]
FrameRate = Annotated[float, typer.Option(min=0.1, help="Video: frames a second.")]
NumInferenceSteps = Annotated[int, typer.Option(min=1, help="Sampler steps.")]
GuidanceScale = Annotated[float, typer.Option(min=1, help="1 turns guidance off.")]
ImagesPerPrompt = Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at once.")]
Seed = Annotated[int, typer.Option(min=0, help="The noise is a function of it and the prompt.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the network.")
]


def generate(
    model: Model,
    out: Out,
    prompt: Prompt = None,
    prompts: Prompts = None,
    lora: options.Lora = None,
    denoiser: options.Denoiser = None,
    revision: Revision = None,
    resolution: Resolution = None,
    size: Size = None,
    num_frames: NumFrames = 1,
    frame_rate: FrameRate = 25.0,
    num_inference_steps: NumInferenceSteps = 30,
    guidance_scale: GuidanceScale = 5.0,
    max_sequence_length: options.MaxSequenceLength = None,
    negative_prompt: options.NegativePrompt = None,
    images_per_prompt: ImagesPerPrompt = 1,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    dtype: Dtype = "float32",
) -> None:
    """Generate pictures or clips; continues where an interrupted call stopped."""
    from t2i_align.generators.diffusers_options import DiffusersOptions
    from t2i_align.quiet import hush
    from t2i_align.rollout import generate as sampling

    hush()
    texts = _texts(prompt, prompts)
    sides = None if size is None else sampling.read_size(size, resolution)
    of_model = DiffusersOptions(
        name_or_path=model,
        revision=revision,
        resolution=max(16, min(sides)) if sides else resolution or 512,
        sample_size=sides,
        num_frames=num_frames,
        frame_rate=frame_rate,
        dtype=dtype,
        max_sequence_length=max_sequence_length,
    )
    settings = sampling.Settings(
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        seed=seed,
        images_per_prompt=images_per_prompt,
        batch_size=batch_size,
        lora=lora,
        denoiser=denoiser,
    )
    _make(of_model, texts, settings, out)


def _texts(prompt: list[str] | None, prompts: Path | None) -> list[str]:
    """The prompts, those of the command line first."""
    from t2i_align.errors import UserError
    from t2i_align.rollout.generate import read_prompts

    texts = list(prompt or []) + (read_prompts(prompts) if prompts else [])
    if not texts:
        raise UserError("generate needs prompts", "give --prompt TEXT or --prompts FILE")
    return texts


def _make(of_model: DiffusersOptions, texts: list[str], settings: Settings, out: Path) -> None:
    """Open the model, draw what is missing, say how much that was."""
    import torch
    from rich.console import Console

    from t2i_align.rollout import generate as sampling

    generator = sampling.opened(of_model, "cuda" if torch.cuda.is_available() else "cpu")
    sampling.load_weights(generator, settings.lora, settings.denoiser)
    console = Console(stderr=True)
    made = sampling.generate(generator, texts, settings, out, console)
    console.print(f"{made} new of {len(texts) * settings.images_per_prompt} pictures in {out}")
