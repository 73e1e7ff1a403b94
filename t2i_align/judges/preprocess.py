"""From a picture to what a vision tower was trained on; two roads to the same numbers.

``image`` is the published road: RGB PIL, resized on bytes (or on floats where the publisher does
that), cropped or padded to a square, normalised. ``tensor`` is the same with gradients, for a batch
of floats: antialiased, clamped to [0, 1] where the published road rounds to bytes. The two differ
by that rounding and by PIL's fixed-point filter; each card has the tolerance.

    shortest   shorter side to s, longer cut off, centre kept          CLIP, PickScore
    longest    longer side to s, shorter padded with black             HPSv2
    squash     both sides to s                                         SigLIP, ViT, DreamSim

``floats`` marks a road that is published on floats (HPSv2): it neither rounds nor clamps, so both
functions give equal numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_align.contract import Media, MediaError
from t2i_align.data.images import MAX_PIXELS
from t2i_align.judges.base import Scores, rgb, score_each

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Triple = tuple[float, float, float]
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)


class Prepare(Protocol):
    """What makes inputs of pictures."""

    def image(self, image: PILImage) -> Tensor:
        """One RGB picture, ``(3, s, s)`` float32, by the published road."""
        ...

    def tensor(self, pixels: Tensor) -> Tensor:
        """``(B, 3, s, s)`` of ``(B, 3, h, w)`` in [0, 1], differentiable."""
        ...


@dataclass(frozen=True)
class Preprocess:
    """Resize, make square, normalise.

    Args:
        size: side s of the result.
        mode: how a picture becomes square, see the module.
        interpolation: filter of the resize.
        mean: of the normalisation, per channel.
        std: the same.
        enlarge: ``shortest`` resizes to round(s * enlarge) and crops s (DINO: 256 / 224).
        corner: of the crop: ``round`` half to even (torchvision) or ``floor`` (transformers).
        floats: the publisher resizes floats instead of bytes.
    """

    size: int
    mode: Literal["shortest", "longest", "squash"]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    enlarge: float = 1.0
    corner: Literal["round", "floor"] = "round"
    floats: bool = False

    def sized(self, size: int) -> Preprocess:
        """The same with another side."""
        return replace(self, size=size)

    def image(self, image: PILImage) -> Tensor:
        """One picture, ``(3, s, s)`` float32.

        Args:
            image: RGB.

        Raises:
            MediaError: so narrow that it would be huge once resized.
        """
        import numpy as np
        from PIL import Image

        height, width = self.resized(image.height, image.width)
        if height * width > MAX_PIXELS:
            raise MediaError(
                f"a picture of {image.width} x {image.height} pixels is too narrow: resized it "
                f"would be {width} x {height}"
            )
        if not self.floats:
            how = Image.Resampling[self.interpolation.upper()]
            image = image.resize((width, height), how)
            if self.mode == "shortest":  # while it is still bytes: the rest may be long
                top, left = self._corner(height, width)
                image = image.crop((left, top, left + self.size, top + self.size))
        # a copy: PIL's own memory is read-only
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return self._finish(self._resize(pixels) if self.floats else pixels)[0]

    def tensor(self, pixels: Tensor) -> Tensor:
        """A batch, ``(B, 3, s, s)`` float32, differentiable in the pixels.

        Args:
            pixels: ``(B, 3, h, w)`` in [0, 1].

        Raises:
            ValueError: another shape.
        """
        if pixels.dim() != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels are (B, 3, h, w) in [0, 1], got {tuple(pixels.shape)}")
        pixels = self._resize(pixels.float())
        return self._finish(pixels if self.floats else pixels.clamp(0, 1))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before the crop or the padding."""
        if self.mode == "squash":
            return self.size, self.size
        if self.mode == "longest":
            scale = self.size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        side, short = round(self.size * self.enlarge), min(height, width)
        return side * height // short, side * width // short

    def _resize(self, pixels: Tensor) -> Tensor:
        size = self.resized(pixels.shape[-2], pixels.shape[-1])
        if size == pixels.shape[-2:]:
            return pixels
        return F.interpolate(
            pixels, size=size, mode=self.interpolation, align_corners=False, antialias=True
        )

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the crop from the centre."""
        free = (height - self.size, width - self.size)
        if self.corner == "floor":
            return free[0] // 2, free[1] // 2
        return round(free[0] / 2), round(free[1] / 2)

    def _finish(self, pixels: Tensor) -> Tensor:
        """Crop or pad ``(B, 3, h, w)`` to the square and normalise."""
        if self.mode == "longest":
            down, right = (self.size - side for side in pixels.shape[-2:])
            top, left = down // 2, right // 2
            pixels = F.pad(pixels, (left, right - left, top, down - top))
        elif self.mode == "shortest":
            top, left = self._corner(pixels.shape[-2], pixels.shape[-1])
            pixels = pixels[..., top : top + self.size, left : left + self.size]
        mean, std = (torch.tensor(v, device=pixels.device) for v in (self.mean, self.std))
        return (pixels - mean[:, None, None]) / std[:, None, None]


PRESETS: dict[str, Preprocess] = {
    "clip": Preprocess(224, "shortest"),
    "clip_transformers": Preprocess(224, "shortest", corner="floor"),
    "hpsv2": Preprocess(224, "longest", floats=True),
    "siglip": Preprocess(384, "squash", mean=HALF, std=HALF),
    "vit": Preprocess(224, "squash", "bilinear", HALF, HALF),
    "dino": Preprocess(224, "shortest", "bicubic", IMAGENET_MEAN, IMAGENET_STD, 256 / 224),
    "unit": Preprocess(224, "squash", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
}


def score_pictures(
    media: Sequence[Media],
    prompts: Sequence[str],
    prepare: Prepare,
    value: Callable[[Tensor, list[str]], Tensor],
    batch_size: int,
) -> Scores:
    """One number a picture by the published road, without gradients.

    Args:
        media: B pictures.
        prompts: B prompts.
        prepare: makes the input of a network.
        value: numbers ``(n,)`` of inputs ``(n, 3, s, s)`` on the CPU and n prompts.
        batch_size: pictures at once.
    """

    @torch.inference_mode()
    def compute(images: list[Tensor], texts: list[str]) -> Tensor:
        return value(torch.stack(images), texts)

    return score_each(media, prompts, lambda m, _: prepare.image(rgb(m)), compute, batch_size)
