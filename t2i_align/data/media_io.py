"""Media to files: the one place that knows what each kind looks like on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2i_align.contract import Media, MediaError
from t2i_align.data.video import save_clip

if TYPE_CHECKING:
    from torch import Tensor


def to_image(media: Media) -> Any:
    """An image medium ``(3, h, w)`` in [0, 1] as PIL.

    Raises:
        MediaError: it is something else.
    """
    from PIL import Image

    if media.kind != "image":
        raise MediaError(f"a picture is needed here, and this model makes {media.kind}")
    array = (media.data.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.asarray(array))


def image_grid(media: Sequence[Media]) -> Any:
    """All images of one size on one sheet, row by row."""
    from PIL import Image

    images = [to_image(m) for m in media]
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * width, (i // columns) * height))
    return sheet


def clip_grid(media: Sequence[Media]) -> Tensor:
    """All clips of one size side by side, row by row, as one clip ``(3, f, h, w)``."""
    import torch

    columns = math.ceil(math.sqrt(len(media)))
    blank = torch.ones_like(media[0].data)
    cells = [m.data for m in media] + [blank] * (-len(media) % columns)
    rows = [torch.cat(cells[i : i + columns], 3) for i in range(0, len(cells), columns)]
    return torch.cat(rows, 2)


def save_media(media: Sequence[Media], prompts: Sequence[str], stem: Path) -> Path:
    """Save a batch beside its prompts.

    A PNG sheet for images, an MP4 of all clips side by side, JSON for codes, NPZ for voxels.

    Args:
        media: equally many as ``prompts``, of one kind.
        prompts: written to ``<stem>.json``, or into the file itself for codes.
        stem: path without suffix; parents are created.

    Returns:
        The file written.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    kind = media[0].kind
    if kind == "codes":
        path = stem.with_suffix(".json")
        rows = [
            {"prompt": p, "codes": m.data.tolist()} for p, m in zip(prompts, media, strict=True)
        ]
        path.write_text(json.dumps(rows))
        return path
    stem.with_suffix(".json").write_text(json.dumps(list(prompts), ensure_ascii=False))
    if kind == "image":
        path = stem.with_suffix(".png")
        image_grid(media).save(path)
        return path
    if kind == "video":
        path = stem.with_suffix(".mp4")
        save_clip(clip_grid(media), path, media[0].meta["frame_rate"])
        return path
    path = stem.with_suffix(".npz")
    arrays: dict[str, Any] = {f"item_{i}": np.asarray(m.data) for i, m in enumerate(media)}
    np.savez_compressed(path, **arrays)
    return path
