"""Opening images that strangers made, and fitting them to a square or another shape.

Opening is bounded: the header is checked before a pixel is decoded, so a small file cannot claim
all memory. EXIF orientation is applied, transparency is composited on white. Fitting is the
transform of the released trainers: resize until the shape is covered, which for a square means
resizing the shorter side (bilinear, antialiased), crop, maybe mirror, scale to [-1, 1].
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from t2i_align.contract import MediaError
from t2i_align.process.seeds import derive

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

MAX_PIXELS = 64_000_000
MAX_BYTES = 64 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
ORIENTATION = 0x0112  # EXIF tag
TURNED = (5, 6, 7, 8)  # its values that swap height and width


@dataclass(frozen=True)
class SizeInfo:
    """SDXL's size conditions, each as (height, width) or (top, left), in pixels.

    Args:
        original_size: of the file, after EXIF orientation.
        crop_top_left: corner of the crop in the resized (and mirrored) image.
        target_size: of the crop.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


def open_image(data: bytes | str | Path) -> PILImage:
    """Decode an image file to RGB.

    Raises:
        MediaError: empty, not an image, truncated, over :data:`MAX_BYTES` or :data:`MAX_PIXELS`.
    """
    from PIL import ImageOps

    image = opened(data)
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a broken file may raise anything inside a decoder
        raise MediaError(f"cannot decode this {image.format} file: {error}") from error


def image_size(data: bytes | str | Path) -> tuple[int, int]:
    """True (height, width) of an image file, EXIF orientation applied, from its header.

    Only a format that may keep EXIF behind the pixels (PNG) is decoded for it.

    Raises:
        MediaError: as :func:`open_image`, as far as the header tells.
    """
    image = opened(data)
    width, height = image.size
    try:
        turned = image.getexif().get(ORIENTATION) in TURNED
    except Exception as error:  # as above
        raise MediaError(f"cannot decode this {image.format} file: {error}") from error
    return (width, height) if turned else (height, width)


def bounded(data: bytes | str | Path, limit: int) -> bytes:
    """The bytes of a medium's file, of which no more than ``limit + 1`` are ever read.

    Raises:
        MediaError: empty, no regular file, unreadable, or over the limit.
    """
    if not isinstance(data, bytes):
        data = _read(Path(data), limit)
    if not data:
        raise MediaError("empty file (0 bytes)")
    if len(data) > limit:
        raise MediaError(f"{len(data) / 2**20:.0f} MiB; the limit is {limit >> 20} MiB")
    return data


def _read(path: Path, limit: int) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise MediaError(f"{path} is no regular file")
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error.strerror}") from error


def opened(data: bytes | str | Path) -> PILImage:
    """An image whose header was read and is within bounds."""
    data = bounded(data, MAX_BYTES)
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaError(f"more than {MAX_PIXELS / 1e6:.0f} megapixels by its header") from error
    except Exception as error:  # a broken header may raise anything inside a decoder
        raise MediaError(f"not an image (starts with {data[:8]!r})") from error
    width, height = image.size
    if width < 1 or height < 1:
        raise MediaError(f"{width} x {height} pixels by its header")
    if width * height > MAX_PIXELS:
        limit = f"{MAX_PIXELS / 1e6:.0f} megapixels"
        raise MediaError(f"{width} x {height} pixels by its header; the limit is {limit}")
    return image


def to_rgb(image: PILImage) -> PILImage:
    """RGB of any mode; 16-bit greys keep their high byte, transparency becomes white."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _resized(original: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Height and width once the target is covered: one side equals it, the other rounds down."""
    (height, width), (to_height, to_width) = original, target
    if to_height * width >= to_width * height:
        return to_height, to_height * width // height
    return to_width * height // width, to_width


def _corner(
    free: tuple[int, int], crop: Literal["center", "random"], seed_key: str
) -> tuple[int, int]:
    if crop == "center":
        return round(free[0] / 2), round(free[1] / 2)
    top = derive(0, seed_key, 0, "crop_top") % (free[0] + 1)
    return top, derive(0, seed_key, 0, "crop_left") % (free[1] + 1)


def fit(
    image: PILImage,
    size: int | tuple[int, int],
    crop: Literal["center", "random"],
    seed_key: str,
    flip: bool,
) -> tuple[Tensor, SizeInfo]:
    """A tensor of one shape from an image of any.

    Args:
        image: RGB.
        size: (height, width) h, w of the crop, or the side of a square.
        crop: ``random`` is a function of ``seed_key``, so that the result can be cached.
        seed_key: content hash of the image.
        flip: mirror the crop; the crop's left edge is then that of the mirrored image, ``W - (x +
            w)`` with W the resized image's width.

    Returns:
        Pixels ``(3, h, w)`` float32 in [-1, 1], and the size conditions.
    """
    import numpy as np
    from PIL import Image

    original = (image.height, image.width)
    target = (size, size) if isinstance(size, int) else size
    height, width = _resized(original, target)
    if height * width > MAX_PIXELS:
        raise MediaError(
            f"an image of {original[1]} x {original[0]} pixels is too long: resized it would be "
            f"{width} x {height}"
        )
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = _corner((height - target[0], width - target[1]), crop, seed_key)
    image = image.crop((left, top, left + target[1], top + target[0]))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = width - (left + target[1])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).mul(2).sub(1)
    return pixels.contiguous(), SizeInfo(original, (top, left), target)
