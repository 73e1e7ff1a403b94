"""Cases whose text encoder is a large language model: FLUX.2, Qwen-Image, Z-Image, HunyuanImage."""

from __future__ import annotations

from tests.backbones import Case
from tests.tiny_language import flux2, flux2_klein, hunyuan_image, qwen_image, z_image

SHORT = {"max_sequence_length": 128}
CASES: tuple[Case, ...] = (
    Case("flux2", flux2, {"resolution": 64, **SHORT}, (64, 96), 4.0, SHORT, packs=False),
    Case(
        "flux2_klein", flux2_klein, {"resolution": 64, **SHORT}, (64, 96), call=SHORT, packs=False
    ),
    Case(
        "qwen_image",
        qwen_image,
        {"resolution": 48, **SHORT},
        (48, 80),
        call=SHORT,
        guidance_arg="true_cfg_scale",
        negative=" ",
        # the last block's text goes nowhere
        idle=("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"),
    ),
    Case("z_image", z_image, {"resolution": 64, **SHORT}, (64, 96), call=SHORT, no_guidance=0.0),
    Case("hunyuan_image", hunyuan_image, {"resolution": 64}, (64, 96), guidance_arg=None),
)
