"""torch.compile of the trained network, block by block or whole.

Compiled in place: parameter names, checkpoints and exports stay what they are. Policy and reference
(adapters off) are two graphs of one network, compiled at their first call. Regional compiles the
repeated block once for all its copies, so it starts several times sooner than the whole.
"""

from __future__ import annotations

import os
import shutil
from typing import Literal

from torch import nn

from t2i_align.errors import TrainingError
from t2i_align.generators.views import Views

How = Literal["none", "regional", "full"]
COMPILERS = {"cpu": ("CXX", ("g++", "clang++", "c++")), "cuda": ("CC", ("gcc", "clang", "cc"))}


def missing_compiler(device: str) -> str | None:
    """What torch.compile lacks on a device: it writes C++ for the CPU, and C beside CUDA kernels.

    Args:
        device: ``cpu`` or ``cuda``.

    Returns:
        A sentence that names what was looked for, None when it is there.
    """
    variable, names = COMPILERS[device]
    named = os.environ.get(variable)
    wanted = (named,) if named else names
    if any(shutil.which(name) for name in wanted):
        return None
    language = "C++" if device == "cpu" else "C"
    where = f" (${variable})" if named else f", and ${variable} names none"
    return f"torch.compile needs a {language} compiler on {device}: no {', '.join(wanted)}{where}"


def repeated_blocks(net: nn.Module) -> list[nn.Module]:
    """The blocks a network is built from, by the class names diffusers keeps with its models."""
    names = set(getattr(net, "_repeated_blocks", None) or [])
    names = names or set(getattr(net, "_no_split_modules", None) or [])
    return [m for m in net.modules() if type(m).__name__ in names]


def compile_views(views: Views, how: How) -> None:
    """Let the policy, and its frozen copy where there is one, compile at their first call.

    Raises:
        TrainingError: regional, but the network names no repeated block.
    """
    if how == "none":
        return
    views.trunk = None  # a compiled block is one call, from which nothing can be taken
    for net in {id(n): n for n in (views.module, views.reference) if n is not None}.values():
        parts = [net] if how == "full" else repeated_blocks(net)
        if not parts:
            raise TrainingError(
                f"train.compile: {type(net).__name__} names no repeated blocks to compile",
                "set train.compile: full, or none",
            )
        for part in parts:
            part.compile()
