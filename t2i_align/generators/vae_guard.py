"""A VAE that overflows is an error, never a black picture."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i_align.errors import ModelError

FIX = (
    "set model.vae_dtype: float32 or bfloat16; for SDXL float16 also works with "
    "model.vae_name_or_path: madebyollin/sdxl-vae-fp16-fix"
)


def finite_pixels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Decoded pixels, unchanged.

    Clamping to [0, 1] would hide infinities, and judges would score what is left.

    Args:
        pixels: ``(B, ...)``.
        dtype: the VAE decoded in.

    Raises:
        ModelError: some are not finite; it says which items of the batch.
    """
    fine = pixels.flatten(1).isfinite().all(1)
    if not fine.all():
        bad = ", ".join(str(i) for i in (~fine).nonzero().flatten().tolist()[:8])
        name = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"the VAE decoded non-finite pixels in {name} (model.vae_dtype), items {bad} of "
            f"{len(pixels)}",
            FIX,
        )
    return pixels
