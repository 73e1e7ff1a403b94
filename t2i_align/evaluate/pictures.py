"""Pictures of a benchmark: where they lie, which noise each has, and what is there.

    <folder>/00000/metadata.jsonl, samples/0000.png     GenEval's layout, one folder a prompt

The noise of a picture is a function of (seed, prompt, k), k counting the pictures of that prompt
text in the benchmark's order: the same prompt gives the same pictures in any list, and two models
are compared on the same noise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from t2i_align.contract import MediaError
from t2i_align.data.images import open_image
from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Item, Picture
from t2i_align.plain_json import loads

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
STREAM = "evaluate"


def plan(items: Sequence[Item], per_prompt: int, folder: Path) -> list[Picture]:
    """Every picture a benchmark asks for, in its order.

    Args:
        items: its prompts.
        per_prompt: pictures of each.
        folder: that holds one folder a prompt.

    Raises:
        DataError: there are no prompts, two have one id, or an id is no name of a folder.
    """
    twice = [name for name, count in Counter(i.id for i in items).items() if count > 1]
    if twice or not items:
        raise DataError(f"prompts need ids of their own, twice: {', '.join(twice[:3]) or 'none'}")
    odd = [i.id for i in items if i.id in ("", ".", "..") or set(i.id) & set("/\\\0")]
    if odd:
        raise DataError(f"the prompt's id {odd[0]!r} is no name of a folder", "give it another id")
    return [
        Picture(item, number, folder / item.id / "samples" / f"{number:04d}.png")
        for item in items
        for number in range(per_prompt)
    ]


def draws(pictures: Sequence[Picture]) -> list[int]:
    """How many earlier pictures of its prompt text each has."""
    seen: Counter[str] = Counter()
    found = []
    for picture in pictures:
        found.append(seen[picture.item.prompt])
        seen[picture.item.prompt] += 1
    return found


def noise_seeds(pictures: Sequence[Picture], seed: int) -> list[int]:
    """The seed of each picture's noise."""
    from t2i_align.process.seeds import derive

    return [
        derive(seed, p.item.prompt, k, STREAM)
        for p, k in zip(pictures, draws(pictures), strict=True)
    ]


def chunks(count: int, size: int) -> list[range]:
    """Positions in pieces of a fixed size, which no number of processes splits."""
    return [range(count)[k : k + size] for k in range(0, count, size)]


def save(image: Image, picture: Picture) -> None:
    """Write a picture, whole or not at all, and its prompt's metadata beside it."""
    from t2i_align.rollout.generate import save_png

    folder = picture.file.parents[1]
    picture.file.parent.mkdir(parents=True, exist_ok=True)
    metadata, line = folder / "metadata.jsonl", metadata_line(picture.item)
    if not metadata.is_file() or metadata.read_bytes() != line.encode():  # torn by a killed run
        metadata.write_text(line)
    save_png(image, picture.file)


def metadata_line(item: Item) -> str:
    """What GenEval's reader finds beside the pictures of a prompt."""
    known = dict(item.metadata)
    return json.dumps({"tag": item.task, "prompt": item.prompt} | known) + "\n"


def given_folder(folder: Path) -> Path:
    """The folder of a user's ``--images``: an evaluation's ``images``, or itself.

    Raises:
        DataError: neither holds a picture or a folder.
    """
    for candidate in (folder / "images", folder):
        there = candidate.iterdir() if candidate.is_dir() else ()
        if any(p.is_dir() or p.suffix.lower() in SUFFIXES for p in there):
            return candidate
    raise DataError(
        f"--images: {folder} holds no pictures", "it needs <id>/samples/0000.png, <id>.png, ..."
    )


def check_prompts(pictures: Sequence[Picture]) -> None:
    """Refuse folders whose metadata name another prompt than the benchmark's.

    Raises:
        DataError: one does.
    """
    for picture in {p.item.id: p for p in pictures}.values():
        _check_prompt(picture)


def _check_prompt(picture: Picture) -> None:
    """Refuse a folder whose metadata name another prompt."""
    file = picture.file.parents[1] / "metadata.jsonl"
    if not file.is_file():
        return
    try:
        prompt = loads(file.read_text().partition("\n")[0])["prompt"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no JSON object with a prompt") from error
    if prompt != picture.item.prompt:
        raise DataError(
            f"{file} says {prompt!r}, the benchmark's prompt {picture.item.id} is "
            f"{picture.item.prompt!r}",
            "give the prompt file the pictures were made of: --set prompts=PATH",
        )


def read_picture(file: Path) -> Image:
    """A picture in RGB.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        return open_image(file)
    except MediaError as error:
        raise DataError(f"{file}: {error}", "delete it and run again") from error
