"""Lumina-Image 2.0 and Z-Image: their clock runs from noise (0) to data (1).

So they are told ``1 - t / 1000`` and predict data minus noise, the negative of the suite's
velocity.

Z-Image's pipeline guides at any scale above 0 and has c + g (c - u) for Eq. (1) of guidance.py, so
g is one less than other families'. Here, too, a scale of 1 or less means no guidance.
"""

from __future__ import annotations

from t2i_align.generators.layouts import UNET_ATTENTION, Config, FamilyLayout, Shapes


def lumina2_shapes(config: Config, length: int | None = None) -> Shapes:
    """256 (or ``length``) Gemma tokens and their mask."""
    num = length or 256
    return {
        "encoder_hidden_states": (num, config["cap_feat_dim"]),
        "encoder_attention_mask": (num,),
    }


def z_image_shapes(config: Config, length: int | None = None) -> Shapes:
    """512 (or ``length``) tokens of a language model at most, without padding."""
    return {"cap_feats": (length or 512, config["cap_feat_dim"]), "lengths.cap_feats": ()}


LUMINA2_CITATION = """@article{qin2025lumina,
  title={{Lumina-Image 2.0}: A Unified and Efficient Image Generative Framework},
  author={Qin, Qi and Zhuo, Le and Xin, Yi and others}, journal={arXiv:2503.21758}, year={2025}
}"""
Z_IMAGE_CITATION = """@article{zimage2025,
  title={{Z-Image}: An Efficient Image Generation Foundation Model with Single-Stream Diffusion
  Transformer},
  author={{Z-Image Team}}, journal={arXiv:2511.22699}, year={2025}
}"""

LAYOUTS = {
    "lumina2": FamilyLayout(
        pipelines=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
        denoiser="transformer",
        process="rectified",
        sample_arg="hidden_states",
        prediction="velocity",
        attention=UNET_ATTENTION,
        cond_shapes=lumina2_shapes,
        time_factor=-1e-3,
        time_offset=1.0,
        sign=-1,
        branches="two_calls",
        combine="renormed",
        counts=("encoder_attention_mask",),
        citation=LUMINA2_CITATION,
    ),
    "z_image": FamilyLayout(
        pipelines=("ZImagePipeline",),
        denoiser="transformer",
        process="rectified",
        sample_arg="x",
        time_arg="t",
        prediction="velocity",
        attention=UNET_ATTENTION,
        cond_shapes=z_image_shapes,
        time_factor=-1e-3,
        time_offset=1.0,
        sign=-1,
        packing="list",
        branches="cond_first",
        combine="beyond",
        no_guidance=0.0,
        citation=Z_IMAGE_CITATION,
    ),
}
