"""Architectures of released diffusion transformers, beside known.py's Stable Diffusion.

Configs as published with the weights; what is left out is the class's default. Parameter totals are
asserted by a test against the published sizes.
"""

from __future__ import annotations

from typing import Any

FLOW = {"num_train_timesteps": 1000}
DYNAMIC = FLOW | {"use_dynamic_shifting": True}

FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
FLUX2 = {
    "in_channels": 128,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "guidance_embeds": True,
}
CHROMA = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
}
PIXART_SIGMA = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "attention_head_dim": 72,
    "num_attention_heads": 16,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "attention_bias": True,
    "interpolation_scale": 2,
    "patch_size": 2,
    "use_additional_conditions": False,
}
SANA = {
    "in_channels": 32,
    "num_layers": 20,
    "attention_head_dim": 32,
    "num_attention_heads": 70,
    "cross_attention_head_dim": 112,
    "num_cross_attention_heads": 20,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "patch_size": 1,
    "timestep_scale": 1.0,
}
LUMINA2 = {
    "in_channels": 16,
    "hidden_size": 2304,
    "num_layers": 26,
    "num_attention_heads": 24,
    "num_kv_heads": 8,
    "cap_feat_dim": 2304,
    "patch_size": 2,
}
QWEN_IMAGE = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "patch_size": 2,
}
Z_IMAGE = {
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_lens": [1536, 512, 512],
    "all_patch_size": [2],
}
HUNYUAN_IMAGE = {
    "in_channels": 64,
    "num_layers": 20,
    "num_single_layers": 40,
    "attention_head_dim": 128,
    "num_attention_heads": 28,
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "guidance_embeds": False,
    "use_meanflow": False,
    "patch_size": [1, 1],
}
COGVIEW4 = {
    "in_channels": 16,
    "num_layers": 28,
    "attention_head_dim": 128,
    "num_attention_heads": 32,
    "text_embed_dim": 4096,
    "patch_size": 2,
}
WAN_1B = {
    "in_channels": 16,
    "num_layers": 30,
    "attention_head_dim": 128,
    "num_attention_heads": 12,
    "ffn_dim": 8960,
    "text_dim": 4096,
    "patch_size": [1, 2, 2],
}
LTX = {
    "in_channels": 128,
    "num_layers": 28,
    "attention_head_dim": 64,
    "num_attention_heads": 32,
    "caption_channels": 4096,
    "patch_size": 1,
    "patch_size_t": 1,
}
COGVIDEOX_2B = {
    "in_channels": 16,
    "num_layers": 30,
    "attention_head_dim": 64,
    "num_attention_heads": 30,
    "text_embed_dim": 4096,
    "max_text_seq_length": 226,
    "patch_size": 2,
}
COGVIDEOX_SCHEDULER = {
    "_class_name": "CogVideoXDDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
}
PIXART_SCHEDULER = FLOW | {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}

# hub id -> (pipeline class, transformer class, its config, the scheduler's)
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", "FluxTransformer2DModel", FLUX, DYNAMIC),
    "black-forest-labs/FLUX.2-dev": ("Flux2Pipeline", "Flux2Transformer2DModel", FLUX2, DYNAMIC),
    "lodestones/Chroma1-HD": ("ChromaPipeline", "ChromaTransformer2DModel", CHROMA, FLOW),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        PIXART_SIGMA,
        PIXART_SCHEDULER,
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": (
        "SanaPipeline",
        "SanaTransformer2DModel",
        SANA,
        FLOW | {"flow_shift": 3.0},
    ),
    "Alpha-VLLM/Lumina-Image-2.0": (
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        LUMINA2,
        FLOW | {"shift": 6.0},
    ),
    "Qwen/Qwen-Image": ("QwenImagePipeline", "QwenImageTransformer2DModel", QWEN_IMAGE, DYNAMIC),
    "Tongyi-MAI/Z-Image": (
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        Z_IMAGE,
        FLOW | {"shift": 6.0},
    ),
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": (
        "HunyuanImagePipeline",
        "HunyuanImageTransformer2DModel",
        HUNYUAN_IMAGE,
        FLOW,
    ),
    "THUDM/CogView4-6B": ("CogView4Pipeline", "CogView4Transformer2DModel", COGVIEW4, DYNAMIC),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        "WanPipeline",
        "WanTransformer3DModel",
        WAN_1B,
        FLOW | {"flow_shift": 3.0},
    ),
    "Lightricks/LTX-Video": ("LTXPipeline", "LTXVideoTransformer3DModel", LTX, DYNAMIC),
    "THUDM/CogVideoX-2b": (
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        COGVIDEOX_2B,
        COGVIDEOX_SCHEDULER,
    ),
}
