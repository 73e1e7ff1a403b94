"""How alike a picture and its reference are: CLIP-I and DINO of DreamBooth (arXiv:2208.12242).

    (1)  s = <f(x), f(r)> / (|f(x)| |f(r)|)

with f the projected embedding of OpenAI's ViT-B/32 (CLIP-I), or the first token of DINO's ViT-S/16
after its last layer norm (DINO). The reference r is the medium ``media.meta["reference"]``; a
picture without one has no score. A like background raises both numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.contract import Media, MediaError
from t2i_align.judges.base import Scores, rgb, score_each
from t2i_align.judges.preprocess import Preprocess
from t2i_align.judges.towers import Tower, TowerOptions, load_tower
from t2i_align.options import Options


def picture_and_reference(media: Media, prepare: Preprocess) -> Tensor:
    """Both prepared, ``(2, 3, s, s)``.

    Raises:
        MediaError: no reference, or one of the two is no picture.
    """
    reference = media.meta.get("reference")
    if not isinstance(reference, Media):
        raise MediaError("no reference picture: this judge compares with meta['reference']")
    try:
        second = prepare.image(rgb(reference))
    except MediaError as error:
        raise MediaError(f"the reference: {error}") from error
    return torch.stack([prepare.image(rgb(media)), second])


def compared(
    media: Sequence[Media],
    prompts: Sequence[str],
    prepare: Preprocess,
    alike: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
) -> Scores:
    """One number a picture and its reference.

    Args:
        media: B pictures with ``meta["reference"]``.
        prompts: B prompts, not read.
        prepare: makes the input of a network.
        alike: numbers ``(n,)`` of n inputs and their n references, each ``(n, 3, s, s)``.
        batch_size: pictures at once.
    """

    @torch.inference_mode()
    def compute(pairs: list[Tensor], _texts: list[str]) -> Tensor:
        both = torch.stack(pairs, 1)
        return alike(both[0], both[1])

    def read(medium: Media, _prompt: str) -> Tensor:
        return picture_and_reference(medium, prepare)

    return score_each(media, prompts, read, compute, batch_size)


class ReferenceOptions(TowerOptions):
    """Which tower."""

    batch_size: int = Field(32, ge=1, description="pictures at once, each with its reference")


class ReferenceCosine:
    """Eq. (1); see the module."""

    Options: ClassVar[type[Options]] = ReferenceOptions

    def __init__(
        self, folder: Path, options: ReferenceOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load nothing yet."""
        self.folder, self.options, self.device, self.dtype = folder, options, device, dtype

    @cached_property
    def tower(self) -> Tower:
        """The vision tower, shared with other judges of the same weights."""
        judge = self.folder.name
        return load_tower(self.options, self.folder, judge, self.device, self.dtype)

    @property
    def weights_sha256(self) -> str | None:
        """Hash of the tower's weights."""
        return self.tower.sha256

    def _alike(self, first: Tensor, second: Tensor) -> Tensor:
        seen = self.tower.trunk.images(torch.cat([first, second]))
        return F.cosine_similarity(*seen.chunk(2), dim=-1)

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str], references: Tensor) -> Tensor:
        """Scores ``(B,)`` float32, differentiable in pixels and references.

        Args:
            pixels: ``(B, 3, h, w)`` in [0, 1].
            prompts: B prompts, not read.
            references: ``(B, 3, h', w')`` in [0, 1].
        """
        prepare = self.tower.prepare
        return self._alike(prepare.tensor(pixels), prepare.tensor(references))

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a picture; NaN where ``meta["reference"]`` is missing."""
        batch = self.options.batch_size
        return compared(media, prompts, self.tower.prepare, self._alike, batch)
