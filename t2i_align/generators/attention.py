"""Which kernel a denoiser's attention runs on, and whether it runs here at all.

That a package imports says little: a wheel may hold no kernel for this card. So a kernel is tried
forward and backward on the device, and must agree with torch's own, before anything depends on it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.optional import pip_line, version_of
from t2i_align.registry import resolve

Kernel = Literal["sdpa", "xformers", "flash"]
Choice = Literal["sdpa", "auto", "xformers", "flash"]

FASTEST_FIRST: tuple[Kernel, ...] = ("flash", "xformers", "sdpa")
PACKAGES = {"xformers": "xformers", "flash": "flash_attn"}
INSTALL = {
    "xformers": pip_line("xformers"),
    "flash": "pip install flash-attn --no-build-isolation",
}
FUNCTIONS = {
    "xformers": "xformers.ops:memory_efficient_attention",
    "flash": "flash_attn:flash_attn_func",
}
TOLERANCE = 2e-2  # of outputs around 1 in half precision


def computes_in(own: str, mixed_precision: str) -> torch.dtype:
    """What attention sees: autocast's precision, else the weights'.

    Args:
        own: ``model.dtype``.
        mixed_precision: ``train.mixed_precision``.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return half.get(mixed_precision) or getattr(torch, own)


def _qkv(device: str, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    drawn = (torch.randn(1, 16, 2, 32, generator=rng) for _ in range(3))
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attend = nn.functional.scaled_dot_product_attention
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def unusable(kernel: Kernel, device: str, dtype: torch.dtype) -> str | None:
    """Try a kernel forward and backward.

    Args:
        kernel: which.
        device: ``cpu`` or ``cuda``.
        dtype: of queries, keys and values.

    Returns:
        The reason why it cannot be used, None when it can.
    """
    package = PACKAGES.get(kernel)
    if package is not None and version_of(package) is None:
        return f"the package '{package}' is not installed; {INSTALL[kernel]}"
    try:
        function: Callable[..., Tensor] = _sdpa if package is None else resolve(FUNCTIONS[kernel])
        return compare(function, _qkv(device, dtype))
    except Exception as error:
        # a probe's whole purpose is to learn what goes wrong, so everything is caught and told
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"on {device} in {str(dtype).removeprefix('torch.')}: {reason}"


def compare(function: Callable[..., Tensor], qkv: list[Tensor]) -> str | None:
    """How a kernel differs from plain attention in output or gradients, None where it does not.

    Args:
        function: of queries, keys and values ``(batch, tokens, heads, channels)``.
        qkv: they; leaves that require gradients.
    """
    found = function(*qkv)
    gradients = torch.autograd.grad(found.float().sum(), qkv)
    plain = [x.detach().float().requires_grad_() for x in qkv]
    wanted = _sdpa(*plain)
    theirs = torch.autograd.grad(wanted.sum(), plain)
    for name, a, b in zip(
        "output query key value".split(), (found, *gradients), (wanted, *theirs), strict=True
    ):
        off = (a.float() - b).abs().max().item()
        if not off <= TOLERANCE:
            return f"its {name} differs from plain attention by {off:.3g}"
    return None


def choose(choice: Choice, device: str, dtype: torch.dtype) -> Kernel:
    """The kernel a recipe's choice means on a device.

    Raises:
        ModelError: it was named and is not usable there.
    """
    if choice == "auto":
        return next(k for k in FASTEST_FIRST if k == "sdpa" or unusable(k, device, dtype) is None)
    reason = None if choice == "sdpa" else unusable(choice, device, dtype)
    if reason is not None:
        raise ModelError(
            f"model.attention: {choice} is not usable: {reason}",
            "set model.attention: sdpa, or auto for the fastest that works",
        )
    return choice


def dispatches(net: nn.Module) -> bool:
    """Whether a network's attention asks diffusers' switch for its kernel."""
    processors = (getattr(m, "processor", None) for m in net.modules())
    return any(hasattr(p, "_attention_backend") for p in processors)


def mixes(net: nn.Module, dtype: torch.dtype) -> bool:
    """Whether queries and keys have another precision than values.

    Norms of queries and keys answer in the precision of their weights or in float32, under autocast
    too; torch's own attention is cast by autocast, other kernels are not.

    Args:
        net: a diffusers model.
        dtype: what its linear layers answer in.
    """
    normed = any(getattr(m, "norm_q", None) is not None for m in net.modules())
    own = next((p.dtype for p in net.parameters() if p.is_floating_point()), dtype)
    return normed and own != dtype


def set_attention(
    net: nn.Module,
    choice: Choice,
    device: torch.device,
    dtype: torch.dtype,
    *,
    masked: bool = False,
) -> Kernel:
    """Let a denoiser's attention run on a kernel; on the meta device only look whether it could.

    Args:
        net: a diffusers model.
        choice: the recipe's.
        device: where it will run.
        dtype: it computes in.
        masked: its attention gets a mask of the text, which flash does not take.

    Raises:
        ModelError: the kernel is not usable, or this network has no switch for it.
    """
    switch: Any = net
    if choice == "flash" and masked:
        raise ModelError(
            "model.attention: flash takes no mask, and this family masks its text",
            "set model.attention: auto, xformers or sdpa",
        )
    if choice == "flash" and not dispatches(net):
        raise ModelError(
            f"model.attention: {type(net).__name__} has no switch for flash",
            "set model.attention: sdpa; on CUDA torch picks its own flash kernel in half precision",
        )
    if choice == "sdpa" or device.type == "meta":
        return "sdpa"
    if mixes(net, dtype):
        if choice == "auto":
            return "sdpa"
        raise ModelError(
            f"model.attention: {choice} takes one precision, and this network's norms leave "
            "queries and keys in that of the weights under autocast",
            "set model.dtype to the precision of train.mixed_precision, or attention: sdpa",
        )
    kernel = choose(choice, device.type, dtype)
    if kernel == "flash" and (masked or not dispatches(net)):  # auto only
        kernel = "sdpa" if unusable("xformers", device.type, dtype) else "xformers"
    if kernel != "sdpa":
        if dispatches(net):
            switch.set_attention_backend(kernel)
        else:
            switch.enable_xformers_memory_efficient_attention()
    return kernel


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor:
    """``scaled_dot_product_attention`` under the CPU's autocast, its answer in autocast's dtype."""
    half = torch.get_autocast_dtype("cpu")
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    attend = nn.functional.scaled_dot_product_attention
    with torch.autocast("cpu", enabled=False):
        out = attend(query.float(), key.float(), value.float(), mask, *rest, **named)
    return out.to(half)


@contextlib.contextmanager
def float32_on_cpu() -> Iterator[None]:
    """Attention in float32 under the CPU's autocast, as long as the block lasts; CUDA is untouched.

    The backward pass of torch's CPU kernel takes longer in bfloat16 than in float32, with few keys
    by far: a step of the bundled UNet takes some 1.2 times as long (``pytest -m bench
    tests/unit/test_float32_attention.py``). Set in torch's dispatcher, so that blocks recomputed in
    the backward pass see the same.
    """
    name = "scaled_dot_product_attention"
    with torch.library._scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*[Oo]verrid", UserWarning)
            library.impl(name, _attend, "AutocastCPU", allow_override=True)
        yield
