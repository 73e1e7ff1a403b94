"""Tiny random pipeline folders of Wan, LTX-Video and CogVideoX, and clips as files."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny_flux import byte_tokenizer, flow_scheduler, save, t5

WIDE: dict[str, Any] = {"num_attention_heads": 2, "num_layers": 2}
TEXT = 32  # width of the text encoders
COGVIDEOX_BETAS = {  # as in the hub's scheduler_config.json, but for the shift
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def umt5() -> Any:
    """A two-layer UMT5 encoder over bytes."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        d_model=TEXT, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=len(byte_tokenizer())
    )
    return UMT5EncoderModel(config).eval()


def wan_vae(residual: bool) -> Any:
    """Factor 8 in space (16 with the residual VAE's patches) and 4 in time, as the hub's."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(3)
    shape: dict[str, Any] = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    if residual:
        shape |= {
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        }
    return AutoencoderKLWan(
        z_dim=4,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.7, 0.1, 0.4, -0.2],
        latents_std=[1.4, 0.8, 1.9, 1.1],
        **shape,
    )


def wan(folder: Path, *, residual: bool = False, experts: int = 1) -> Path:
    """WanPipeline: 2.1, the 5B of 2.2 (``residual``), or the two experts of 2.2."""
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(7)
    nets = [
        WanTransformer3DModel(
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=TEXT,
            freq_dim=16,
            ffn_dim=32,
            **WIDE,
        )
        for _ in range(experts)
    ]
    scheduler: Any = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = WanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=umt5(),
        vae=wan_vae(residual),
        scheduler=scheduler,
        transformer=nets[0],
        transformer_2=nets[1] if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
        expand_timesteps=residual,
    )
    return save(pipe, folder)


def ltx_vae(timed: bool) -> Any:
    """Factor 8 in space and 2 in time; the decoder of later versions is told a time."""
    from diffusers import AutoencoderKLLTXVideo

    made = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        timestep_conditioning=timed,
    )
    made.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    made.latents_std.copy_(torch.tensor([1.2, 0.9, 1.5, 0.7]))
    return made


def ltx(folder: Path, *, timed: bool = False) -> Path:
    """LTXPipeline."""
    from diffusers import LTXPipeline, LTXVideoTransformer3DModel

    torch.manual_seed(7)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT,
        **WIDE,
    )
    pipe = LTXPipeline(
        scheduler=flow_scheduler(
            base_image_seq_len=1024, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
        vae=ltx_vae(timed),
        text_encoder=t5(TEXT),
        tokenizer=byte_tokenizer(),
        transformer=transformer,
    )
    return save(pipe, folder)


def cogvideox_scheduler(kind: str, shift: float) -> Any:
    """``ddim`` (the hub's 2B) or ``dpm`` (its 5B) with a shift of the signal-to-noise ratio."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    built: Any = CogVideoXDDIMScheduler if kind == "ddim" else CogVideoXDPMScheduler
    return built(**COGVIDEOX_BETAS, snr_shift_scale=shift)


def cogvideox(
    folder: Path, *, rotary: bool = False, frames: int | None = None, scheduler: str = "ddim"
) -> Path:
    """CogVideoXPipeline: 2B, 5B (``rotary``) or 1.5 (``frames`` latent frames a token)."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(7)
    transformer = CogVideoXTransformer3DModel(
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        patch_size_t=frames,
        patch_bias=frames is None,
        max_text_seq_length=24,
        use_rotary_positional_embeddings=rotary,
        **WIDE,
    )
    build: Any = AutoencoderKLCogVideoX
    vae = build(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=1.15258426,
        sample_height=32,
        sample_width=32,
    )
    pipe = CogVideoXPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(TEXT),
        vae=vae,
        transformer=transformer,
        scheduler=cogvideox_scheduler(scheduler, 1.0 if rotary else 3.0),
    )
    return save(pipe, folder)


wan_5b = partial(wan, residual=True)
wan_experts = partial(wan, experts=2)
ltx_timed = partial(ltx, timed=True)
cogvideox_5b = partial(cogvideox, rotary=True)
cogvideox_15 = partial(cogvideox, rotary=True, frames=2)


def moving(seed: int, num_frames: int, size: tuple[int, int]) -> list[np.ndarray]:
    """A smooth random picture that shifts to the right, each frame ``(h, w, 3)`` of bytes."""
    from PIL import Image

    height, width = size
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    base = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    return [np.roll(base, 2 * i, axis=1) for i in range(num_frames)]


def mp4(frames: list[np.ndarray], *, rate: int = 8, container: str = "mp4") -> bytes:
    """A clip as a video file; sides are even."""
    import av

    file = io.BytesIO()
    codec = {"mp4": "mpeg4", "webm": "libvpx-vp9"}[container]
    with av.open(file, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for array in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()
