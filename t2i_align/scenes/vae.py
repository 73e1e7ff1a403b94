"""The world's autoencoder: a stock AutoencoderKL with factor 4, trained from scratch on renders.

Loss: ``mean |x - x^| + mean (x - x^)^2 + 1e-4 KL``. Afterwards each latent channel is shifted and
scaled to mean 0 and variance 1 by folding the constants into ``quant_conv`` and
``post_quant_conv``, so any pipeline can use it with ``scaling_factor = 1`` (diffusion trains poorly
on channels of unequal variance).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_align.scenes.grammar import sample_prompts, scene_for
from t2i_align.scenes.render import render

CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "mid_block_add_attention": False,
    "sample_size": 64,
    "scaling_factor": 1.0,
}


def pictures(num: int, seed: int) -> Tensor:
    """``(num, 3, 64, 64)`` uint8 renders of training prompts."""
    rng = np.random.default_rng(seed)
    items = sample_prompts(num, seed, held_out=False)
    stack = np.stack([render(scene_for(m, rng), rng) for m in items])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def to_pixels(images: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def normalise(vae: Any, images: Tensor) -> None:
    """Fold per-channel mean and standard deviation of the latents into the 1 x 1 convolutions."""
    means = torch.cat([vae.encode(to_pixels(x)).latent_dist.mean for x in images.split(64)])
    mu, sd = means.mean((0, 2, 3)), means.std((0, 2, 3))
    channels = len(mu)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= sd.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mu) / sd
    quant.bias[channels:] -= 2 * sd.log()
    post.bias += post.weight[:, :, 0, 0] @ mu
    post.weight *= sd.view(1, -1, 1, 1)


def train_vae(
    out: Path, *, steps: int = 1500, batch: int = 24, num: int = 12000, seed: int = 0
) -> None:
    """Train, normalise and save; prints a line every 100 steps."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae: Any = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = pictures(num, seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
    start = time.time()
    for step in range(steps):
        rate = 2e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        x = to_pixels(images[torch.randint(num, (batch,))]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            psnr = -10 * math.log10(F.mse_loss(y, x).item() / 4)
            seconds = time.time() - start
            print(f"vae {step + 1}/{steps} {psnr:.1f} dB {seconds:.0f} s", flush=True)
    vae.eval().to(memory_format=torch.contiguous_format)
    normalise(vae, images[:2048])
    vae.save_pretrained(out)
