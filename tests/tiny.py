"""Tiny random pipelines of the real classes, saved as real folders.

What every model test runs on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes in CLIP's byte-level vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def clip_tokenizer(max_length: int = 77) -> Any:
    """A CLIPTokenizer over single bytes: any prompt tokenizes, nothing is downloaded."""
    from transformers import CLIPTokenizer

    letters = alphabet()
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {w: i for i, w in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=max_length)


def clip_config(dim: int, projection: int) -> Any:
    """Config of a two-layer CLIP text tower."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection,
        bos_token_id=512,
        eos_token_id=513,
        hidden_act="gelu",
    )


def vae(channels: int = 4, shift: float | None = None) -> Any:
    """AutoencoderKL with the usual factor 8."""
    from diffusers import AutoencoderKL

    build: Any = AutoencoderKL
    return build(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=32,
        scaling_factor=0.18215 if shift is None else 1.5305,
        shift_factor=shift,
    )


def unet(cross: int, **extra: Any) -> Any:
    """A two-level UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        norm_num_groups=4,
        attention_head_dim=extra.pop("attention_head_dim", 4),
        **extra,
    )


DDIM = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def sd15(prediction_type: str = "epsilon") -> Any:
    """StableDiffusionPipeline."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    build: Any = StableDiffusionPipeline
    return build(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(16, 16)).eval(),
        tokenizer=clip_tokenizer(),
        unet=unet(16),
        scheduler=DDIMScheduler(**DDIM, prediction_type=prediction_type),  # type: ignore[arg-type]
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(prediction_type: str = "epsilon") -> Any:
    """StableDiffusionXLPipeline with both text encoders and text_time conditions."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    euler = {k: v for k, v in DDIM.items() if k not in ("clip_sample", "set_alpha_to_one")}
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(16, 16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(16, 16)).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            32,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=EulerDiscreteScheduler(**euler, prediction_type=prediction_type),  # type: ignore[arg-type]
        add_watermarker=False,
    )


def sd3() -> Any:
    """StableDiffusion3Pipeline without T5 (an official option), shift 3."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    build: Any = StableDiffusion3Pipeline
    return build(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, shift=0.0609),
        text_encoder=CLIPTextModelWithProjection(clip_config(16, 16)).eval(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(16, 16)).eval(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


PIPELINES = {"sd": sd15, "sdxl": sdxl, "sd3": sd3}


def pipeline_folder(family: str, folder: Path, prediction_type: str = "epsilon") -> Path:
    """Build a pipeline from a fixed seed and save it."""
    torch.manual_seed(7)
    build: Any = PIPELINES[family]
    pipe = build() if family == "sd3" else build(prediction_type)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for p in part.parameters():
                if p.dim() > 1:
                    p.data.mul_(1.5)
    pipe.save_pretrained(folder)
    return folder


def llama_folder(folder: Path, num_codes: int = 32) -> Path:
    """A tiny Llama over bytes, START, END and codes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=258 + num_codes,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def voxel_folder(folder: Path) -> Path:
    """The suite's voxel DiT with TRELLIS shapes (8, 16, 16, 16)."""
    from t2i_align.generators.voxel_net import VoxelDiT

    torch.manual_seed(7)
    net = VoxelDiT()
    for block in net.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.05)  # type: ignore[union-attr]
    net.save_pretrained(folder)
    return folder
