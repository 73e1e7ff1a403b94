"""Recomputing activations block by block: all blocks, some of them, or none.

diffusers' networks hand each block that may be recomputed to one function, which is ours, so that a
share of them can be chosen: with share s, block i (in the order of their first calls) is recomputed
where the integer part of s (i + 1) is more than that of s i, which spreads them evenly.

diffusers 0.42.1 calls the single blocks of Chroma without their attention mask when gradient
checkpointing is on, so gradients belong to another loss, and gives HunyuanImage's blocks arguments
by name that its checkpointing function does not take. There each block's own call is recomputed,
whatever its arguments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

NAME = "recomputed"  # attribute of a network whose blocks may be recomputed


class Recomputed:
    """Which blocks of a network keep their inputs only, and run again in the backward pass."""

    def __init__(self) -> None:
        """All of them."""
        self.share = 1.0
        self._places: dict[int, int] = {}

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        """A block's call, as diffusers makes it."""
        return self._run(block, block.__call__, *args)

    def _run(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's call, recomputed or not."""
        if not (torch.is_grad_enabled() and self.takes(block)):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def takes(self, block: nn.Module) -> bool:
        """Whether a block is among the share."""
        place = self._places.setdefault(id(block), len(self._places))
        return math.floor(self.share * (place + 1)) > math.floor(self.share * place)


def enable(net: Any, blocks: Sequence[str]) -> None:
    """Gradient checkpointing of a denoiser, of all its blocks until :func:`set_share` says less.

    Args:
        net: a diffusers model.
        blocks: its lists of blocks to recompute one by one; empty: the model's own way.
    """
    own = Recomputed()
    if not blocks:
        net.enable_gradient_checkpointing(own)
    for block in (block for name in blocks for block in getattr(net, name)):
        block.forward = functools.partial(own._run, block, block.forward)
    setattr(net, NAME, own)


def set_share(net: nn.Module, share: float) -> None:
    """Let a share of the blocks, 0 to 1, be recomputed.

    Raises:
        ValueError: the network was loaded without gradient checkpointing.
    """
    found = vars(net).get(NAME)
    if not isinstance(found, Recomputed):
        raise ValueError(f"{type(net).__name__} was loaded without gradient checkpointing")
    found.share = share
