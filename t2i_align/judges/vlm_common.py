"""What the judges that ask vision-language models share: options, pictures, questions, answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from t2i_align.contract import Media, MediaError
from t2i_align.errors import ModelError
from t2i_align.judges.base import Scores, rgb
from t2i_align.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Talk = list[dict[str, Any]]
MAX_RATIO = 200  # of the sides of a picture; longer ones make some processors raise


class VLMOptions(Options):
    """Which model, and how much of it at once."""

    name_or_path: str | None = Field(
        default=None,
        description="folder (may be relative to the card's) or hub id of an image-text-to-text "
        "model; null: the card's folder",
    )
    revision: str | None = Field(default=None, description="commit of a hub id")
    max_pixels: int | None = Field(
        default=None, ge=1, description="larger pictures are shrunk to it, bicubic; null: never"
    )
    batch_size: int = Field(default=32, ge=1, description="pictures or pairs at once")


def paired(media: Sequence[Media], prompts: Sequence[str]) -> list[tuple[Media, str]]:
    """Each medium with its prompt.

    Raises:
        ValueError: they are not equally many.
    """
    if len(media) != len(prompts):
        raise ValueError(f"{len(media)} media and {len(prompts)} prompts; give one prompt each")
    return list(zip(media, prompts, strict=True))


def scores_of(found: Sequence[float | str]) -> Scores:
    """Numbers as they are; NaN and the reason where there is a text, or no finite number."""
    known = [
        f if isinstance(f, str) or math.isfinite(f) else f"the judge answered {f}" for f in found
    ]
    values = [math.nan if isinstance(f, str) else f for f in known]
    reasons = tuple(f if isinstance(f, str) else None for f in known)
    return Scores(torch.tensor(values, dtype=torch.float32), reasons)


def refuse_control(prompt: str, control: Sequence[str]) -> None:
    """Refuse a prompt that would be read as structure, and so could answer for itself.

    Args:
        prompt: about to be put into a question.
        control: texts that the tokenizer reads as ends of turns or places of pictures.

    Raises:
        MediaError: it holds one of them.
    """
    found = next((token for token in control if token in prompt), None)
    if found is not None:
        raise MediaError(f"the prompt holds '{found}', a control token of the judge")


def talk(images: Sequence[PILImage], text: str, slot: str = "") -> Talk:
    """Pictures, then a question, then the beginning of the answer if there is one."""
    content = [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]
    begun = [{"role": "assistant", "content": [{"type": "text", "text": slot}]}] if slot else []
    return [{"role": "user", "content": content}, *begun]


def capped(image: PILImage, max_pixels: int | None) -> PILImage:
    """A picture of at most that many pixels, sides in proportion."""
    from PIL import Image

    if max_pixels is None or image.width * image.height <= max_pixels:
        return image
    shrink = (max_pixels / (image.width * image.height)) ** 0.5
    size = (max(int(image.width * shrink), 1), max(int(image.height * shrink), 1))
    return image.resize(size, Image.Resampling.BICUBIC)


def picture(media: Media, max_pixels: int | None) -> PILImage:
    """An image medium as a model is shown it.

    Raises:
        MediaError: not a readable image, or one far longer than wide.
    """
    image = rgb(media)
    if max(image.size) > MAX_RATIO * min(image.size):
        size = f"{image.width} x {image.height}"
        raise MediaError(f"{size} pixels; one side may be {MAX_RATIO} times the other at most")
    return capped(image, max_pixels)


def read_template(folder: Path, inline: str | None, file: str, fields: Sequence[str]) -> str:
    """The question of a judge.

    Args:
        folder: the card's.
        inline: the text itself, if the options hold it.
        file: else a file, relative to the folder.
        fields: what must stand in it exactly once, e.g. ``{prompt}``.

    Raises:
        ModelError: there is no such file, or a field is missing or repeated.
    """
    try:
        text = (folder / file).read_text(encoding="utf-8").strip() if inline is None else inline
    except (OSError, UnicodeError) as error:
        raise ModelError(
            f"no prompt template at {folder / file}: {error}",
            "write the question into that file, or into the option 'template'",
        ) from error
    wrong = [field for field in fields if text.count(field) != 1]
    if wrong:
        raise ModelError(f"a template holds {', '.join(wrong)} exactly once, got {text!r}")
    return text
