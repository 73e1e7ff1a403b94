"""Media and sizes a diffusers pipeline can take, and those it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from t2i_align.contract import Encoded, Media
from t2i_align.data.buckets import split_variant
from t2i_align.errors import ModelError
from t2i_align.generators.clip_masks import REAL_FRAMES, check_given, fill
from t2i_align.generators.diffusers_frozen import Size
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.layouts import FamilyLayout


def checked_size(
    options: DiffusersOptions,
    layout: FamilyLayout,
    config: Mapping[str, Any],
    factor: tuple[int, int],
) -> Size:
    """The size of generated media.

    Args:
        options: the recipe's ``model`` section.
        layout: of the family.
        config: of the denoiser.
        factor: pixels a latent pixel and frames a latent frame stand for.

    Raises:
        ModelError: what cannot be encoded, or cut into tokens, is refused.
    """
    step = factor[0] * layout.patch(config)
    if layout.denoiser == "unet":  # stock pipelines of UNets ask for it, whatever their VAE
        step = math.lcm(step, 8)
    nearest = lambda side: max(side // step, 1) * step  # noqa: E731
    height, width = options.sample_size or (options.resolution, options.resolution)
    if options.sample_size and (height % step or width % step or min(height, width) < step):
        raise ModelError(
            f"model.sample_size: {height} x {width} are not positive multiples of {step}",
            f"use [{nearest(height)}, {nearest(width)}]",
        )
    if options.resolution % step:
        raise ModelError(
            f"model.resolution: {options.resolution} is not a multiple of {step}",
            f"use {nearest(options.resolution)}",
        )
    if layout.media == "image" and options.num_frames != 1:
        raise ModelError("model.num_frames: this family makes pictures", "remove the key")
    if layout.causal:
        _check_frames(options.num_frames, factor[1], layout.patch_t(config))
    elif options.num_frames % factor[1]:
        raise ModelError(
            f"model.num_frames: {options.num_frames} is not a multiple of {factor[1]}",
            f"use {options.num_frames // factor[1] * factor[1] or factor[1]}",
        )
    check_given(options, layout, factor[1])
    return Size(height, width, options.num_frames)


def _check_frames(num_frames: int, k: int, p: int) -> None:
    """F frames have f = (F - 1) / k + 1 latent frames, in tokens of p: F = k (p m - 1) + 1."""
    latent = (num_frames - 1) // k + 1
    if (num_frames - 1) % k == 0 and latent % p == 0:
        return
    m = latent // p
    fits = [str(k * (p * i - 1) + 1) for i in (m, m + 1) if i > 0]
    rule = f"not one more than a multiple of {k}"
    if p > 1:
        rule = f"not {k} ({p} m - 1) + 1 for a whole m: a token holds {p} latent frames"
    raise ModelError(f"model.num_frames: {num_frames} is {rule}", f"use {' or '.join(fits)}")


def load(
    media: Media, variant: str, options: DiffusersOptions, layout: FamilyLayout, k: int = 1
) -> Encoded:
    """Decode, resize, crop and maybe mirror one picture or clip.

    Args:
        media: read from its file; see data/images.py and data/video.py.
        variant: name of the bucket and of the augmentation.
        options: the recipe's ``model`` section.
        layout: of the family; where it generates clips, a picture is a clip of one frame.
        k: frames a latent frame stands for.

    Returns:
        Pixels ``(3, h, w)`` or ``(3, f, h, w)``, SDXL's size conditions, and how many frames of a
        shorter clip are its own.
    """
    key = str(media.meta.get("key", ""))
    own = options.num_frames
    bucket, name = split_variant(variant)
    side, flip = bucket or options.resolution, name == "flip"
    if layout.media == "video":
        from t2i_align.data.video import load_clip

        num, cut = options.num_frames, options.short_clips == "skip"
        pixels, size = load_clip(media.data, num, side, options.crop, key, flip, whole=cut)
        own = pixels.shape[1]
        pixels = pixels if own == num else fill(pixels, options, layout, k)
    else:
        from t2i_align.data.images import fit, open_image

        pixels, size = fit(open_image(media.data), side, options.crop, key, flip)
    meta = {
        "original_size": list(size.original_size),
        "crop_top_left": list(size.crop_top_left),
        "target_size": list(size.target_size),
    }
    facts = {} if own == options.num_frames else {REAL_FRAMES: own}
    return Encoded({"pixels": pixels}, meta | facts)
