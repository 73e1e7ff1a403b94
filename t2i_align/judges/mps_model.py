r"""The network of MPS: CLIP's tokens and a transformer in which picture tokens ask text tokens.

    I = W_v vision(x) of all tokens, T = W_t text(c) of all 77 places, C the same of a condition

    (1)  a_i = max_j <T_i, C_j>,   open_i = a_i / max_k a_k > threshold
    (2)  I <- I + cross(norm I, T, open) + swiglu(norm I)
         I <- I + self(norm I) + swiglu(norm I)                       both four times
    (3)  s = exp(logit_scale) cos(T_end, I_0)

Attention has many queries heads and one head of keys and values; that of pictures among themselves
is rotary. The maximum over k is over the places of one prompt. The released code takes it over the
whole batch, so that a prompt's mask depends on its neighbours; for a batch of one they are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_align.judges.key_map import num_layers

HEAD_WIDTH = 64
ASK, SELF = "cross_model.layers.{n}.0.fn.", "cross_model.layers.{n}.1.fn."
KEYS = (
    ("model.{rest}", "clip.{rest}"),
    (ASK + "norm.{rest}", "ask.{n}.norm.{rest}"),
    (ASK + "to_q.weight", "ask.{n}.query.weight"),
    (ASK + "to_kv.weight", "ask.{n}.key_value.weight"),
    (ASK + "to_out.weight", "ask.{n}.out.weight"),
    (ASK + "ff.0.weight", "ask.{n}.wide.weight"),
    (ASK + "ff.2.weight", "ask.{n}.narrow.weight"),
    (SELF + "norm.{rest}", "think.{n}.norm.{rest}"),
    (SELF + "fused_attn_ff_proj.weight", "think.{n}.all.weight"),
    (SELF + "attn_out.weight", "think.{n}.out.weight"),
    (SELF + "ff_out.1.weight", "think.{n}.narrow.weight"),
)
COUNTERS = (".position_ids", ".rotary_emb.inv_freq")  # buffers, no weights


def linear(into: int, out: int) -> nn.Linear:
    """A linear layer without bias."""
    return nn.Linear(into, out, bias=False)


def swiglu(x: Tensor) -> Tensor:
    """First half times the SiLU of the second."""
    value, gate = x.chunk(2, -1)
    return F.silu(gate) * value


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, turned: bool) -> Tensor:
    """Attention of ``(B, I, heads * 64)`` to one head of keys and values ``(B, J, 64)``.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: ``(B, J)``, keys that are open; None for all.
        turned: whether queries and keys are rotated by their places.
    """
    q = q.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
    k, v = k[:, None], v[:, None]
    if turned:
        q, k = rotary(q), rotary(k)
    weight = q @ k.transpose(-1, -2) / HEAD_WIDTH**0.5
    if mask is not None:
        weight = weight.masked_fill(~mask[:, None, None], -torch.inf)
    return (weight.softmax(-1) @ v).transpose(1, 2).flatten(2)


def rotary(x: Tensor) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) of ``(..., L, D)``, halves paired."""
    length, width = x.shape[-2:]
    steps = 10000.0 ** -(torch.arange(0, width, 2, device=x.device) / width)
    angle = torch.arange(length, device=x.device)[:, None] * steps
    cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angle.cos(), angle.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Ask(nn.Module):
    """Picture tokens attend to open text tokens; a feed-forward beside it."""

    def __init__(self, width: int, inner: int, wide: int) -> None:
        """Build; ``inner`` is heads * 64, ``wide`` twice the feed-forward's width."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.out = linear(width, inner), linear(inner, width)
        self.key_value = linear(width, 2 * HEAD_WIDTH)
        self.wide, self.narrow = linear(width, wide), linear(wide // 2, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """First line of Eq. (2)."""
        y = self.norm(x)
        k, v = self.key_value(text).chunk(2, -1)
        seen = self.out(attend(self.query(y), k, v, mask, turned=False))
        return x + seen + self.narrow(swiglu(self.wide(y)))


class Think(nn.Module):
    """Picture tokens attend to one another; a feed-forward beside it, all from one projection."""

    def __init__(self, width: int, inner: int, wide: int) -> None:
        """Build; arguments as of :class:`Ask`."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.parts = (inner, HEAD_WIDTH, HEAD_WIDTH, wide)
        self.all = linear(width, sum(self.parts))
        self.out, self.narrow = linear(inner, width), linear(wide // 2, width)

    def forward(self, x: Tensor) -> Tensor:
        """Second line of Eq. (2)."""
        q, k, v, wide = self.all(self.norm(x)).split(self.parts, -1)
        return x + self.out(attend(q, k, v, None, turned=True)) + self.narrow(swiglu(wide))


class MPSModel(nn.Module):
    """Eq. (1) to (3).

    Args:
        config: of transformers' CLIPModel.
        published: the weights by their published names, of which the sizes are read.
    """

    def __init__(self, config: Any, published: Mapping[str, Tensor]) -> None:
        """Build without loading."""
        from transformers import CLIPModel

        super().__init__()
        self.clip = CLIPModel(config)
        inner, width = published[ASK.format(n=0) + "to_q.weight"].shape
        wide = len(published[ASK.format(n=0) + "ff.0.weight"])
        depth = num_layers(published, ASK + "to_q.weight")
        self.ask = nn.ModuleList(Ask(width, inner, wide) for _ in range(depth))
        self.think = nn.ModuleList(Think(width, inner, wide) for _ in range(depth))

    def texts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """All places ``(B, L, E)`` and the end of text ``(B, E)``."""
        found = self.clip.text_model(input_ids=ids)
        project = self.clip.text_projection
        return project(found.last_hidden_state), project(found.pooler_output)

    def forward(self, pixels: Tensor, ids: Tensor, condition: Tensor, threshold: float) -> Tensor:
        """Scores ``(B,)`` float32.

        Args:
            pixels: ``(B, 3, s, s)`` as the vision tower takes them.
            ids: ``(B, L)``.
            condition: ``(1, L)``.
            threshold: of Eq. (1).
        """
        text, end = self.texts(ids)
        alike = (text @ self.texts(condition)[0][0].T).amax(-1)
        is_open = alike / alike.amax(-1, keepdim=True) > threshold
        x = self.clip.visual_projection(
            self.clip.vision_model(pixel_values=pixels).last_hidden_state
        )
        for ask, think in zip(self.ask, self.think, strict=True):
            x = think(ask(x, text, is_open))
        cosine = F.cosine_similarity(end.float(), x[:, 0].float(), dim=-1)
        return self.clip.logit_scale.float().exp() * cosine
