"""``model.gradient_checkpointing: auto``: as little recomputation as a step fits into memory with.

A recomputed block costs a forward again, a third of a step at most, so it is bought only where the
memory plan says that the step would not fit without it:

    share = the first of 0, 1/4, 1/2, 3/4, 1 with planned peak <= budget, else 1

The plan runs the step on the meta device with each share, so the peak is that of the blocks that
are really recomputed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from t2i_align.generators.checkpointing import set_share
from t2i_align.recipe import Recipe
from t2i_align.train.trace import Traced

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
USABLE = 0.9  # of a device: kernels' own memory and the allocator's slack are not in the plan

Measured = tuple[Traced, dict[str, int]]


def budget(recipe: Recipe) -> float:
    """Bytes that a step may take."""
    asked = recipe.train.memory_gb
    if asked is not None:
        return asked * 1e9
    if torch.cuda.is_available():
        return USABLE * torch.cuda.get_device_properties(0).total_memory
    return USABLE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fitted(
    recipe: Recipe, net: nn.Module, measure: Callable[[], Measured]
) -> tuple[float | None, Measured]:
    """Choose the share of a network whose step can be measured; None where the recipe has chosen.

    Args:
        recipe: of the step.
        net: set to that share.
        measure: the step as the network is set.
    """
    if recipe.model.gradient_checkpointing != "auto":
        return None, measure()
    allowed, share, found = budget(recipe), 0.0, None
    for share in SHARES:
        set_share(net, share)
        found = measure()
        if found[1]["peak"] <= allowed:
            break
    assert found is not None
    return share, found


def told(share: float, peak: int, allowed: float) -> str:
    """One line for people."""
    what = f"{share:.0%} of the blocks" if share else "no block"
    text = f"gradient checkpointing: {what} recomputed; planned peak {peak / 1e9:.2f} GB"
    return text + (f" of {allowed / 1e9:.2f} GB" + (", which is too much" * (peak > allowed)))
