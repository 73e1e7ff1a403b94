"""Qwen-Image: packed latents of a video VAE's single frame."""

from __future__ import annotations

from typing import Any

from t2i_align.generators.layouts import DIT_ATTENTION, Call, Config, FamilyLayout, Shapes


def qwen_sized(call: Call) -> dict[str, Any]:
    """Frames, rows and columns of tokens, one list an item."""
    num, _, h, w = call.x_t.shape
    return {"img_shapes": [[(1, h // 2, w // 2)]] * num}


def qwen_shapes(config: Config, length: int | None = None) -> Shapes:
    """512 (or ``length``) tokens at most of a vision-language model, and their mask."""
    num = length or 512
    return {
        "encoder_hidden_states": (num, config["joint_attention_dim"]),
        "encoder_hidden_states_mask": (num,),
    }


CITATION = """@article{wu2025qwen,
  title={{Qwen-Image} Technical Report},
  author={Wu, Chenfei and Li, Jiahao and Zhou, Jingren and others}, journal={arXiv:2508.02324},
  year={2025}
}"""

LAYOUTS = {
    "qwen_image": FamilyLayout(
        pipelines=("QwenImagePipeline",),
        denoiser="transformer",
        process="rectified",
        sample_arg="hidden_states",
        prediction="velocity",
        attention=DIT_ATTENTION,
        cond_shapes=qwen_shapes,
        time_factor=1e-3,
        codec="image_of_clip",
        packing="squares",
        channels=lambda config: config["in_channels"] // 4,
        factor=lambda vae: (2 ** len(vae.get("temperal_downsample", (1,) * 3)), 1),
        sized=qwen_sized,
        replaced=("img_shapes",),
        alone=True,
        text_mask="encoder_hidden_states_mask",
        branches="two_calls",
        combine="renormed",
        guidance_arg="true_cfg_scale",
        citation=CITATION,
    ),
}
