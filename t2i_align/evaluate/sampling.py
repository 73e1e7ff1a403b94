"""How pictures of an evaluation are sampled, and by which model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

    from t2i_align.generators.diffusers_family import DiffusersGenerator

Precision = Literal["autocast_bf16", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler.

    Args:
        seed: of the noise, with the prompt and the picture's number.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance, 1 = off.
        resolution: side in pixels.
        negative_prompt: None for the pipeline's default.
        precision: of the weights; ``autocast_bf16``: float32 weights, bfloat16 arithmetic.
        batch_size: pictures at once; the fixed piece of work that processes share out.
    """

    seed: int = 0
    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    resolution: int = 512
    negative_prompt: str | None = None
    precision: Precision = "autocast_bf16"
    batch_size: int = 8

    def with_given(self, given: Mapping[str, Any]) -> Sampling:
        """A copy in which everything given that is not None replaces the default."""
        return replace(self, **{k: v for k, v in given.items() if v is not None})

    def protocol(self) -> dict[str, Any]:
        """What two evaluations share to be compared; the batch size only rounds."""
        found = asdict(self)
        del found["batch_size"]
        return found


# What a benchmark's own sampler does, where it says so; everything else starts at Sampling().
DEFAULTS: dict[str, Sampling] = {
    "geneval": Sampling(num_inference_steps=50, guidance_scale=9.0),
    "geneval_long": Sampling(num_inference_steps=50, guidance_scale=9.0),
    "scenes": Sampling(num_inference_steps=20, guidance_scale=3.0, resolution=64, batch_size=50),
}


def defaults(benchmark: str) -> Sampling:
    """The settings a benchmark starts from."""
    return DEFAULTS.get(benchmark, Sampling())


@dataclass(frozen=True)
class Model:
    """What is evaluated.

    Args:
        name: folder or hub id of the pipeline.
        lora: adapter on top.
        denoiser: folder of a fully fine-tuned denoiser.
        max_sequence_length: text tokens of T5, None for the pipeline's default.
    """

    name: str
    lora: str | None = None
    denoiser: str | None = None
    max_sequence_length: int | None = None


def open_model(model: Model, sampling: Sampling, device: str) -> DiffusersGenerator:
    """The generator without its weights.

    Raises:
        ModelError: no pipeline there.
    """
    from t2i_align.generators.diffusers_family import DiffusersGenerator
    from t2i_align.generators.diffusers_options import DiffusersOptions

    dtype: Any = "float32" if sampling.precision == "autocast_bf16" else sampling.precision
    options = DiffusersOptions(
        name_or_path=model.name,
        resolution=sampling.resolution,
        max_sequence_length=model.max_sequence_length,
        dtype=dtype,
    )
    return DiffusersGenerator(options, device)


def load_model(model: Model, sampling: Sampling, device: str) -> DiffusersGenerator:
    """The generator, ready to sample."""
    from t2i_align.rollout.generate import load_weights

    generator = open_model(model, sampling, device)
    load_weights(generator, model.lora, model.denoiser)
    return generator


def model_facts(model: Model, sampling: Sampling) -> dict[str, Any]:
    """Names and the hash of everything that is loaded; the scheduler as the folder has it."""
    from t2i_align.rollout.generate import weights_sha256

    generator = open_model(model, sampling, "cpu")
    facts: dict[str, Any] = {
        "model": model.name,
        "lora": model.lora,
        "denoiser": model.denoiser,
        "weights_sha256": weights_sha256(generator, model.lora, model.denoiser),
    }
    if model.max_sequence_length is not None:
        facts["max_sequence_length"] = str(model.max_sequence_length)
    return facts | {"scheduler": _scheduler(generator.folder)}


def _scheduler(folder: Path | None) -> str | None:
    """Class name of a pipeline folder's scheduler; None where there is none."""
    file = None if folder is None else folder / "scheduler" / "scheduler_config.json"
    if file is None or not file.is_file():
        return None
    return json.loads(file.read_text()).get("_class_name")


def sample(
    generator: DiffusersGenerator,
    prompts: Sequence[str],
    noise_seeds: Sequence[int],
    sampling: Sampling,
) -> list[Image]:
    """Pictures of prompts, in one batch."""
    from t2i_align.rollout.generate import sample_images

    return sample_images(
        generator,
        prompts,
        noise_seeds,
        num_steps=sampling.num_inference_steps,
        guidance=sampling.guidance_scale,
        negative_prompt=sampling.negative_prompt,
        bf16=sampling.precision == "autocast_bf16",
    )
