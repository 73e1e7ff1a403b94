"""``t2i-align eval``: a benchmark on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    benchmark: Annotated[Literal["scenes"], typer.Argument(help="Which benchmark.")],
    model: Annotated[str, typer.Option(help="Folder or hub id of the pipeline.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures, verdicts and summary.")],
    lora: Annotated[str | None, typer.Option(help="Adapter to load on top.")] = None,
    denoiser: Annotated[
        str | None, typer.Option(help="unet/ or transformer/ folder of a full fine-tuning run.")
    ] = None,
    per_task: Annotated[int, typer.Option(min=2, help="Pictures of each of the six tasks.")] = 100,
    prompt_seed: Annotated[int, typer.Option(min=0, help="Which held-out prompts.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(min=1, help="1 turns guidance off.")] = 3.0,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Text tokens of T5; left out: the pipeline's default.")
    ] = None,
    training_prompts: Annotated[
        bool, typer.Option(help="Training prompts instead of held-out ones.")
    ] = False,
) -> None:
    """Evaluate a model: pictures, verdicts, a summary with intervals; may be continued."""
    import torch
    from rich.console import Console

    from t2i_align.cli.quiet import hush
    from t2i_align.cli.show import print_pairs
    from t2i_align.evaluate.run import Protocol, run
    from t2i_align.generators.diffusers_family import DiffusersGenerator
    from t2i_align.generators.diffusers_options import DiffusersOptions
    from t2i_align.rollout.generate import load_weights, weights_sha256

    hush()
    protocol = Protocol(
        benchmark=benchmark,
        per_task=per_task,
        prompt_seed=prompt_seed,
        held_out=not training_prompts,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    options = DiffusersOptions(
        name_or_path=model,
        resolution=protocol.resolution,
        max_sequence_length=max_sequence_length,
    )
    generator = DiffusersGenerator(options, "cuda" if torch.cuda.is_available() else "cpu")
    load_weights(generator, lora, denoiser)
    facts = {
        "model": model,
        "lora": lora,
        "denoiser": denoiser,
        "weights_sha256": weights_sha256(generator, lora, denoiser),
    }
    if max_sequence_length is not None:
        facts["max_sequence_length"] = str(max_sequence_length)
    result = run(generator, protocol, facts, out, Console(stderr=True))
    rows = [(task, f"{mean:.3f}") for task, mean in result["tasks"].items()]
    overall = result["overall"]
    rows.append(
        ("overall", f"{overall['mean']:.3f}  [{overall['low']:.3f}, {overall['high']:.3f}]")
    )
    print_pairs(f"{benchmark}: {model}", rows)
