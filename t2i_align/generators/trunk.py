"""What policy and reference have in common, computed once a step.

With adapters from block k on (``model.lora.from_block``) a network is a frozen trunk T below its
first adapted layer and a head above it, and both views share the trunk:

    (1)  policy(x) = h(T(x); adapters on)     reference(x) = h(T(x); adapters off)

So T(x) runs for the view that scores an event first, and the others continue from what it gave.
Nothing in it is trained, so the backward pass ends at the head whatever is shared. With F the FLOPs
of a forward, a share s of them in the trunk and b those of the head's backward,

    (2)  plain 2 F + b        shared (2 - s) F + b        saved s F

T needs no list of blocks: it is every call that ends before the first adapted layer is called. The
units that are kept are the largest modules without anything trained, so skip connections (outputs
of down blocks which up blocks read) and what of block k comes before its first adapter are in it.
What runs between units (sums, concatenations) runs again: it is cheap, and reads the same tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from t2i_align.contract import View


@dataclass(frozen=True)
class Kept:
    """What one call of a unit gave.

    Args:
        unit: the module.
        leaves: of the output.
        spec: its structure.
        versions: of the tensors then; one that was written to since is not what the call gave.
    """

    unit: nn.Module
    leaves: list[Any]
    spec: TreeSpec
    versions: list[int]

    @classmethod
    def of(cls, unit: nn.Module, output: Any) -> Kept:
        """Take down an output."""
        leaves, spec = tree_flatten(output)
        return cls(unit, leaves, spec, versions(leaves))

    @property
    def intact(self) -> bool:
        """Whether no tensor was written to."""
        return versions(self.leaves) == self.versions

    def output(self) -> Any:
        """The output, in containers of its own."""
        return tree_unflatten(self.leaves, self.spec)


def versions(leaves: list[Any]) -> list[int]:
    """How often each tensor was written to."""
    return [x._version for x in leaves if isinstance(x, Tensor)]


def is_adapted(module: nn.Module) -> bool:
    """Whether views differ in this very module: a peft layer, or trained parameters of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = any(p.requires_grad for p in module.parameters(recurse=False))
    return own or isinstance(module, BaseTunerLayer)


def is_called(module: nn.Module) -> bool:
    """Whether a module computes; a plain list of others does not."""
    return type(module).forward is not nn.Module.forward


def parts(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The largest modules that no view changes, and the adapted layers, both in tree order."""
    units: dict[int, nn.Module] = {}
    adapted: dict[int, nn.Module] = {}

    def walk(m: nn.Module) -> None:
        if is_adapted(m):
            adapted[id(m)] = m
        elif is_called(m) and not any(is_adapted(c) for c in m.modules()):
            units[id(m)] = m
        else:
            for child in m.children():
                walk(child)

    walk(module)
    return list(units.values()), list(adapted.values())


class Trunk:
    """Shares the trunk of one network among the views that score an event.

    Args:
        module: the policy network, whose adapters off are the reference.
    """

    def __init__(self, module: nn.Module) -> None:
        """Find what is trained and what is not."""
        self.module = module
        self.units, self.adapted = parts(module)
        self.view: View = "policy"
        self.recording = False  # inside a unit whose output is kept for another view
        self._below = False  # the first adapted layer has not been called yet
        self._calls: dict[View, int] = {}
        self._kept: list[list[Kept]] = []
        self._shapes: list[list[tuple[int, ...]]] = []
        self._place = (0, 0)
        self._first = True  # no other call has kept this one's trunk

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Around the scores of one event: every view calls the network on the same inputs."""
        self._calls, self._kept, self._shapes = {}, [], []
        with ExitStack() as stack:
            for unit in self.units:
                stack.enter_context(patched(unit, functools.partial(self._unit, unit)))
            for layer in self.adapted:
                hook = layer.register_forward_pre_hook(self._head)
                stack.callback(hook.remove)
            hook = self.module.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(self._forget)
            yield

    def _forget(self) -> None:
        self._below = False
        self._kept = []

    def _begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """A call of the network: the view's next one."""
        call = self._calls.get(self.view, 0)
        self._calls[self.view] = call + 1
        shapes = [tuple(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._first = call == len(self._kept)
        if self._first:
            self._kept.append([])
            self._shapes.append(shapes)
        elif shapes != self._shapes[call]:
            raise RuntimeError(f"call {call} of view {self.view} has other inputs than the first's")
        self._place, self._below = (call, 0), True

    def _head(self, *_: Any) -> None:
        """An adapted layer is called: from here on views differ."""
        self._below = False

    def _unit(self, unit: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A unit's call: kept, taken from what was kept, or simply made."""
        if not self._below:
            return forward(*args, **kwargs)
        call, at = self._place
        self._place = (call, at + 1)
        if self._first:
            return self._record(unit, call, forward, *args, **kwargs)
        kept = self._kept[call][at]
        if kept.unit is not unit:
            raise RuntimeError(f"view {self.view} calls its trunk in another order than the first")
        return kept.output() if kept.intact else forward(*args, **kwargs)

    def _record(
        self, unit: nn.Module, call: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self.recording = True
        try:
            with torch.no_grad():  # nothing in it is trained, so no view needs its graph
                output = forward(*args, **kwargs)
        finally:
            self.recording = False
        self._kept[call].append(Kept.of(unit, output))
        return output


@contextmanager
def patched(unit: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Let ``call(forward, *args, **kwargs)`` stand for a module's forward."""
    own = unit.__dict__.get("forward")  # a forward that was replaced already
    unit.forward = functools.partial(call, unit.forward)
    try:
        yield
    finally:
        if own is None:
            del unit.__dict__["forward"]
        else:
            unit.forward = own
