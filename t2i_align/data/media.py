"""From a cell of a table to a Media, and from a Media to its content key.

Sources hand out media lazily: an image named by a path is a ``Media`` whose data is a ``Path``
until :func:`resolve` reads it, so a ranking of nine images of which two are used costs two reads.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from t2i_align.contract import Media, MediaError

CellKind = Literal["image", "video", "codes", "voxels"]
MAX_BYTES = 256 * 2**20


def cell_media(kind: CellKind, value: Any, folder: Path | None) -> Media:
    """A medium from a table cell.

    Args:
        kind: what the cell holds.
        value: image or video: bytes, Hugging Face's ``{bytes, path}`` or a path; codes: list of
            integers; voxels: nested list ``(c, d, h, w)`` or ``(d, h, w)``, the bytes of a ``.npy``
            file, or its path.
        folder: what relative paths start from.

    Raises:
        MediaError: the cell is empty or of another type.
    """
    if value is None:
        raise MediaError(f"no {kind} in this row")
    return _CELLS[kind](value, folder)


def _path(value: str, folder: Path | None) -> Path:
    """The file a row names; rows are a stranger's, so it lies in the folder they came with."""
    if "://" in value:
        raise MediaError(f"'{value}' is a URL; download the media first")
    if folder is None:
        raise MediaError(f"'{value}' is a file's name; a row of the hub brings its media as bytes")
    path = folder / value
    if not is_inside(path, folder):
        raise MediaError(
            f"'{value[:200]}' leads out of {folder}; rows may only name files there "
            "(data.image_dir: another folder)"
        )
    return path


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file, links followed, lies in a folder; files of a hub download may be links."""
    try:
        real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    except (ValueError, OSError):  # not a path at all
        return False
    homes = [root]
    if "snapshots" in root.parts:  # <repository>/snapshots/<revision>/... -> <repository>/blobs
        depth = len(root.parts) - root.parts[::-1].index("snapshots") - 1
        homes.append(Path(*root.parts[:depth], "blobs"))
    return any(real.is_relative_to(home) for home in homes)


def _file(kind: Literal["image", "video"], value: Any, folder: Path | None) -> Media:
    if isinstance(value, dict):
        data = value.get("bytes")
        return cell_media(kind, value.get("path") if data is None else data, folder)
    if isinstance(value, bytes | bytearray | memoryview):
        return Media(kind, bytes(value))
    if isinstance(value, str):
        return Media(kind, _path(value, folder))
    what = {"image": "an image", "video": "a video"}[kind]
    raise MediaError(f"{what} is bytes, {{bytes, path}} or a path, got {type(value).__name__}")


def _codes(value: Any, folder: Path | None) -> Media:
    try:
        codes = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MediaError(f"codes are a list of integers: {error}") from error
    if codes.dim() != 1 or codes.is_floating_point() or codes.numel() == 0:
        got = f"{codes.dtype} of shape {tuple(codes.shape)}"
        raise MediaError(f"codes are a non-empty list of integers, got {got}")
    return Media("codes", codes.long())


def _voxels(value: Any, folder: Path | None) -> Media:
    if isinstance(value, str):
        return Media("voxels", _path(value, folder))
    if isinstance(value, bytes):
        return Media("voxels", _grid(_numpy(io.BytesIO(value))))
    try:
        return Media("voxels", _grid(torch.tensor(value, dtype=torch.float32)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise MediaError(f"voxels are a nested list or a .npy array: {error}") from error


def _numpy(file: Any) -> Tensor:
    import numpy as np

    try:
        return torch.from_numpy(np.load(file, allow_pickle=False))
    except Exception as error:  # a broken file may raise anything inside the reader
        raise MediaError(f"not a readable .npy array ({error})") from error


def _grid(voxels: Tensor) -> Tensor:
    voxels = voxels.unsqueeze(0) if voxels.dim() == 3 else voxels
    if voxels.dim() != 4 or voxels.numel() == 0:
        raise MediaError(f"voxels have shape (c, d, h, w) or (d, h, w), got {tuple(voxels.shape)}")
    return voxels.float()


_CELLS: dict[CellKind, Callable[[Any, Path | None], Media]] = {
    "image": partial(_file, "image"),
    "video": partial(_file, "video"),
    "codes": _codes,
    "voxels": _voxels,
}


def resolve(media: Media) -> Media:
    """The medium with its file, if it is still a path, read.

    Raises:
        MediaError: the file is missing, unreadable or over :data:`MAX_BYTES`.
    """
    if not isinstance(media.data, Path):
        return media
    path = media.data
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise MediaError(f"{path} is no regular file")
        if about.st_size > MAX_BYTES:
            raise MediaError(f"{path.name}: larger than {MAX_BYTES >> 20} MiB")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise MediaError(f"missing file {path}") from error
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error.strerror}") from error
    if media.kind == "voxels":
        return replace(media, data=_grid(_numpy(io.BytesIO(data))))
    return replace(media, data=data)


def content_hash(media: Media) -> str:
    """sha256 of a resolved medium: the file's bytes, or dtype, shape and bytes of a tensor."""
    digest = hashlib.sha256(media.kind.encode() + b"\x00")
    if isinstance(media.data, Tensor):
        tensor = media.data.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}\x00".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    else:
        digest.update(media.data)
    return digest.hexdigest()
