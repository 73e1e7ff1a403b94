r"""CogView4: size conditions as SDXL has them, text that nothing masks, and a clock of its own.

Its noise level sigma is a warp of the level s it is told, by a factor that grows with the number n
of a picture's tokens,

    (1)  sigma = k s / (1 + (k - 1) s),    k = base_shift + max_shift sqrt(n / base_image_seq_len)

(``time_shift_type: linear``; k is the exponential of that otherwise). Other flow models are told
sigma itself. The pipeline says so by handing its scheduler timesteps along with the sigmas.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from t2i_align.generators.layouts import UNET_ATTENTION, Call, Config, FamilyLayout, Shapes


def cogview4_sized(call: Call) -> dict[str, Any]:
    """The picture's own size as its original and target size, uncropped."""
    num, _, h, w = call.x_t.shape
    dtype = call.cond["encoder_hidden_states"].dtype
    size = torch.tensor([[h, w]], dtype=dtype, device=call.x_t.device) * call.factor[0]
    size = size.expand(num, -1)
    return {
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def cogview4_shift(scheduler: Config, num_tokens: int) -> float:
    """The factor k of Eq. (1)."""
    if not scheduler.get("use_dynamic_shifting"):
        return scheduler.get("shift", 1.0)
    growth = math.sqrt(num_tokens / scheduler.get("base_image_seq_len", 256))
    k = scheduler.get("base_shift", 0.25) + scheduler.get("max_shift", 0.75) * growth
    return k if scheduler.get("time_shift_type") == "linear" else math.exp(k)


def cogview4_shapes(config: Config, length: int | None = None) -> Shapes:
    """A prompt's GLM tokens, rounded up to a multiple of 16; some 64 as a middling prompt."""
    return {"encoder_hidden_states": (min(length or 1024, 64), config["text_embed_dim"])}


CITATION = """@misc{cogview4,
  author={{Z.ai}}, title={{CogView4}}, year={2025},
  howpublished={\\url{https://github.com/THUDM/CogView4}}
}"""

LAYOUTS = {
    "cogview4": FamilyLayout(
        pipelines=("CogView4Pipeline",),
        denoiser="transformer",
        process="rectified",
        sample_arg="hidden_states",
        prediction="velocity",
        attention=UNET_ATTENTION,
        cond_shapes=cogview4_shapes,
        told_shift=cogview4_shift,
        sized=cogview4_sized,
        replaced=("original_size", "target_size", "crop_coords"),
        alone=True,
        ragged=True,
        branches="two_calls",
        citation=CITATION,
    ),
}
