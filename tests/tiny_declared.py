"""Tiny random folders of pipelines without a family, as their hub repos have them.

Text encoders are over bytes, schedulers configured as the released ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import DDIM, clip_config, clip_tokenizer, unet, vae
from tests.tiny_flux import byte_tokenizer, flow_scheduler, save, t5
from tests.tiny_video import COGVIDEOX_BETAS, umt5, wan_vae

DIM = 32  # of the T5 and UMT5 encoders
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
ALLEGRO_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 24}
VP: dict[str, Any] = dict(DDIM)
LINEAR: dict[str, Any] = {**DDIM, "beta_schedule": "linear"}
BETAS: dict[str, Any] = dict(COGVIDEOX_BETAS)
MOTION: dict[str, Any] = {"motion_num_attention_heads": 2, "motion_max_seq_length": 8}


def alt_diffusion(folder: Path) -> Path:
    """AltDiffusionPipeline: Stable Diffusion with an XLM-RoBERTa."""
    from diffusers import AltDiffusionPipeline, DDIMScheduler
    from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
        RobertaSeriesConfig,
        RobertaSeriesModelWithTransformation,
    )

    torch.manual_seed(7)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 77
    config = RobertaSeriesConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=80,
        project_dim=16,
        pad_token_id=0,
    )
    build: Any = AltDiffusionPipeline
    pipe = build(
        vae=vae(),
        text_encoder=RobertaSeriesModelWithTransformation(config).eval(),
        tokenizer=tokenizer,
        unet=unet(16),
        scheduler=DDIMScheduler(**VP),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipe, folder)


def motion_unet(cross: int, **extra: Any) -> Any:
    """A two-level UNetMotionModel."""
    from diffusers import UNetMotionModel

    return UNetMotionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=cross,
        num_attention_heads=2,
        norm_num_groups=4,
        **MOTION,
        **extra,
    )


def motion_adapter() -> Any:
    """What the motion modules of :func:`motion_unet` came from."""
    from diffusers import MotionAdapter

    return MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        **MOTION,
    )


def animate_diff(folder: Path, *, perturbed: bool = False) -> Path:
    """AnimateDiffPipeline, or the one with perturbed attention guidance."""
    from diffusers import AnimateDiffPAGPipeline, AnimateDiffPipeline, DDIMScheduler
    from transformers import CLIPTextModel

    torch.manual_seed(7)
    build: Any = AnimateDiffPAGPipeline if perturbed else AnimateDiffPipeline
    pipe = build(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(16, 16)).eval(),
        tokenizer=clip_tokenizer(),
        unet=motion_unet(16),
        motion_adapter=motion_adapter(),
        scheduler=DDIMScheduler(**LINEAR),
    )
    return save(pipe, folder)


def animate_diff_sdxl(folder: Path) -> Path:
    """AnimateDiffSDXLPipeline with both text encoders and text_time conditions."""
    from diffusers import AnimateDiffSDXLPipeline, DDIMScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(7)
    pipe = AnimateDiffSDXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(16, 16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(16, 16)).eval(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=motion_unet(
            32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        motion_adapter=motion_adapter(),
        scheduler=DDIMScheduler(**LINEAR),
    )
    return save(pipe, folder)


def any_flow_net(cls: Any, **extra: Any) -> Any:
    """A two-block transformer of the Wan kind that is told two times."""
    return cls(
        in_channels=4,
        out_channels=4,
        text_dim=DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        **extra,
    )


def any_flow(folder: Path) -> Path:
    """AnyFlowPipeline: a flow map, told where it goes, too."""
    from diffusers import (
        AnyFlowPipeline,
        AnyFlowTransformer3DModel,
        FlowMapEulerDiscreteScheduler,
    )

    torch.manual_seed(7)
    pipe = AnyFlowPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=umt5(),
        vae=wan_vae(False),
        transformer=any_flow_net(AnyFlowTransformer3DModel),
        scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
    )
    return save(pipe, folder)


def any_flow_far(folder: Path) -> Path:
    """AnyFlowFARPipeline: chunks of frames one after the other."""
    from diffusers import (
        AnyFlowFARPipeline,
        AnyFlowFARTransformer3DModel,
        FlowMapEulerDiscreteScheduler,
    )

    torch.manual_seed(7)
    net = any_flow_net(
        AnyFlowFARTransformer3DModel, chunk_partition=(1, 1), compressed_patch_size=(1, 4, 4)
    )
    pipe = AnyFlowFARPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=umt5(),
        vae=wan_vae(False),
        transformer=net,
        scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
    )
    return save(pipe, folder)


def allegro(folder: Path) -> Path:
    """AllegroPipeline; the VAE's tiles are of 24 frames, the smallest that it can have."""
    from diffusers import (
        AllegroPipeline,
        AllegroTransformer3DModel,
        AutoencoderKLAllegro,
        EulerAncestralDiscreteScheduler,
    )

    torch.manual_seed(7)
    transformer = AllegroTransformer3DModel(
        **ALLEGRO_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        caption_channels=DIM,
        sample_height=16,
        sample_width=16,
        sample_frames=6,
    )
    coder: Any = AutoencoderKLAllegro
    build: Any = AllegroPipeline
    pipe = build(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(DIM),
        vae=coder(
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            sample_size=128,
        ),
        transformer=transformer,
        scheduler=EulerAncestralDiscreteScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", timestep_spacing="linspace"
        ),
    )
    return save(pipe, folder)


def aura_flow(folder: Path) -> Path:
    """AuraFlowPipeline."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    torch.manual_seed(7)
    build: Any = AuraFlowPipeline
    pipe = build(
        tokenizer=byte_tokenizer(),
        text_encoder=umt5(),
        vae=vae(),
        transformer=AuraFlowTransformer2DModel(
            **HEADS,
            sample_size=8,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=DIM,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        scheduler=flow_scheduler(use_dynamic_shifting=False, shift=1.73),
    )
    return save(pipe, folder)


def bria(folder: Path) -> Path:
    """BriaPipeline."""
    from diffusers import BriaPipeline, BriaTransformer2DModel

    torch.manual_seed(7)
    build: Any = BriaPipeline
    pipe = build(
        transformer=BriaTransformer2DModel(
            **HEADS,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=DIM,
            axes_dims_rope=[4, 6, 6],
        ),
        scheduler=flow_scheduler(),
        vae=vae(4, shift=0.1159),
        text_encoder=t5(DIM),
        tokenizer=byte_tokenizer(),
    )
    return save(pipe, folder)


def bria_fibo(folder: Path) -> Path:
    """BriaFiboPipeline: every block reads a layer of its language model."""
    from diffusers import BriaFiboPipeline, BriaFiboTransformer2DModel
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    torch.manual_seed(7)
    tokenizer = byte_tokenizer(pad_token="<pad>", unk_token="<unk>")
    config = SmolLM3Config(
        vocab_size=128001,  # the pipeline gives empty prompts the token 128000
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformer = BriaFiboTransformer2DModel(
        **HEADS,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=32,
        text_encoder_dim=16,
        axes_dims_rope=[4, 6, 6],
    )
    build: Any = BriaFiboPipeline
    pipe = build(
        transformer=transformer,
        scheduler=flow_scheduler(),
        vae=wan_vae(True),
        text_encoder=SmolLM3ForCausalLM(config).eval(),
        tokenizer=tokenizer,
    )
    return save(pipe, folder)


def cogview3_plus(folder: Path) -> Path:
    """CogView3PlusPipeline."""
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogView3PlusPipeline,
        CogView3PlusTransformer2DModel,
    )

    torch.manual_seed(7)
    build: Any = CogView3PlusPipeline
    pipe = build(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(DIM),
        vae=vae(),
        transformer=CogView3PlusTransformer2DModel(
            **HEADS,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            text_embed_dim=DIM,
            time_embed_dim=16,
            condition_dim=8,
            pos_embed_max_size=16,
            sample_size=8,
        ),
        scheduler=CogVideoXDDIMScheduler(**BETAS, snr_shift_scale=4.0),
    )
    return save(pipe, folder)
