"""Tiny random pipeline folders of PixArt, Sana, Lumina 2, CogView4 and SD 3.5, as their hub repos.

Schedulers are configured as the released repositories configure theirs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.tiny import clip_config, clip_tokenizer, pipeline_folder, vae
from tests.tiny_flux import byte_tokenizer, flow_scheduler, save, t5

DIM = 32  # of every text encoder
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
GEMMA_START = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
GLM_START = {"pad_token": "<|endoftext|>", "bos_token": "[gMASK]", "unk_token": "<sop>"}


def started_tokenizer(special: dict[str, str], start: list[str], **more: Any) -> Any:
    """A byte tokenizer that puts ``start`` before every prompt."""
    from tokenizers import processors

    made = byte_tokenizer(**special)
    ids = [(word, made.convert_tokens_to_ids(word)) for word in start]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*start, "$A"]), special_tokens=ids
    )
    for name, value in more.items():
        setattr(made, name, value)
    return made


def gemma() -> dict[str, Any]:
    """Gemma 2 and its tokenizer, which starts with ``<bos>`` and has no end."""
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = started_tokenizer(GEMMA_START, ["<bos>"])
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=4096,
    )
    return {"text_encoder": Gemma2Model(config).eval(), "tokenizer": tokenizer}


def glm() -> dict[str, Any]:
    """GLM-4 and its tokenizer, padded on the left."""
    from transformers import GlmConfig, GlmModel

    start = ["[gMASK]", "<sop>"]
    tokenizer = started_tokenizer(GLM_START, start, padding_side="left")
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
    )
    return {"text_encoder": GlmModel(config).eval(), "tokenizer": tokenizer}


def pixart(folder: Path, *, sigma: bool = False, sized: bool = False) -> Path:
    """PixArtAlphaPipeline or PixArtSigmaPipeline.

    Args:
        folder: where.
        sigma: the latter.
        sized: with the size conditions of PixArt-alpha's 1024 px model, whose ``sample_size`` of
            128 is what makes the pipeline pass them.
    """
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    torch.manual_seed(7)
    transformer = PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=3,  # the size conditions share the width between three
        attention_head_dim=16,
        cross_attention_dim=48,
        caption_channels=DIM,
        sample_size=128 if sized or sigma else 8,
        interpolation_scale=2 if sigma else None,
        use_additional_conditions=False if sigma else None,
    )
    build: Any = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    pipe = build(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
        vae=vae(),
        text_encoder=t5(DIM),
        tokenizer=byte_tokenizer(),
    )
    save(pipe, folder)
    if sized:
        older_class(folder)
    return folder


def older_class(folder: Path) -> None:
    """Name the transformer as PixArt-alpha's repositories do, by the class it once had."""
    old, new = "Transformer2DModel", "PixArtTransformer2DModel"
    for name in ("model_index.json", "transformer/config.json"):
        path = folder / name
        path.write_text(path.read_text().replace(f'"{new}"', f'"{old}"'))


def deep_vae() -> Any:
    """AutoencoderDC with its factor 32, no posterior, and no attention before its last levels."""
    from diffusers import AutoencoderDC

    build: Any = AutoencoderDC
    widths = (8, 8, 8, 8, 16, 16)
    blocks = ["ResBlock"] * 4 + ["EfficientViTBlock"] * 2
    scales = ((),) * 4 + ((5,),) * 2
    return build(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=tuple(blocks),
        decoder_block_types=tuple(blocks),
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def sana(folder: Path) -> Path:
    """SanaPipeline with the solver of its hub repository, a flow shifted by 3."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(7)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=DIM,
        sample_size=4,
        **HEADS,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    build: Any = DPMSolverMultistepScheduler
    pipe = SanaPipeline(transformer=transformer, scheduler=build(**flow), vae=deep_vae(), **gemma())
    return save(pipe, folder)


def lumina2(folder: Path) -> Path:
    """Lumina2Pipeline with the static shift 6 of its hub repository."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(7)
    transformer = Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 64, 64),
        cap_feat_dim=DIM,
    )
    scheduler = flow_scheduler(use_dynamic_shifting=False, shift=6.0)
    pipe = Lumina2Pipeline(
        transformer=transformer, scheduler=scheduler, vae=vae(4, shift=0.1159), **gemma()
    )
    return save(pipe, folder)


def cogview4(folder: Path) -> Path:
    """CogView4Pipeline with the linear shift by size of its hub repository."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    torch.manual_seed(7)
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=DIM,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
        **HEADS,
    )
    scheduler = flow_scheduler(base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    pipe = CogView4Pipeline(transformer=transformer, scheduler=scheduler, vae=vae(4), **glm())
    return save(pipe, folder)


def sd35(folder: Path) -> Path:
    """StableDiffusion3Pipeline with T5, normed queries and the second attention of 3.5 medium."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(7)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        caption_projection_dim=32,
        joint_attention_dim=DIM,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **HEADS,
    )
    towers = [CLIPTextModelWithProjection(clip_config(8, 8)).eval() for _ in range(2)]
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=False, shift=3.0),
        vae=vae(4, shift=0.0609),
        text_encoder=towers[0],
        tokenizer=clip_tokenizer(),
        text_encoder_2=towers[1],
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(DIM),
        tokenizer_3=byte_tokenizer(),
    )
    return save(pipe, folder)


sd = partial(pipeline_folder, "sd")
sdxl = partial(pipeline_folder, "sdxl")
sd3 = partial(pipeline_folder, "sd3")
sd2 = partial(pipeline_folder, "sd", prediction_type="v_prediction")
