r"""Aspect buckets: a few shapes of about equal area, one of which every record is fitted to.

With r the recipe's resolution, s the step and (h, w) whole multiples of s between ``min_side`` and
``max_side``, the generated list holds

    (1)  all (h, w) with h w <= r^2, where neither side could grow by s without leaving (1) or
         ``max_side``, and max(h/w, w/h) <= ``max_aspect``

which always contains (r, r). A picture of true size (H, W) belongs to

    (2)  the bucket with the least |log(H/W) - log(h/w)|; among equals the largest

A record (a pair, a list, one item) has one bucket, that of its winner, and all its items are fitted
to it: they are compared at one shape though their files differ in size. Fitting covers the bucket
and crops what stands out; each item keeps its own original size and crop for SDXL's conditions.

In the media store an item at a bucket has the bucket's size in its key, so a picture in two records
of different buckets is two entries, and another list of buckets encodes only what is new in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pydantic import Field, model_validator

from t2i_align.errors import ModelError
from t2i_align.options import Options

Size = tuple[int, int]  # height, width in pixels
KEY = "model.aspect_buckets"
SHAPING = ("min_side", "max_side", "step", "max_aspect")  # what a generated list is made from


class BucketOptions(Options):
    """``model.aspect_buckets``; see ``data/buckets.py``."""

    min_side: int | None = Field(
        default=None, ge=8, description="shortest side in pixels; null: half of model.resolution"
    )
    max_side: int | None = Field(
        default=None, ge=8, description="longest side in pixels; null: twice model.resolution"
    )
    step: int = Field(
        default=64,
        ge=8,
        description="sides are multiples of it; itself a multiple of the VAE's downscaling times "
        "the denoiser's patch",
    )
    max_aspect: float = Field(
        default=2.0,
        ge=1,
        description="longest side over shortest; pictures beyond it are cropped to the nearest "
        "bucket and counted in the run's summary",
    )
    sizes: list[tuple[int, int]] | None = Field(
        default=None,
        min_length=1,
        description="the buckets themselves instead of a generated list, each [height, width]",
    )

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> BucketOptions:
        fields = type(self).model_fields
        extra = [name for name in SHAPING if getattr(self, name) != fields[name].default]
        if self.sizes is not None and extra:
            raise ValueError(f"sizes is the whole list, so {extra[0]} has nothing to say")
        if self.sizes is not None and len(set(self.sizes)) < len(self.sizes):
            raise ValueError("sizes names a bucket twice")
        return self


@dataclass(frozen=True)
class Buckets:
    """The shapes media are fitted to.

    Args:
        sizes: (height, width) of each.
        low: least height over width that is not beyond them.
        high: largest.
    """

    sizes: tuple[Size, ...]
    low: float
    high: float

    def nearest(self, size: Size) -> Size:
        """Eq. (2), of a picture's true (height, width)."""
        target = math.log(size[0] / size[1])

        def distance(bucket: Size) -> tuple[float, int, Size]:
            apart = abs(target - math.log(bucket[0] / bucket[1]))
            return round(apart, 9), -bucket[0] * bucket[1], bucket

        return min(self.sizes, key=distance)

    def beyond(self, size: Size) -> bool:
        """Whether a picture is narrower or wider than the buckets are meant for."""
        return not self.low <= size[0] / size[1] <= self.high


@runtime_checkable
class Bucketed(Protocol):
    """A generator that may fit its media to buckets.

    Where ``buckets`` is not None, the ``variant`` its ``load_media`` is given names the bucket too;
    see :func:`variant_at`.
    """

    @property
    def buckets(self) -> Buckets | None:
        """The shapes; None: one square."""
        ...


def buckets_of(generator: object) -> Buckets | None:
    """A generator's buckets, if it has any."""
    return generator.buckets if isinstance(generator, Bucketed) else None


def variant_at(size: Sequence[int], variant: str) -> str:
    """Name of a variant at a bucket, ``832x1216`` or ``832x1216+flip``; itself without one."""
    if not size:
        return variant
    height, width = size
    return f"{height}x{width}+{variant}" if variant else f"{height}x{width}"


def split_variant(name: str) -> tuple[Size | None, str]:
    """Inverse of :func:`variant_at`; variants' own names do not begin with a digit."""
    if not name[:1].isdigit():
        return None, name
    size, _, variant = name.partition("+")
    height, width = size.split("x")
    return (int(height), int(width)), variant


def generated(options: BucketOptions, resolution: int) -> list[Size]:
    """Eq. (1), narrowest first."""
    step, area = options.step, resolution**2
    low, high = _sides(options, resolution)

    def fits(height: int, width: int) -> bool:
        return height * width <= area and max(height, width) <= high

    sides = range(low, high + 1, step)
    found = [(h, w) for h in sides for w in sides if fits(h, w)]
    maximal = [(h, w) for h, w in found if not fits(h + step, w) and not fits(h, w + step)]
    return [(h, w) for h, w in maximal if max(h, w) <= options.max_aspect * min(h, w)]


def _sides(options: BucketOptions, resolution: int) -> Size:
    """Shortest and longest side; derived ones are rounded into the range, given ones are kept."""
    step = options.step
    low = -(-resolution // (2 * step)) * step if options.min_side is None else options.min_side
    high = 2 * resolution // step * step if options.max_side is None else options.max_side
    return low, high


Fault = tuple[str, str, str]  # key, what is wrong, what to do


def faults(options: BucketOptions, resolution: int, unit: int) -> list[Fault]:
    """What is wrong with buckets for a resolution and a network.

    Args:
        options: the recipe's.
        resolution: side of the square whose area is the limit.
        unit: pixels that sides must be multiples of.
    """
    if options.sizes is not None:
        return _faults_of_sizes(options.sizes, resolution, unit)
    step = options.step
    if step % unit:
        return [
            (
                f"{KEY}.step",
                f"got {step}, not a multiple of {unit} pixels",
                f"set it to {unit} or a multiple",
            )
        ]
    low, high = _sides(options, resolution)
    found: list[Fault] = []
    for name, side in (("min_side", low), ("max_side", high)):
        if side % step:
            fix = f"set it to {side // step * step or step} or {(side // step + 1) * step}"
            found.append((f"{KEY}.{name}", f"got {side}, not a multiple of step {step}", fix))
    if resolution % step:
        fix = f"set step to a divisor of {resolution}, or another resolution"
        found.append(
            (
                f"{KEY}.step",
                f"got {step}, but resolution {resolution} is not a multiple "
                "of it, so there would be no square bucket",
                fix,
            )
        )
    if not low <= resolution <= high:
        fix = f"let min_side be at most {resolution} and max_side at least {resolution}"
        found.append(
            (
                KEY,
                f"sides from {low} to {high} leave out the square of resolution {resolution}",
                fix,
            )
        )
    return found


def _faults_of_sizes(sizes: Sequence[Size], resolution: int, unit: int) -> list[Fault]:
    found: list[Fault] = []
    for number, (height, width) in enumerate(sizes):
        key, got = f"{KEY}.sizes[{number}]", f"got {height} x {width}"
        if min(height, width) < unit or height % unit or width % unit:
            fix = "sides are positive multiples of it"
            found.append((key, f"{got}, not multiples of {unit} pixels", fix))
        elif height * width > resolution**2:
            fix = "memory is planned for model.resolution: raise it, or choose a smaller bucket"
            found.append(
                (
                    key,
                    f"{got} = {height * width:,} pixels, more than resolution "
                    f"{resolution} squared = {resolution**2:,}",
                    fix,
                )
            )
    return found


def make_buckets(options: BucketOptions, resolution: int, unit: int) -> Buckets:
    """The buckets of a recipe; arguments as of :func:`faults`.

    Raises:
        ModelError: there are none for this resolution and network; says why.
    """
    wrong = faults(options, resolution, unit)
    if wrong:
        key, message, fix = wrong[0]
        raise ModelError(f"{key}: {message}", fix)
    if options.sizes is None:
        sizes = generated(options, resolution)
        return Buckets(tuple(sizes), 1 / options.max_aspect, options.max_aspect)
    aspects = [height / width for height, width in options.sizes]
    return Buckets(tuple(options.sizes), min(aspects), max(aspects))
