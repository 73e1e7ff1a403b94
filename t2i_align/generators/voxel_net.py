"""A small dense voxel DiT with TRELLIS stage-1 conventions: ``forward(x, t, cond)``.

``x (B, 8, 16, 16, 16)`` latent voxels, ``t (B,)`` is 1000 times the noise level, ``cond (B, L, c)``
condition tokens. Blocks are adaLN-zero transformers (DiT, arXiv:2212.09748) with cross-attention to
the condition.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from t2i_align.generators.byte_text import NUM_BYTES


class Attention(nn.Module):
    """Multi-head attention with separate projections, so LoRA can target them by name."""

    def __init__(self, dim: int, context: int, heads: int) -> None:
        """Queries from ``dim``, keys and values from ``context``."""
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(context, dim)
        self.to_v = nn.Linear(context, dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """``(B, N, dim)`` attends over ``(B, M, context)``; ``mask (B, M)`` bool."""
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context))
        bias = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention, MLP; adaLN-zero on the first and last."""

    def __init__(self, dim: int, context: int, heads: int) -> None:
        """Gates start at zero, so a new block is the identity up to cross-attention."""
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim, elementwise_affine=False) for _ in range(3))
        self.attn = Attention(dim, dim, heads)
        self.cross = Attention(dim, context, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """``(B, N, dim) -> (B, N, dim)``."""
        s1, b1, g1, s2, b2, g2 = self.modulation(F.silu(time)).unsqueeze(1).chunk(6, -1)
        h = self.norms[0](x) * (1 + s1) + b1
        x = x + g1 * self.attn(h, h, None)
        x = x + self.cross(self.norms[1](x), context, mask)
        return x + g2 * self.mlp(self.norms[2](x) * (1 + s2) + b2)


class VoxelDiT(ModelMixin, ConfigMixin):
    """Velocity network over latent voxels.

    Args:
        channels: latent channels.
        size: side of the cube.
        patch: side of a token's patch.
        dim: width.
        depth: number of blocks.
        heads: attention heads.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 8,
        size: int = 16,
        patch: int = 4,
        dim: int = 48,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        """Learned positions; byte embedding of the condition."""
        super().__init__()
        self.embed = nn.Conv3d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 3, dim) * 0.02)
        self.text = nn.Embedding(NUM_BYTES + 1, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, dim, heads) for _ in range(depth))
        self.out = nn.Linear(dim, channels * patch**3)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, cond_mask: Tensor) -> Tensor:
        """Velocity ``(B, c, s, s, s)``; ``cond (B, L)`` byte ids, ``cond_mask (B, L)`` bool."""
        config: Any = self.config
        c, p, dim = config.channels, config.patch, config.dim
        tokens = self.embed(x)
        grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2) + self.position
        half = dim // 2
        freq = torch.exp(-math.log(1e4) * torch.arange(half, device=x.device) / half)
        angle = t.float()[:, None] * freq
        time = self.time(torch.cat([angle.cos(), angle.sin()], -1).to(x.dtype))
        context = self.text(cond)
        for block in self.blocks:
            tokens = block(tokens, time, context, cond_mask)
        y = self.out(tokens).unflatten(1, grid).unflatten(-1, (c, p, p, p))
        return y.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
