"""HunyuanImage 2.1: two text encoders with masks, and guidance by a component of its own.

Guidance of training and rollouts is the standard one; the pipeline's guider (adaptive projection)
combines the branches when pictures are generated.
"""

from __future__ import annotations

from typing import Any

import torch

from t2i_align.generators.layouts import DIT_ATTENTION, Call, Config, FamilyLayout, Shapes


def hunyuan_sized(call: Call) -> dict[str, Any]:
    """Nothing, but for a plan on the meta device.

    The network sorts both texts' tokens by their masks, which have no values there; so a plan has
    one text as long as both. It misses the projection of the second text.
    """
    second = call.cond.get("encoder_hidden_states_2")
    if not call.x_t.is_meta or second is None:
        return {}
    parts = ("encoder_hidden_states", "encoder_attention_mask")
    text, mask = (call.cond[name] for name in parts)
    num, length = second.shape[:2]
    more = text.new_zeros(num, length, text.shape[2]), mask.new_zeros(num, length)
    both = {
        name: torch.cat([x, y], 1) for name, x, y in zip(parts, (text, mask), more, strict=True)
    }
    return both | {name + "_2": None for name in parts}


def hunyuan_shapes(config: Config, length: int | None = None) -> Shapes:
    """1000 (or ``length``) tokens of a vision-language model, 128 of ByT5, and their masks."""
    num = length or 1000
    shapes: Shapes = {
        "encoder_hidden_states": (num, config["text_embed_dim"]),
        "encoder_attention_mask": (num,),
    }
    if config.get("text_embed_2_dim"):
        shapes |= {
            "encoder_hidden_states_2": (128, config["text_embed_2_dim"]),
            "encoder_attention_mask_2": (128,),
        }
    return shapes


CITATION = """@misc{hunyuanimage2025,
  author={{Tencent Hunyuan Team}},
  title={{HunyuanImage 2.1}: An Efficient Diffusion Model for High-Resolution Text-to-Image
  Generation},
  year={2025}, howpublished={\\url{https://github.com/Tencent-Hunyuan/HunyuanImage-2.1}}
}"""

LAYOUTS = {
    "hunyuan_image": FamilyLayout(
        pipelines=("HunyuanImagePipeline",),
        denoiser="transformer",
        process="rectified",
        sample_arg="hidden_states",
        prediction="velocity",
        attention=DIT_ATTENTION,
        cond_shapes=hunyuan_shapes,
        sized=hunyuan_sized,
        factor=lambda vae: (vae.get("spatial_compression_ratio", 32), 1),
        branches="two_calls",
        combine="guider",
        checkpoint_blocks=("transformer_blocks", "single_transformer_blocks"),
        citation=CITATION,
    ),
}
