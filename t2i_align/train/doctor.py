"""What this machine can do: versions, devices, and every optional backend tried for real.

That a package imports says little: wheels without kernels for this card, or built against another
torch, import and then fail in the first step. So each backend runs a small forward and backward (an
optimizer: one step), and its report is either that it works or the first line of why not, with what
to install.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from t2i_align.optional import pip_line, version_of
from t2i_align.registry import resolve

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "pyarrow",
    "datasets",
    "bitsandbytes",
    "xformers",
    "flash_attn",
)


@dataclass(frozen=True)
class Backend:
    """The verdict on one optional backend.

    Args:
        name: what was tried.
        works: whether it did.
        detail: how it was tried, or why it is not usable.
    """

    name: str
    works: bool
    detail: str

    def __str__(self) -> str:
        """As printed."""
        return f"works ({self.detail})" if self.works else f"not usable: {self.detail}"


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``doctor`` found.

    Args:
        versions: package versions; None where not installed.
        devices: facts of the machine, sizes in GB (1e9 bytes).
        backends: verdicts.
    """

    versions: dict[str, str | None]
    devices: dict[str, str | int | float | bool]
    backends: list[Backend]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    def tables(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Titled rows for printing."""
        versions = [(k, v or "not installed") for k, v in self.versions.items()]
        devices = [(k, str(v)) for k, v in self.devices.items()]
        backends = [(b.name, str(b)) for b in self.backends]
        return [("versions", versions), ("devices", devices), ("backends", backends)]


def examine(*, with_compile: bool = False) -> Diagnosis:
    """Look at versions and devices, and try every backend on the fastest device.

    Args:
        with_compile: also try torch.compile, which takes a while.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    probes = PROBES + ((COMPILE,) if with_compile else ())
    versions = {"t2i-align": version_of("t2i-align"), "python": platform.python_version()}
    versions |= {name: version_of(name) for name in PACKAGES}
    backends = [attempt(name, probe, device, fix) for name, probe, fix in probes]
    return Diagnosis(versions, _devices(), backends)


def attempt(name: str, probe: Callable[[str], str], device: str, fix: str) -> Backend:
    """Run one probe; whatever it raises is its verdict.

    Args:
        name: backend name.
        probe: runs the backend on a device and says how.
        device: ``cuda`` or ``cpu``.
        fix: what to do when it does not work; may be empty.
    """
    try:
        return Backend(name, True, probe(device))
    except Exception as error:
        # A probe's whole purpose is to learn what goes wrong, so everything is caught and shown.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Backend(name, False, f"{reason}; {fix}" if fix else reason)


def _devices() -> dict[str, str | int | float | bool]:
    import torch

    facts: dict[str, str | int | float | bool] = {
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        "ram_gb": round(_ram_bytes() / 1e9, 1),
        "cuda": torch.cuda.is_available(),
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 1e9:.1f} GB"
    if torch.cuda.is_available():
        facts["cuda_bf16"] = torch.cuda.is_bf16_supported()
    return facts


def _ram_bytes() -> int:
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_PHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _qkv(device: str, dtype: Any, layout: tuple[int, ...]) -> list[Any]:
    import torch

    return [torch.randn(layout, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def _finite_gradients(out: Any, inputs: list[Any]) -> None:
    """Backward through a sum; raises if a gradient is missing or not finite."""
    out.float().sum().backward()
    for tensor in inputs:
        if tensor.grad is None or not tensor.grad.isfinite().all():
            raise RuntimeError("a gradient is missing or not finite")


def _autocast_bf16(device: str) -> str:
    import torch

    layer = torch.nn.Linear(16, 16).to(device)
    x = torch.randn(4, 16, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer(x)
    if out.dtype is not torch.bfloat16:
        raise RuntimeError(f"autocast gave {out.dtype}")
    _finite_gradients(out, [x])
    return f"linear layer on {device}"


def _sdpa(device: str) -> str:
    from torch.nn.functional import scaled_dot_product_attention

    qkv = _qkv(device, None, (1, 2, 16, 32))
    _finite_gradients(scaled_dot_product_attention(*qkv), qkv)
    return f"attention on {device}"


def _xformers(device: str) -> str:
    _installed("xformers")
    import torch

    attention = resolve("xformers.ops:memory_efficient_attention")
    qkv = _qkv(device, torch.float16, (1, 16, 2, 32))
    _finite_gradients(attention(*qkv), qkv)
    return f"attention on {device}"


def _flash_attn(device: str) -> str:
    _installed("flash_attn")
    import torch

    attention = resolve("flash_attn:flash_attn_func")
    qkv = _qkv(device, torch.float16, (1, 16, 2, 32))
    _finite_gradients(attention(*qkv), qkv)
    return f"attention on {device}"


def _adamw_8bit(device: str) -> str:
    _installed("bitsandbytes")
    import torch
    from bitsandbytes.optim.adamw import AdamW8bit

    # 4096 elements and more are kept in 8 bits; smaller tensors would try nothing.
    weight = torch.nn.Parameter(torch.randn(64, 128, device=device))
    before = weight.detach().clone()
    optimizer = AdamW8bit([weight], lr=1e-3)
    weight.square().sum().backward()
    optimizer.step()
    if torch.equal(weight, before) or not weight.isfinite().all():
        raise RuntimeError("a step left the weights unchanged or not finite")
    return f"one step on {device}"


def _fused_adamw(device: str) -> str:
    import torch

    weight = torch.nn.Parameter(torch.ones(16, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, fused=True)
    weight.sum().backward()
    optimizer.step()
    if not torch.allclose(weight, torch.full_like(weight, 0.9)):
        raise RuntimeError("the first step is not -lr")
    return f"one step on {device}"


def _compile(device: str) -> str:
    import torch

    layer = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.SiLU()).to(device)
    x = torch.randn(4, 16, device=device, requires_grad=True)
    _finite_gradients(torch.compile(layer)(x), [x])
    return f"linear layer on {device}"


def _installed(dist: str) -> None:
    if version_of(dist) is None:
        raise RuntimeError("not installed")


Probe = tuple[str, Callable[[str], str], str]
PROBES: tuple[Probe, ...] = (
    ("bf16 autocast", _autocast_bf16, "use train.mixed_precision: no"),
    ("sdpa", _sdpa, ""),
    ("fused AdamW", _fused_adamw, ""),
    ("bitsandbytes AdamW8bit", _adamw_8bit, pip_line("quant")),
    ("xformers", _xformers, pip_line("xformers")),
    ("flash_attn", _flash_attn, "pip install flash-attn --no-build-isolation (CUDA only)"),
)
COMPILE: Probe = ("torch.compile", _compile, "")
