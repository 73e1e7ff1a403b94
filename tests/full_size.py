"""SDXL and SD3.5 medium at their true sizes with random bfloat16 weights, as folders of 6.7 GB.

python -m tests.full_size build sdxl|sd35 FOLDER
python -m tests.full_size train RECIPE
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.tiny import DDIM, clip_tokenizer

CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
}
CLIP_BIG_G |= {"num_attention_heads": 20, "projection_dim": 1280}


def text_config(sizes: dict[str, Any], activation: str) -> Any:
    """Full-size CLIP text tower; the vocabulary keeps its true 49,408 rows."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        hidden_act=activation,
        **sizes,
    )


def vae(channels: int, **scales: Any) -> Any:
    """The released VAEs' autoencoder; SD3's has 16 channels and neither of the 1x1 convolutions."""
    from diffusers import AutoencoderKL

    build: Any = AutoencoderKL
    return build(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=channels,
        sample_size=1024,
        **scales,
    )


@contextlib.contextmanager
def in_bfloat16() -> Iterator[None]:
    """Make networks in bfloat16 from a fixed seed."""
    torch.manual_seed(11)
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def sdxl() -> Any:
    """The pipeline; peak memory stays near the UNet's own 5.1 GB."""
    from diffusers import (
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from t2i_align.generators.known import SDXL_UNET

    with in_bfloat16():
        unet: Any = UNet2DConditionModel.from_config(SDXL_UNET)
        text = CLIPTextModel(text_config(CLIP_L, "quick_gelu"))
        text_2 = CLIPTextModelWithProjection(text_config(CLIP_BIG_G, "gelu"))
    euler = {k: v for k, v in DDIM.items() if k not in ("clip_sample", "set_alpha_to_one")}
    return StableDiffusionXLPipeline(
        vae=vae(4, scaling_factor=0.13025),
        text_encoder=text,
        text_encoder_2=text_2,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**euler),  # type: ignore[arg-type]
        add_watermarker=False,
    )


def sd35() -> Any:
    """The pipeline without T5, an option of the release (the denoiser sees 256 empty tokens)."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    from t2i_align.generators.known import SD35_MEDIUM_TRANSFORMER

    with in_bfloat16():
        transformer: Any = SD3Transformer2DModel.from_config(SD35_MEDIUM_TRANSFORMER)
        text = CLIPTextModelWithProjection(text_config(CLIP_L, "quick_gelu"))
        text_2 = CLIPTextModelWithProjection(text_config(CLIP_BIG_G, "gelu"))
    build: Any = StableDiffusion3Pipeline
    return build(
        transformer=transformer.to(torch.bfloat16),  # its table of positions is made in float32
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(
            16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=text,
        tokenizer=clip_tokenizer(),
        text_encoder_2=text_2,
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


PIPELINES = {"sdxl": sdxl, "sd35": sd35}


def build(name: str, folder: Path) -> Path:
    """Write a pipeline folder."""
    PIPELINES[name]().save_pretrained(folder)
    return folder


def digest(module: torch.nn.Module) -> str:
    """SHA-256 over every frozen weight."""
    import hashlib

    hasher = hashlib.sha256()
    for name, p in module.named_parameters():
        if not p.requires_grad:
            hasher.update(name.encode())
            hasher.update(p.detach().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def train(recipe: Path) -> dict[str, Any]:
    """Run a recipe and report what must have changed and what must not, and its memory."""
    from rich.console import Console

    from t2i_align.recipe import load_recipe
    from t2i_align.train.log import peak_memory
    from t2i_align.train.loop import Run
    from t2i_align.train.plan import plan
    from tests.measuring import Tracked

    loaded = load_recipe(recipe)
    planned = plan(loaded, "cpu")
    run = Run(loaded, Console(stderr=True))
    net = run.generator.module
    before, loaded_rss = digest(net), peak_memory(torch.device("cpu"))["peak_rss_gb"]
    with Tracked(run) as tracked:
        summary = run.run()
    largest = max(float(p.detach().abs().max()) for n, p in net.named_parameters() if "lora_B" in n)
    return {
        "frozen_equal": digest(net) == before,
        "largest_lora_B": largest,
        "parameters": sum(p.numel() for n, p in net.named_parameters() if "lora_" not in n),
        "seconds": summary["seconds"],
        "peak_rss_gb": summary["peak_rss_gb"],
        "loaded_rss_gb": loaded_rss,
        "alive_gb": round(tracked.peak / 1e9, 3),
        "planned_gb": {k: round(v / 1e9, 3) for k, v in planned.memory.items()},
    }


if __name__ == "__main__":
    import json

    if sys.argv[1] == "build":
        build(sys.argv[2], Path(sys.argv[3]))
    else:
        print(json.dumps(train(Path(sys.argv[2]))))
