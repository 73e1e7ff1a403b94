"""A random model with SDXL's architecture, small enough for a CPU, for measuring layouts.

Widths are a fifth of SDXL's (64, 128, 256 channels for 320, 640, 1280), depths, attention and
conditioning are its own: 1, 2 and 10 transformer layers, text and time ids added to the time. The
VAE's width is chosen so that one encode costs what it does in SDXL at 1024 pixels, 0.72 of a
denoiser forward (4.88 of 6.76 TFLOP).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

RESOLUTION = 256
VAE_WIDTH = 28  # gives 0.733
VAE_SHARE, VAE_TOLERANCE = 0.72, 0.05  # FLOPs of an encode in denoiser forwards


def unet_config() -> dict[str, Any]:
    """Of UNet2DConditionModel."""
    return {
        "sample_size": RESOLUTION // 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [64, 128, 256],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [1, 2, 4],  # heads, as SDXL's config has it
        "cross_attention_dim": 512,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 64,
        "projection_class_embeddings_input_dim": 6 * 64 + 256,
    }


def vae_config(width: int) -> dict[str, Any]:
    """Of AutoencoderKL; channels are 1, 2, 4 and 4 times the width, as in SDXL."""
    return {
        "block_out_channels": [width, 2 * width, 4 * width, 4 * width],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": RESOLUTION,
        "scaling_factor": 0.13025,
    }


SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def index() -> dict[str, Any]:
    """Of the pipeline."""
    absent = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        **{name: [None, None] for name in absent},
    }


def build(folder: Path, width: int = VAE_WIDTH, seed: int = 0) -> Path:
    """Save a pipeline folder with random weights, text encoders left out; once."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    marker = folder / "model_index.json"
    if marker.is_file():
        return folder
    net: Any = UNet2DConditionModel
    vae: Any = AutoencoderKL
    scheduler: Any = EulerDiscreteScheduler
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net(**unet_config()).save_pretrained(folder / "unet")
        vae(**vae_config(width)).save_pretrained(folder / "vae")
    scheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    marker.write_text(json.dumps(index()))
    return folder
