"""Pictures for a list of prompts, reproducible and resumable.

The noise of an image is a function of (seed, prompt, image number): the same prompt gives the same
picture in any list, at any batch position. Images that exist are kept, so an interrupted call
continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from t2i_align.data.media_io import to_image
from t2i_align.errors import DataError, ModelError
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_folder import fingerprint
from t2i_align.process.seeds import derive

Job = tuple[Path, str, int]


@dataclass(frozen=True)
class Settings:
    """How to sample.

    Args:
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance, 1 = off.
        negative_prompt: None for the pipeline's default.
        seed: of the noise.
        images_per_prompt: pictures of each prompt.
        batch_size: pictures at once; does not change them beyond rounding.
        lora: adapter that was loaded, for the record.
        denoiser: full weights that were loaded, for the record.
    """

    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    negative_prompt: str | None = None
    seed: int = 0
    images_per_prompt: int = 1
    batch_size: int = 4
    lora: str | None = None
    denoiser: str | None = None


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file (one a line) or of a ``.jsonl`` file (key ``prompt``).

    Raises:
        DataError: the file is missing, empty, or a line has no prompt.
    """
    try:
        lines = [x for x in path.read_text().splitlines() if x.strip()]
    except OSError as error:
        raise DataError(f"--prompts: cannot read {path}: {error.strerror}") from error
    if path.suffix == ".jsonl":
        prompts = []
        for number, line in enumerate(lines, 1):
            try:
                prompts.append(json.loads(line)["prompt"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"--prompts: {path}:{number} is no JSON object with a 'prompt'"
                ) from error
        lines = prompts
    if not lines:
        raise DataError(f"--prompts: {path} holds no prompts")
    return lines


def load_weights(generator: DiffusersGenerator, lora: str | None, denoiser: str | None) -> None:
    """Load the base denoiser, a fully fine-tuned one instead, or an adapter on top."""
    generator.load_module(0, reference=False)
    if denoiser is not None:
        net: Any = type(generator.module)
        try:
            tuned = net.from_pretrained(Path(denoiser).expanduser())
        except (OSError, ValueError) as error:
            raise ModelError(
                f"--denoiser: no weights of a {net.__name__} in {denoiser}",
                "give the unet/ or transformer/ folder of a full fine-tuning run",
            ) from error
        generator.module.load_state_dict(tuned.state_dict())
    if lora is not None:
        try:
            generator.load_adapter(lora)
        except (OSError, ValueError) as error:
            raise ModelError(f"--lora: cannot load {lora}: {error}") from error


def weights_sha256(generator: DiffusersGenerator, lora: str | None, denoiser: str | None) -> str:
    """One hash over the pipeline folder and what is loaded on top of it.

    An adapter given by a hub id counts by its name.
    """
    assert generator.folder is not None
    digest = hashlib.sha256(fingerprint(generator.folder, ["."]).encode())
    for given in (lora, denoiser):
        path = Path(given).expanduser() if given else None
        if path is None or not path.exists():
            digest.update(repr(given).encode())
        elif path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).hexdigest().encode())
        else:
            digest.update(fingerprint(path, ["."]).encode())
    return digest.hexdigest()


def jobs(prompts: Sequence[str], settings: Settings, out: Path) -> Iterator[Job]:
    """``(file, prompt, noise seed)`` of every picture."""
    for number, prompt in enumerate(prompts):
        for image in range(settings.images_per_prompt):
            seed = derive(settings.seed, prompt, image, "generate")
            yield out / f"{number:05d}-{image:02d}.png", prompt, seed


def generate(
    generator: DiffusersGenerator,
    prompts: Sequence[str],
    settings: Settings,
    out: Path,
    console: Console,
) -> int:
    """Write ``NNNNN-MM.png`` and ``metadata.jsonl``; returns how many pictures were made now.

    Raises:
        DataError: ``out`` holds pictures of other prompts or settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    every = list(jobs(prompts, settings, out))
    claim(out, every, generator, settings)
    todo = [job for job in every if not job[0].exists()]
    columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(every), completed=len(every) - len(todo))
        for start in range(0, len(todo), settings.batch_size):
            part = todo[start : start + settings.batch_size]
            make(generator, part, settings)
            bar.update(task, advance=len(part))
    return len(todo)


def claim(
    out: Path, every: Sequence[Job], generator: DiffusersGenerator, settings: Settings
) -> None:
    """Write ``metadata.jsonl``, or check that the one there says the same."""
    options = generator.options
    rows = [
        {
            "file_name": file.name,
            "prompt": prompt,
            "noise_seed": seed,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "negative_prompt": settings.negative_prompt,
            "lora": settings.lora,
            "denoiser": settings.denoiser,
            "model": options.name_or_path,
            "revision": options.revision,
            "resolution": options.resolution,
            "dtype": options.dtype,
        }
        for file, prompt, seed in every
    ]
    metadata = out / "metadata.jsonl"
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    if metadata.exists() and metadata.read_text() != text:
        raise DataError(
            f"{out} holds pictures of other prompts, settings or another model",
            "choose another --out; nothing in it was touched",
        )
    metadata.write_text(text)


def make(generator: DiffusersGenerator, part: Sequence[Job], settings: Settings) -> None:
    """Sample one batch and save each picture under its final name only when it is whole."""
    inputs = generator.prepare_sampling(
        [prompt for _, prompt, _ in part],
        num_steps=settings.num_inference_steps,
        guidance=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
    )
    seeds = torch.tensor([seed for _, _, seed in part])
    media = generator.decode(generator.rollout(inputs, seeds, "policy").sample)
    for (file, _, _), medium in zip(part, media, strict=True):
        temporary = file.with_suffix(".tmp")
        to_image(medium).save(temporary, format="PNG")
        temporary.rename(file)
