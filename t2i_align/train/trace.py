"""One step of training run on the meta device: what is alive when, and how much is computed.

Nothing has data there, yet every tensor has a size and a life time, and autograd makes the same
graph. So a step is simply run, and of every operation is noted

    live bytes   the storages that it makes, each until nothing refers to it
    FLOPs        by the formulas of torch's FlopCounterMode (which itself, beside recomputed blocks,
                 keeps tensors alive longer than a run does)

The meta device knows neither mixed precision nor fused attention, so both are played here:

    autocast     matrix products in half precision, casts of trained float32 weights kept until the
                 block ends, on CUDA norms and powers in float32, on the CPU attention in float32
    attention    one operation that keeps q, k, v, the output and its log-sum-exp, no N x N matrix;
                 its backward computes five products, the scores once more among them

What kernels take inside (workspaces, the scores of unfused attention) is not seen.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from t2i_align.contract import DrawSpec, Event, Score, Seeds, TensorDict, View
from t2i_align.generators.scoring import DETACH
from t2i_align.protocols import Generator

Device = Literal["cpu", "cuda"]
PRODUCTS: frozenset[Any] = frozenset(
    {
        functional.linear,
        functional.conv1d,
        functional.conv2d,
        functional.conv3d,
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.einsum,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.Tensor.mm,
        torch.Tensor.bmm,
    }
)
EXACT: frozenset[Any] = frozenset(  # float32 under CUDA's autocast, as they come under the CPU's
    {
        functional.group_norm,
        functional.layer_norm,
        functional.softmax,
        torch.softmax,
        torch.pow,
        torch.exp,
        torch.Tensor.softmax,
        torch.Tensor.pow,
        torch.Tensor.__pow__,
        torch.Tensor.exp,
    }
)


class Precision(TorchFunctionMode):
    """Fused attention, and mixed precision where the run has it.

    Args:
        half: dtype of autocast, or None without.
        device: whose rules.
        keep: casts of trained weights until the block ends. Not in the backward pass, where only
            recomputed blocks compute by these rules, each in an autocast block of its own.
    """

    def __init__(self, half: torch.dtype | None, device: Device, *, keep: bool = True) -> None:
        """Nothing cast yet."""
        super().__init__()
        self.half, self.device, self.keep = half, device, keep
        self.kept: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch on what autocast would give it."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            if self.half is None or self.device == "cuda":
                args, kwargs = tree_map(self._lower, (args, kwargs))
                return attention(*args, **kwargs)
            args, kwargs = tree_map(self._raise, (args, kwargs))
            return attention(*args, **kwargs).to(self.half)
        if self.half is not None and func in PRODUCTS:
            args, kwargs = tree_map(self._lower, (args, kwargs))
        elif self.half is not None and self.device == "cuda" and func in EXACT:
            args, kwargs = tree_map(self._raise, (args, kwargs))
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        """Let go of the casts."""
        super().__exit__(*error)
        self.kept.clear()

    def _lower(self, x: Any) -> Any:
        if self.half is None or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if x.dtype == self.half:
            return x
        trained = x.is_leaf and x.requires_grad and x.dtype == torch.float32
        if not (self.keep and trained):
            return x.to(self.half)
        if id(x) not in self.kept:
            self.kept[id(x)] = x.to(self.half)
        return self.kept[id(x)]

    def _raise(self, x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype == self.half else x


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` as a fused kernel accounts for it, ``(..., N, d)``."""
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    heads = [as_heads(x) for x in (query, key, value)]
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    return out if query.dim() == 4 else out.view(*query.shape[:-1], value.shape[-1])


def as_heads(x: Tensor) -> Tensor:
    """``(..., N, d)`` with the four dimensions that the kernel takes."""
    return x if x.dim() == 4 else x.flatten(0, -3)[None]


class Live(TorchDispatchMode):
    """Bytes of all storages that operations made and something still refers to, and FLOPs.

    Args:
        known: tensors that are counted elsewhere.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """Nothing made yet."""
        super().__init__()
        self.bytes = self.peak = self.flops = 0
        self._refs: dict[int, Any] = {x.untyped_storage()._cdata: None for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it made."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        self.flops += 0 if formula is None else formula(*args, **kwargs, out_val=out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        return out

    def hold(self, event: Event) -> None:
        """Count what an event was made of before."""
        for x in tree_leaves(vars(event)):
            if isinstance(x, Tensor):
                self.add(x)

    def add(self, x: Tensor) -> None:
        """Count a tensor's storage, once, as long as it lives."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._refs:
            return
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def gone(_: Any) -> None:
            self.bytes -= size
            del self._refs[key]

        self._refs[key] = weakref.ref(storage, gone)


class Look(NamedTuple):
    """How a step is looked at.

    Args:
        half: dtype of autocast, or None.
        device: whose autocast.
        guidance: classifier-free guidance inside the score, 1 = off.
        detach: no gradient through the unconditional branch.
        accumulated: gradients of earlier micro-batches are there already.
    """

    half: torch.dtype | None = None
    device: Device = "cpu"
    guidance: float = 1.0
    detach: bool = False
    accumulated: bool = False


class Traced(NamedTuple):
    """One micro-batch in numbers, weights and optimizer apart.

    Args:
        activations: bytes alive at the end of the policy's forward, the event among them.
        flops: of a step: policy forward and backward, reference forward.
        step: of the policy's forward and backward alone, recomputation included.
        forward: of the policy's forward.
        reference: of the reference's forward, 0 without.
        peak: most bytes alive at once, gradients among them.
        alone: of the policy's forward where it shares no trunk with the reference.
    """

    activations: int
    flops: int
    step: int
    forward: int
    reference: int
    peak: int
    alone: int


def example_event(generator: Generator, batch: int, spec: DrawSpec) -> Event:
    """An event of the right shapes on the meta device."""
    seeds = torch.zeros(batch, dtype=torch.int64)
    return generator.draw(generator.example(batch), spec, Seeds(seeds, seeds)).to("meta")


def trace(
    generator: Generator, event: Event, *, reference: bool, look: Look | None = None
) -> Traced:
    """Run one micro-batch on the meta device: reference, then policy and backward.

    Args:
        generator: with its network there.
        event: to score, there too.
        reference: whether there is one.
        look: precision and guidance; plain without.
    """
    seen = Look() if look is None else look
    module = generator.module
    live = Live(tensors(generator))
    marks, scores = [], []
    gc.collect()  # what cycles of earlier steps hold is not this one's
    sharing = generator.views.sharing() if reference else contextlib.nullcontext()
    with live, accumulated(module, seen):
        live.hold(event)
        with sharing:
            for view in ("reference", "policy") if reference else ("policy",):
                marks.append(live.flops)
                with torch.set_grad_enabled(view == "policy"):
                    scores.append(scored(generator, event, view, seen))
        alive, forward = live.bytes, live.flops
        backward(scores[-1].logp, seen)
        end = live.flops
    own, peak = marks[-1], live.peak
    alone = forward - own
    if reference and generator.views.trunk is not None:
        alone = forward_flops(generator, event, seen)
    return Traced(alive, end, end - own, forward - own, own, peak, alone)


def forward_flops(generator: Generator, event: Event, look: Look) -> int:
    """FLOPs of the policy's forward by itself."""
    live = Live(())
    with live, torch.no_grad():
        scored(generator, event, "policy", look)
    return live.flops


def trace_forward(generator: Generator, event: Event, view: View, look: Look) -> int:
    """Most bytes alive while an event is scored without gradients."""
    gc.collect()
    live = Live(tensors(generator))
    with live, torch.no_grad(), accumulated(generator.module, look):
        live.hold(event)
        scored(generator, event, view, look)
    return live.peak


def tensors(generator: Generator) -> list[Tensor]:
    """All weights and buffers of a generator's views."""
    views = generator.views
    nets = [net for net in (views.module, views.reference) if net is not None]
    own = [x for net in nets for x in (*net.parameters(), *net.buffers())]
    return [*own, *views.followed.values()]


@contextlib.contextmanager
def accumulated(module: nn.Module, look: Look) -> Iterator[None]:
    """Gradients of earlier micro-batches, where there are any; all are dropped afterwards."""
    for p in module.parameters() if look.accumulated else ():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    try:
        yield
    finally:
        for p in module.parameters():
            p.grad = None


def scored(generator: Generator, event: Event, view: View, look: Look) -> Score:
    """A view's score as the loop asks for it."""
    negative: TensorDict | None = None
    if look.guidance != 1:
        negative = event.cond
    if look.detach:  # read as a value, so it has one
        flag = torch.ones(event.batch, dtype=torch.bool)
        event = replace(event, inputs=event.inputs | {DETACH: flag})
    with Precision(look.half, look.device):
        return generator.score(event, view, frozenset(), look.guidance, negative)


def backward(logp: Tensor, look: Look) -> None:
    """Gradients of a sum, recomputed blocks by the rules of the forward.

    It starts from the sum's place in the graph: from a tensor, torch would switch the rules off.
    """
    total = logp.sum()
    with Precision(look.half, look.device, keep=False):
        torch.autograd.backward(get_gradient_edge(total), torch.ones_like(total))
