r"""Pairs for fitting a judge: read once, split by prompt, drawn as a function of (seed, step).

    batch of P pairs = winners' pictures, then losers'; with noise, both of a pair get

    (1)  x_l = a(l) x + s(l) eps,   l ~ U[min_level, max_level),   eps ~ N(0, 1)

with the same l and eps, so that a pair differs in nothing but the pictures (as SPO's preference
model is trained). Level and noise are functions of (seed, record, epoch). Files stay encoded in
memory and are decoded when used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_align.contract import Media, MediaError
from t2i_align.data.control import shuffled
from t2i_align.data.options import Pairing
from t2i_align.data.order import picks
from t2i_align.data.records import Record, as_layout
from t2i_align.errors import DataError
from t2i_align.judges.base import rgb
from t2i_align.judges.fit_options import NoiseOptions
from t2i_align.process.schedule import noised
from t2i_align.process.seeds import derive, normals, uniform01

# Pictures (2 P, 3, h, w) in [0, 1], levels (2 P,) and noise seeds (2 P,), equal for the two of a
# pair, and 2 P prompts, to what the judge sees, in [0, 1]; e.g. rollout.predictions.Predictions.
Degrade = Callable[[Tensor, Tensor, Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class PairBatch:
    """P pairs.

    Args:
        pixels: ``(2 P, 3, h, w)`` in [0, 1], winners first.
        prompts: 2 P prompts.
        preference: ``(P,)``, 1 or 0.5 for a tie.
        weight: ``(P,)``.
        level: ``(2 P,)``, or None without noise.
    """

    pixels: Tensor
    prompts: list[str]
    preference: Tensor
    weight: Tensor
    level: Tensor | None


def picture(media: Media, size: int | None) -> Tensor:
    """A medium as ``(3, h, w)`` uint8, cropped to a square when a size is given.

    Raises:
        MediaError: broken, or no image.
    """
    from PIL import Image, ImageOps

    image = rgb(media)
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Pairs:
    """Pairs of one split.

    Args:
        records: with layout ``pair``.
        size: see :func:`picture`.
        seed: the run's.
    """

    def __init__(self, records: Sequence[Record], size: int | None, seed: int) -> None:
        """Keep the records."""
        self.records, self.size, self.seed = list(records), size, seed

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.records)

    def step(self, number: int, count: int, noise: NoiseOptions | None, degrade: Any) -> PairBatch:
        """The batch of a step; arguments as of :meth:`batch`."""
        found = picks(number * count, count, len(self), self.seed)
        return self.batch(found, noise, degrade)

    def batch(
        self,
        at: Sequence[tuple[int, int]],
        noise: NoiseOptions | None = None,
        degrade: Degrade | None = None,
    ) -> PairBatch:
        """Some of the pairs.

        Args:
            at: (place, epoch) of each; the epoch makes the noise.
            noise: how levels are drawn and, without ``degrade``, mixed in; None for clean pictures.
            degrade: what makes noisy pictures instead.
        """
        records = [self.records[place] for place, _ in at]
        sides = [record.items[i] for i in (0, 1) for record in records]
        pixels = torch.stack([picture(item.media, self.size) for item in sides]).float() / 255
        prompts = [item.prompt for item in sides]
        level = None
        if noise is not None:
            low, span = noise.min_level, noise.max_level - noise.min_level
            keys = [(record.id, epoch) for record, (_, epoch) in zip(records, at, strict=True)]
            drawn = [low + span * uniform01(self.seed, *key, "level") for key in keys]
            level = torch.tensor(drawn, dtype=torch.float32).repeat(2)
            seeds = torch.tensor([derive(self.seed, *key, "noise") for key in keys]).repeat(2)
            make = degrade if degrade is not None else pixel_noise(noise)
            pixels = make(pixels, level, seeds, prompts)
        return PairBatch(
            pixels,
            prompts,
            torch.tensor([record.preference for record in records]),
            torch.tensor([record.weight for record in records]),
            level,
        )


def pixel_noise(options: NoiseOptions) -> Degrade:
    """Eq. (1) on the pixels themselves, in [-1, 1], clamped."""

    def degrade(pixels: Tensor, level: Tensor, seeds: Tensor, _prompts: Sequence[str]) -> Tensor:
        alpha, sigma = 1 - level, level
        if options.process == "variance_preserving":
            alpha, sigma = (0.5 * math.pi * level).cos(), (0.5 * math.pi * level).sin()
        eps = normals(seeds, pixels.shape[1:])
        return (0.5 + 0.5 * noised(2 * pixels - 1, eps, alpha, sigma)).clamp(0, 1)

    return degrade


def read_pairs(
    source: Any, pairing: Pairing, size: int | None
) -> tuple[list[Record], list[tuple[str, str]]]:
    """All pairs of a source, and (record, reason) of those that cannot be used.

    Raises:
        DataError: none can be, or sizes differ and none was asked for.
    """
    records: list[Record] = []
    skipped: list[tuple[str, str]] = []
    shape: tuple[int, ...] | None = None
    for record in (pair for found in source for pair in as_layout(found, "pairs", pairing)):
        try:
            shapes = {tuple(picture(item.media, size).shape) for item in record.items}
        except MediaError as error:
            skipped.append((record.id, str(error)))
            continue
        shape = shape or next(iter(shapes))
        if shapes != {shape}:
            raise DataError(
                f"record '{record.id}' has pictures of {sorted(s[:0:-1] for s in shapes)} pixels, "
                f"those before it of {shape[:0:-1]}",
                "set size to a number of pixels",
            )
        records.append(record)
    if not records:
        raise DataError(f"no pairs to fit on; {len(skipped)} unusable: {skipped[:3]}")
    return records, skipped + list(source.stats.skipped)


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out pairs; pairs of one prompt lie on one side.

    Raises:
        DataError: one side is empty although it should not be.
    """
    apart = [uniform01(seed, r.items[0].prompt, 0, "held_out") < share for r in records]
    kept = [r for r, out in zip(records, apart, strict=True) if not out]
    held = [r for r, out in zip(records, apart, strict=True) if out]
    if not kept or (share > 0 and not held):
        raise DataError(
            f"{len(records)} pairs split by prompt into {len(kept)} for training and {len(held)} "
            "held out",
            "give more prompts, or another fit.held_out",
        )
    return kept, held


def with_random_labels(records: Sequence[Record]) -> list[Record]:
    """The control: labels by a coin. Held-out pairs keep theirs, so that they can tell."""
    return [shuffled(record) for record in records]
