"""Frozen parts that wait in CPU memory and visit the device only while they work.

An online run decodes and encodes between training steps. Kept on the device, text encoders and VAE
take memory that the denoiser's activations need (SD3's and FLUX's T5 alone holds 4.7 billion
weights); loaded anew each time they cost seconds. Here each visit costs one copy over the bus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
HOME = torch.device("cpu")


class Options(Protocol):
    """What is asked of the recipe."""

    @property
    def offload_frozen(self) -> bool:
        """Whether parts go home after each visit."""
        ...


class Holder(Protocol):
    """Who holds frozen parts."""

    device: torch.device

    @property
    def options(self) -> Options:
        """The recipe's."""
        ...

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        ...


H = TypeVar("H", bound=Holder)
Method = Callable[Concatenate[H, P], R]


@contextmanager
def visit(parts: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Parts on the device for the duration of a block, home again after it, errors included."""
    try:
        for part in parts:
            part.to(device)
        yield
    finally:
        for part in parts:
            part.to(HOME)


def visiting(*prefixes: str) -> Callable[[Method[H, P, R]], Method[H, P, R]]:
    """Let a method of a :class:`Holder` run with some of the pipeline's parts on the device.

    Args:
        prefixes: how the names of those parts begin.
    """

    def decorate(method: Method[H, P, R]) -> Method[H, P, R]:
        @wraps(method)
        def _visited(self: H, *args: P.args, **kwargs: P.kwargs) -> R:
            if not self.options.offload_frozen:
                return method(self, *args, **kwargs)
            named = self.pipe.components.items()
            parts = [p for n, p in named if isinstance(p, nn.Module) and n.startswith(prefixes)]
            with visit(parts, self.device):
                return method(self, *args, **kwargs)

        return _visited

    return decorate
