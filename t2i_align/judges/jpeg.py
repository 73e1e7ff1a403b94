r"""How small a picture becomes as a JPEG: the smoke test of rewards, without any weights.

With n the bytes of the picture encoded at quality 95,

    (1)  compressible    s = -n / 1000        flat, blurred pictures win; a blank one is the optimum
    (2)  incompressible  s = +n / 1000        noise wins

Both in kB, from the rewards of DDPO (Black et al. 2023, arXiv:2305.13301; kvablack/ddpo-pytorch
encodes with Pillow, chroma halved, as here). The number grows with the resolution and moves a
little between versions of Pillow, so compare pictures of one size and one environment.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from t2i_align.contract import Media, MediaError
from t2i_align.judges.base import Scores, rgb, score_each
from t2i_align.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


class JpegOptions(Options):
    """Which end is rewarded."""

    direction: Literal["compressible", "incompressible"] = Field(
        "compressible", description="Eq. (1): minus the size, or Eq. (2): the size"
    )
    quality: int = Field(95, ge=1, le=95, description="of the encoder; 95 in the published reward")


def jpeg_kilobytes(image: PILImage, quality: int = 95) -> float:
    """Size of an RGB picture as a JPEG, in units of 1000 bytes.

    Raises:
        MediaError: a side is too long for the format.
    """
    stream = io.BytesIO()
    try:
        image.save(stream, "JPEG", quality=quality)
    except OSError as error:
        raise MediaError(f"{image.width} x {image.height} pixels as JPEG: {error}") from error
    return stream.tell() / 1000


class JpegSize:
    """Eq. (1) or (2); prompts are ignored."""

    Options: ClassVar[type[Options]] = JpegOptions

    def __init__(
        self, folder: Path, options: JpegOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Nothing to load."""
        self.options = options
        self.sign = -1 if options.direction == "compressible" else 1

    @property
    def weights_sha256(self) -> None:
        """There are no weights."""
        return None

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a picture, in kB."""
        return score_each(media, prompts, self._value, lambda values, _: values)

    def _value(self, medium: Media, _prompt: str) -> float:
        return self.sign * jpeg_kilobytes(rgb(medium), self.options.quality)
