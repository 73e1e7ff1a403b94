"""Opening images that strangers made, and fitting them to a square.

Opening is bounded: the header is checked before a pixel is decoded, so a small file cannot claim
all memory. EXIF orientation is applied, transparency is composited on white. Fitting is the
transform of the released trainers: resize the shorter side (bilinear, antialiased), crop, maybe
mirror, scale to [-1, 1].
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
    if not isinstance(data, bytes):
        data = _read(Path(data))
    if not data:
        raise MediaError("empty file (0 bytes)")
    if len(data) > MAX_BYTES:
        raise MediaError(f"{len(data) / 2**20:.0f} MiB; the limit is {MAX_BYTES >> 20} MiB")
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaError(f"more than {MAX_PIXELS / 1e6:.0f} megapixels by its header") from error
    except Exception as error:  # a broken header may raise anything inside a decoder
        raise MediaError(f"not an image (starts with {data[:8]!r})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        limit = f"{MAX_PIXELS / 1e6:.0f} megapixels"
        raise MediaError(f"{width} x {height} pixels by its header; the limit is {limit}")
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # as above
        raise MediaError(f"cannot decode this {image.format} file: {error}") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error.strerror}") from error


def _to_rgb(image: PILImage) -> PILImage:
    """RGB of any mode; 16-bit greys keep their high byte, transparency becomes white."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _resized(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Height and width after the shorter side became ``resolution``; the longer rounds down."""
    short = min(height, width)
    return resolution * height // short, resolution * width // short


def _corner(
    free: tuple[int, int], crop: Literal["center", "random"], seed_key: str
) -> tuple[int, int]:
    if crop == "center":
        return round(free[0] / 2), round(free[1] / 2)
    top = derive(0, seed_key, 0, "crop_top") % (free[0] + 1)
    return top, derive(0, seed_key, 0, "crop_left") % (free[1] + 1)


def fit(
    image: PILImage,
    resolution: int,
    crop: Literal["center", "random"],
    seed_key: str,
    flip: bool,
) -> tuple[Tensor, SizeInfo]:
    """A square tensor of an image.

    Args:
        image: RGB.
        resolution: side r of the square.
        crop: ``random`` is a function of ``seed_key``, so that the result can be cached.
        seed_key: content hash of the image.
        flip: mirror the crop; the crop's left edge is then that of the mirrored image, ``w - (x +
            r)``.

    Returns:
        Pixels ``(3, r, r)`` float32 in [-1, 1], and the size conditions.
    """
    import numpy as np
    from PIL import Image

    original = (image.height, image.width)
    height, width = _resized(*original, resolution)
    if height * width > MAX_PIXELS:
        raise MediaError(
            f"an image of {original[1]} x {original[0]} pixels is too long: resized it would be "
            f"{width} x {height}"
        )
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = _corner((height - resolution, width - resolution), crop, seed_key)
    image = image.crop((left, top, left + resolution, top + resolution))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = width - (left + resolution)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).mul(2).sub(1)
    return pixels.contiguous(), SizeInfo(original, (top, left), (resolution, resolution))
