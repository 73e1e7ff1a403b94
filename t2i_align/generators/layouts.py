"""Families as data: what a pipeline's latents and denoiser call look like.

A layout says which component is the denoiser, how it is called, which process it was trained on and
how its latents are scaled. Conditioning is not described here: it is captured (capture.py). Adding
a family whose latents follow these rules is one entry of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from t2i_align.process.convert import Prediction

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]

UNET_ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
MMDIT_ATTENTION = [
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
]


@dataclass(frozen=True)
class FamilyLayout:
    """One denoiser family.

    Args:
        pipelines: pipeline class names (``_class_name`` of model_index.json) that have this layout.
        denoiser: component name of the denoiser.
        process: ``vp`` (discrete, the scheduler's betas) or ``rectified``.
        sample_arg: the denoiser's latent argument.
        time_arg: its time argument.
        prediction: what the network predicts; ``scheduler`` reads the scheduler's
            ``prediction_type``.
        time_scale: rectified only, the network's time at pure noise.
        attention: LoRA preset of ``target_modules: attention``.
        cond_shapes: conditioning shapes of one item from the denoiser's config and the option
            max_sequence_length, for planning
            without encoders.
        per_image: conditioning that belongs to the image, not the prompt: key -> rule of
            ``assemble``.
        citation: BibTeX of the family.
    """

    pipelines: tuple[str, ...]
    denoiser: Literal["unet", "transformer"]
    process: Literal["vp", "rectified"]
    sample_arg: str
    prediction: Prediction | Literal["scheduler"]
    attention: list[str]
    cond_shapes: Callable[[Config, int | None], Shapes]
    time_arg: str = "timestep"
    time_scale: float = 1000.0
    per_image: Mapping[str, str] = field(default_factory=dict)
    citation: str = ""


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

LAYOUTS: dict[str, FamilyLayout] = {
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
        attention=MMDIT_ATTENTION,
        cond_shapes=sd3_shapes,
        citation=SD3_CITATION,
    ),
}


def family_of(pipeline_class: str) -> str | None:
    """Name of the family a pipeline class belongs to, or None."""
    return next((name for name, f in LAYOUTS.items() if pipeline_class in f.pipelines), None)
