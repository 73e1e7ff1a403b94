"""Recomputing activations block by block, where a network's own way of doing so is wrong.

diffusers 0.42.1 calls the single blocks of Chroma without their attention mask when gradient
checkpointing is on, so gradients belong to another loss, and gives HunyuanImage's blocks arguments
by name that its checkpointing function does not take. Here each block's own call is recomputed,
whatever its arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(block: nn.Module) -> None:
    """Let a block keep its inputs only, and run again in the backward pass."""
    forward = block.forward

    @functools.wraps(forward)
    def _recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = _recomputed


def enable(net: Any, blocks: Sequence[str]) -> None:
    """Gradient checkpointing of a denoiser.

    Args:
        net: a diffusers model.
        blocks: its lists of blocks to recompute one by one; empty: the model's own way.
    """
    if not blocks:
        net.enable_gradient_checkpointing()
        return
    for name in blocks:
        for block in getattr(net, name):
            recompute(block)
