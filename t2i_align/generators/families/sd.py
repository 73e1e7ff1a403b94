"""Stable Diffusion 1.x and 2.x, XL, 3 and 3.5."""

from __future__ import annotations

from t2i_align.generators.layouts import (
    DIT_ATTENTION,
    UNET_ATTENTION,
    Config,
    FamilyLayout,
    Shapes,
)


def sd_shapes(config: Config, length: int | None = None) -> Shapes:
    """CLIP hidden states."""
    return {"encoder_hidden_states": (77, config["cross_attention_dim"])}


def sdxl_shapes(config: Config, length: int | None = None) -> Shapes:
    """Hidden states of both encoders, the pooled vector, six time ids."""
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "encoder_hidden_states": (77, config["cross_attention_dim"]),
        "added_cond_kwargs.text_embeds": (pooled,),
        "added_cond_kwargs.time_ids": (6,),
    }


def sd3_shapes(config: Config, length: int | None = None) -> Shapes:
    """77 CLIP and 256 (or ``length``) T5 tokens, and the pooled vector."""
    return {
        "encoder_hidden_states": (77 + (length or 256), config["joint_attention_dim"]),
        "pooled_projections": (config["pooled_projection_dim"],),
    }


SD_CITATION = """@inproceedings{rombach2022high,
  title={High-Resolution Image Synthesis with Latent Diffusion Models},
  author={Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer,
  Bj{\\"o}rn}, booktitle={CVPR}, year={2022}
}"""
SDXL_CITATION = """@inproceedings{podell2024sdxl,
  title={{SDXL}: Improving Latent Diffusion Models for High-Resolution Image Synthesis},
  author={Podell, Dustin and English, Zion and Lacey, Kyle and Blattmann, Andreas and Dockhorn, Tim
          and M{\\"u}ller, Jonas and Penna, Joe and Rombach, Robin},
  booktitle={ICLR},
  year={2024}
}"""
SD3_CITATION = """@inproceedings{esser2024scaling,
  title={Scaling Rectified Flow Transformers for High-Resolution Image Synthesis},
  author={Esser, Patrick and Kulal, Sumith and Blattmann, Andreas and Entezari, Rahim and
  M{\\"u}ller, Jonas and others}, booktitle={ICML}, year={2024}
}"""

LAYOUTS = {
    "sd": FamilyLayout(
        pipelines=("StableDiffusionPipeline",),
        denoiser="unet",
        process="vp",
        sample_arg="sample",
        prediction="scheduler",
        attention=UNET_ATTENTION,
        cond_shapes=sd_shapes,
        citation=SD_CITATION,
    ),
    "sdxl": FamilyLayout(
        pipelines=("StableDiffusionXLPipeline",),
        denoiser="unet",
        process="vp",
        sample_arg="sample",
        prediction="scheduler",
        attention=UNET_ATTENTION,
        cond_shapes=sdxl_shapes,
        per_image={"added_cond_kwargs.time_ids": "sdxl_time_ids"},
        citation=SDXL_CITATION,
    ),
    "sd3": FamilyLayout(
        pipelines=("StableDiffusion3Pipeline",),
        denoiser="transformer",
        process="rectified",
        sample_arg="hidden_states",
        prediction="velocity",
        attention=DIT_ATTENTION,  # attn2 of SD3.5 medium's dual blocks, too
        cond_shapes=sd3_shapes,
        citation=SD3_CITATION,
    ),
}
