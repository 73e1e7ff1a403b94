"""PixArt-alpha and PixArt-sigma (epsilon, with a learned variance that is left out), and Sana.

Both pipelines round sizes to a table of their own unless told not to; sizes are the recipe's here.
PixArt-alpha at 1024 px also takes size conditions, which follow the picture.
"""

from __future__ import annotations

from typing import Any

import torch

from t2i_align.generators.layouts import (
    DIT_ATTENTION,
    UNET_ATTENTION,
    Call,
    Config,
    FamilyLayout,
    Shapes,
)


def size_conditioned(config: Config) -> bool:
    """Whether the network takes size conditions: as it says, else where it was built for 1024 px.

    The prompts' cache does not tell: networks of both sizes share text encoders.
    """
    said = config.get("use_additional_conditions")
    return config.get("sample_size", 128) == 128 if said is None else said


def pixart_sized(call: Call) -> dict[str, Any]:
    """Resolution and aspect ratio of the picture, where the network was built for them."""
    if not size_conditioned(call.config):
        return {}
    num, _, h, w = call.x_t.shape
    size = torch.tensor([[h, w]], device=call.x_t.device) * call.factor[0]
    aspect = torch.tensor([[h / w]], device=call.x_t.device)
    dtype = call.cond["encoder_hidden_states"].dtype
    sizes = {"resolution": size.to(dtype), "aspect_ratio": aspect.to(dtype)}
    return {"added_cond_kwargs": {k: v.expand(num, -1) for k, v in sizes.items()}}


def pixart_shapes(config: Config, length: int | None = None) -> Shapes:
    """T5 tokens (or ``length``) and their mask: 300 of sigma, 120 of alpha.

    Sigma's networks say that they have no size conditions; alpha's leave it to their size.
    """
    sigma = config.get("use_additional_conditions") is False
    num = length or (300 if sigma else 120)
    shapes: Shapes = {
        "encoder_hidden_states": (num, config["caption_channels"]),
        "encoder_attention_mask": (num,),
    }
    if not sigma and config["sample_size"] == 128:
        shapes |= {"added_cond_kwargs.resolution": (2,), "added_cond_kwargs.aspect_ratio": (1,)}
    return shapes


def sana_shapes(config: Config, length: int | None = None) -> Shapes:
    """300 (or ``length``) Gemma tokens and their mask."""
    num = length or 300
    return {
        "encoder_hidden_states": (num, config["caption_channels"]),
        "encoder_attention_mask": (num,),
    }


PIXART_CITATION = """@inproceedings{chen2024pixart,
  title={{PixArt-alpha}: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image
  Synthesis},
  author={Chen, Junsong and Yu, Jincheng and Ge, Chongjian and others}, booktitle={ICLR},
  year={2024}
}"""
SANA_CITATION = """@inproceedings{xie2025sana,
  title={{SANA}: Efficient High-Resolution Text-to-Image Synthesis with Linear Diffusion
  Transformers},
  author={Xie, Enze and Chen, Junsong and Chen, Junyu and others}, booktitle={ICLR}, year={2025}
}"""

LAYOUTS = {
    "pixart": FamilyLayout(
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        denoiser="transformer",
        process="vp",
        sample_arg="hidden_states",
        prediction="scheduler",
        attention=UNET_ATTENTION,
        cond_shapes=pixart_shapes,
        sized=pixart_sized,
        call={"use_resolution_binning": False, "clean_caption": False},
        citation=PIXART_CITATION,
    ),
    "sana": FamilyLayout(
        pipelines=("SanaPipeline",),
        denoiser="transformer",
        process="rectified",
        sample_arg="hidden_states",
        prediction="velocity",
        attention=DIT_ATTENTION,
        cond_shapes=sana_shapes,
        time_config="timestep_scale",
        factor=lambda vae: (2 ** (len(vae.get("encoder_block_out_channels", (1,) * 6)) - 1), 1),
        call={"use_resolution_binning": False, "clean_caption": False},
        citation=SANA_CITATION,
    ),
}
