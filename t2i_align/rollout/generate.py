"""Pictures or clips for a list of prompts, reproducible and resumable.

The noise of an image is a function of (seed, prompt, image number): the same prompt gives the same
picture in any list, at any batch position. Images that exist are kept, so an interrupted call
continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from rich.console import Console

from t2i_align.contract import Media
from t2i_align.data.media_io import to_image
from t2i_align.data.video import save_clip
from t2i_align.errors import DataError, ModelError, UserError
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_folder import fingerprint
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.optional import require
from t2i_align.plain_json import loads
from t2i_align.process.seeds import derive
from t2i_align.progress import progress

Job = tuple[Path, str, int]
FLAGS = {  # of recipe keys that have one
    "model.sample_size": "--size",
    "model.resolution": "--resolution",
    "model.num_frames": "--num-frames",
}


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
        lines = [x for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]
    except OSError as error:
        raise DataError(f"--prompts: cannot read {path}: {error.strerror}") from error
    except UnicodeError as error:
        raise DataError(f"--prompts: {path} is not UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        prompts = []
        for number, line in enumerate(lines, 1):
            try:
                prompts.append(_text(loads(line)["prompt"]))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"--prompts: {path}:{number} is no JSON object with a 'prompt'"
                ) from error
        lines = prompts
    if not lines:
        raise DataError(f"--prompts: {path} holds no prompts")
    return lines


def _text(value: Any) -> str:
    """A prompt; half a character (a lone surrogate) is none."""
    if not isinstance(value, str):
        raise TypeError(f"a prompt is text, got {type(value).__name__}")
    value.encode()
    return value


def read_size(text: str, resolution: int | None) -> tuple[int, int]:
    """Height and width of ``--size HxW``.

    Raises:
        UserError: it says something else, or a side is given besides.
    """
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text.strip().lower())
    if found is None:
        raise UserError(f"--size: '{text}' is no HxW", "give height and width: --size 768x1344")
    if resolution is not None:
        raise UserError("--size and --resolution both say how large", "give one of them")
    return int(found[1]), int(found[2])


def opened(options: DiffusersOptions, device: str) -> DiffusersGenerator:
    """The generator without weights; a size that does not fit is told by its option here.

    Raises:
        ModelError: no pipeline, or it does not generate this size.
    """
    try:
        return DiffusersGenerator(options, device)
    except ModelError as error:
        said = error.message
        for key, option in FLAGS.items():
            said = said.replace(key, option)
        fix = error.fix.replace("remove the key", "leave it out")
        fix = re.sub(r"\[(\d+), (\d+)\]", r"\1x\2", fix)
        raise ModelError(said, fix) from error


def load_weights(generator: DiffusersGenerator, lora: str | None, denoiser: str | None) -> None:
    """Load the base denoiser or a fully fine-tuned one instead of it, and an adapter on top.

    Args:
        generator: whose options from now on name ``denoiser``.
        lora: adapter folder, file or hub id.
        denoiser: folder of a fine-tuned denoiser; the base's own weights are not read then.

    Raises:
        ModelError: one of them cannot be loaded.
    """
    if denoiser is not None:
        other = {"denoiser_name_or_path": denoiser}
        generator.options = generator.options.model_copy(update=other)
    try:
        generator.load_module(0, reference=False)
    except ModelError as error:  # a recipe's key is an option here
        said = error.message.replace("model.denoiser_name_or_path", "--denoiser")
        raise ModelError(said, error.fix) from error
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


def jobs(
    prompts: Sequence[str], settings: Settings, out: Path, suffix: str = ".png"
) -> Iterator[Job]:
    """``(file, prompt, noise seed)`` of every picture or clip."""
    for number, prompt in enumerate(prompts):
        for image in range(settings.images_per_prompt):
            seed = derive(settings.seed, prompt, image, "generate")
            yield out / f"{number:05d}-{image:02d}{suffix}", prompt, seed


def generate(
    generator: DiffusersGenerator,
    prompts: Sequence[str],
    settings: Settings,
    out: Path,
    console: Console,
) -> int:
    """Write ``NNNNN-MM.png`` (clips: ``.mp4``) and ``metadata.jsonl``.

    Returns:
        How many were made now.

    Raises:
        DataError: ``out`` holds pictures of other prompts or settings.
        MissingDependencyError: clips, but the ``video`` extra is not installed.
    """
    clips = generator.layout.media == "video"
    if clips:
        require("av", "video", "writing clips")
    out.mkdir(parents=True, exist_ok=True)
    every = list(jobs(prompts, settings, out, ".mp4" if clips else ".png"))
    claim(out, every, generator, settings)
    missing = [job for job in every if not job[0].exists()]
    with progress(console, "generate", len(every), len(every) - len(missing)) as bar:
        for start in range(0, len(missing), settings.batch_size):
            part = missing[start : start + settings.batch_size]
            make(generator, part, settings)
            bar.advance(len(part))
    return len(missing)


def claim(
    out: Path, every: Sequence[Job], generator: DiffusersGenerator, settings: Settings
) -> None:
    """Write ``metadata.jsonl``, or check that the one there says the same."""
    options = generator.options
    video = {"num_frames": options.num_frames, "frame_rate": options.frame_rate}
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
            **({"size": list(options.sample_size)} if options.sample_size else {}),
            "dtype": options.dtype,
            "max_sequence_length": options.max_sequence_length,
            **(video if generator.layout.media == "video" else {}),
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
    """Sample one batch and save each item under its final name only when it is whole."""
    media = sample_media(
        generator,
        [prompt for _, prompt, _ in part],
        [seed for _, _, seed in part],
        num_steps=settings.num_inference_steps,
        guidance=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
    )
    for (file, _, _), medium in zip(part, media, strict=True):
        if medium.kind == "video":
            save_mp4(medium, file)
        else:
            save_png(to_image(medium), file)


def save_mp4(medium: Media, file: Path) -> None:
    """Write a clip that has its name only when it is whole."""
    temporary = file.with_suffix(".tmp")
    save_clip(medium.data, temporary, medium.meta["frame_rate"])
    temporary.rename(file)


def save_png(image: Image, file: Path) -> None:
    """Write a picture that has its name only when it is whole."""
    temporary = file.with_suffix(".tmp")
    image.save(temporary, format="PNG")
    temporary.rename(file)


def sample_images(
    generator: DiffusersGenerator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance: float,
    negative_prompt: str | None = None,
    bf16: bool = False,
) -> list[Image]:
    """Pictures of prompts under the policy's weights, in one batch; see :func:`sample_media`."""
    media = sample_media(
        generator,
        prompts,
        seeds,
        num_steps=num_steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        bf16=bf16,
    )
    return [to_image(medium) for medium in media]


def sample_media(
    generator: DiffusersGenerator,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance: float,
    negative_prompt: str | None = None,
    bf16: bool = False,
) -> list[Media]:
    """Pictures or clips of prompts under the policy's weights, in one batch.

    Args:
        generator: loaded.
        prompts: one a picture.
        seeds: of the noise, one a picture.
        num_steps: sampler steps.
        guidance: classifier-free guidance, 1 = off.
        negative_prompt: None for the pipeline's default.
        bf16: autocast all of it to bfloat16.
    """
    with torch.autocast(generator.device.type, torch.bfloat16, enabled=bf16):
        inputs = generator.prepare_sampling(
            prompts, num_steps=num_steps, guidance=guidance, negative_prompt=negative_prompt
        )
        rolled = generator.rollout(inputs, torch.tensor(seeds), "policy")
        return generator.decode(rolled.sample)
