"""Which latent frames of a clip are scored: not padding, and not what was given.

A clip has n real frames of the F its model takes; the rest repeats the last one (``short_clips:
mask``). Of those n the first g may be given instead of generated, e.g. the picture that both clips
of a pair were made from (``given_frames``). With f(n) latent frames that n frames fill,

    (1)  f(n) = (n - 1) // k + 1   causal VAE: the first frame stands alone, then groups of k
         f(n) = n // k             other VAEs: whole groups of k
    (2)  latent frame j is scored where f(g) <= j < f(n)

and an error is the mean over the elements of (2) alone, so a clip weighs the same however short it
is. The network still sees all F, noised like the rest: the error is that of the scored frames
beside the others. Wan's and LTX's VAE make latent frames of what came before only, so scored ones
hold no padding at all; CogVideoX's norms mix a clip's frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2i_align.contract import MediaError
from t2i_align.errors import ModelError
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.layouts import FamilyLayout

SCORED = "scored"  # of a sample's state
REAL_FRAMES = "real_frames"  # of a shorter clip, in its cached facts


def check_given(options: DiffusersOptions, layout: FamilyLayout, k: int) -> None:
    """Refuse what leaves nothing to score.

    Args:
        options: the recipe's ``model`` section.
        layout: of the family.
        k: frames a latent frame stands for.

    Raises:
        ModelError: the given frames are all frames.
    """
    given, num = options.given_frames, options.num_frames
    if layout.latent_frames(given, k) >= layout.latent_frames(num, k):
        raise ModelError(
            f"model.given_frames: {given} of {num} frames leave no latent frame of {k} to score",
            "lower it",
        )


def fill(pixels: Tensor, options: DiffusersOptions, layout: FamilyLayout, k: int) -> Tensor:
    """Repeat the last frame of a clip ``(3, n, h, w)`` up to ``num_frames``.

    Raises:
        MediaError: it has no frame that could be scored.
    """
    num = pixels.shape[1]
    if layout.latent_frames(options.given_frames, k) >= layout.latent_frames(num, k):
        some = "1 frame" if num == 1 else f"{num} frames"
        raise MediaError(
            f"a clip of {some}, of which none is left to score: a latent frame stands for {k}, and "
            f"model.given_frames is {options.given_frames}"
        )
    return torch.cat([pixels, pixels[:, -1:].expand(-1, options.num_frames - num, -1, -1)], dim=1)


def scored(
    metas: Sequence[Mapping[str, Any]], options: DiffusersOptions, layout: FamilyLayout, k: int
) -> Tensor | None:
    """Eq. (2) for a batch, ``(B, 1, f, 1, 1)`` bool; None where everything is scored."""
    frames = [int(meta.get(REAL_FRAMES, options.num_frames)) for meta in metas]
    if not options.given_frames and min(frames) == options.num_frames:
        return None
    place = torch.arange(layout.latent_frames(options.num_frames, k))
    ends = torch.tensor([layout.latent_frames(n, k) for n in frames])
    inside = (place >= layout.latent_frames(options.given_frames, k)) & (place < ends[:, None])
    return inside[:, None, :, None, None]
