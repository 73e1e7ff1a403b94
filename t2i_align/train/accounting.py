r"""What training costs beside what it must cost: FLOPs, seconds by phase, share of the peak.

FLOPs of the first step are counted operation by operation, by the formulas of torch's
FlopCounterMode, apart for

    data        making events; an inversion is there
    reference   scores of frozen views
    trunk       what policy and reference have in common, where it runs once (generators/trunk.py)
    forward     the policy's scores and the loss
    backward    its gradients
    recompute   forwards that gradient checkpointing makes again within the backward pass

With W the FLOPs of a record, P those of the device in a second, R records a second and process,

    (1)  floor = trunk + forward + backward      what training on a record takes in any layout
    (2)  share = W / floor                       1: nothing else is computed
    (3)  MFU   = floor R / P                     model FLOPs: work beyond the floor is no merit
    (4)  HFU   = W R / P                         what the device did

A reference that is read from the cache in some micro-batches counts in W by the share in which it
ran. R leaves out the first step, which is slower for being counted. An operation without a formula
(all but matrix products, convolutions and attention) counts nothing. Where samples of the policy
are trained on, making them is not among W: it happens by rounds, and the plan knows it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from t2i_align.generators.diffusers_folder import DTYPES
from t2i_align.generators.views import Views
from t2i_align.protocols import Needs
from t2i_align.recipe import Recipe
from t2i_align.train.memory import HALVES
from t2i_align.train.setup import Setup

FLOOR = ("trunk", "forward", "backward")
# dense products in half precision with float32 sums, as published; names as the driver gives them
PUBLISHED = {
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
SIDES = {"cpu": 768, "cuda": 8192}  # of the square matrices that are multiplied to find a peak
NUM_PRODUCTS = 5


class Meter(TorchDispatchMode):
    """FLOPs by phase.

    Args:
        in_trunk: whether what runs now is kept for another view.
    """

    supports_higher_order_operators = True

    def __init__(self, in_trunk: Callable[[], bool] | None = None) -> None:
        """Nothing counted."""
        super().__init__()
        self.in_trunk = in_trunk
        self.phase = "data"
        self.flops: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(getattr(func, "overloadpacket", func))
        if formula is not None:
            self.flops[self._kind()] += formula(*args, **kwargs, out_val=out)
        return out

    def _kind(self) -> str:
        """The phase; a forward within the backward pass is the only thing there with gradients."""
        if self.phase == "backward":
            return "recompute" if torch.is_grad_enabled() else "backward"
        if self.phase == "reference" and self.in_trunk is not None and self.in_trunk():
            return "trunk"
        return self.phase


@dataclass(frozen=True)
class Work:
    """FLOPs of one record by kind."""

    by_kind: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """W."""
        return sum(self.by_kind.values())

    @property
    def floor(self) -> float:
        """Eq. (1)."""
        return sum(self.by_kind.get(kind, 0.0) for kind in FLOOR)

    @property
    def share(self) -> float:
        """Eq. (2); 0 where nothing is known."""
        return self.total / self.floor if self.floor else 0.0


@dataclass(frozen=True)
class Peak:
    """FLOPs a second of a device, and where the number is from."""

    flops: float
    source: str


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """Published where the device is known and works in half precision; else measured."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, flops in PUBLISHED.items():
            if known in name:
                return Peak(flops, f"published for {known}, dense, half precision")
    return measured_peak(device, dtype, SIDES.get(device.type, SIDES["cpu"]))


def measured_peak(device: torch.device, dtype: torch.dtype, side: int) -> Peak:
    """The fastest of a few products of square matrices."""
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(NUM_PRODUCTS + 1):  # the first one warms up
        wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        wait(device)
        best = min(best, time.perf_counter() - start)
    name = str(dtype).removeprefix("torch.")
    source = f"measured: {side} x {side} matrices in {name}, {torch.get_num_threads()} threads"
    return Peak(2 * side**3 / best, source)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds by phase, on CUDA those of the device, without waiting for it.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing measured."""
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add a block to ``name``."""
        begin, begun = self._mark(), time.perf_counter()
        try:
            yield
        finally:
            if begin is None:
                self.seconds[name] += time.perf_counter() - begun
            else:
                self._marks.append((name, begin, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Read the device's marks, once a step when its metrics have been waited for anyway."""
        if self._marks:
            self._marks[-1][2].synchronize()
        for name, begin, end in self._marks:
            self.seconds[name] += begin.elapsed_time(end) / 1000
        self._marks.clear()


class Account:
    """What a run's steps cost.

    Args:
        device: that computes.
        dtype: of its products.
        records: of one step on this process.
        in_trunk: see :class:`Meter`.
        counted: whether FLOPs can be counted; those of compiled graphs cannot.
        sampled: whether data are samples of the policy.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        records: int,
        *,
        in_trunk: Callable[[], bool] | None = None,
        counted: bool = True,
        sampled: bool = False,
    ) -> None:
        """No step was taken."""
        self.device, self.dtype, self.records = device, dtype, records
        self.clock = Clock(device)
        self.work: Work | None = None
        self.num_steps = 0  # after the first
        self.seconds = 0.0  # of those
        self._sampled = sampled
        self._meter = Meter(in_trunk) if counted else None
        self._steps = 0
        self._micros, self._live = 0, 0
        self._meter_on = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step; the first is counted."""
        self._meter_on = self._meter is not None and self._steps == 0
        start = time.perf_counter()
        yield
        self.clock.settle()
        self._steps += 1
        if self._steps > 1:
            self.num_steps += 1
            self.seconds += time.perf_counter() - start
        elif self._meter is not None:
            self.work = Work({k: v / self.records for k, v in self._meter.flops.items()})
        self._meter_on = False

    def asked(self, *, live: bool) -> None:
        """A micro-batch whose reference is computed, or read."""
        self._micros += 1
        self._live += live

    def _work(self) -> Work | None:
        """Of the mean record: the first step's, the reference as often as it ran."""
        if self.work is None or not self._micros:
            return self.work
        share = self._live / self._micros
        kinds = self.work.by_kind
        return Work(kinds | {k: v * share for k, v in kinds.items() if k == "reference"})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of a step: data, reference, forward, backward or optimizer."""
        left_out = name == "data" and self._sampled
        counting = self._meter if self._meter_on and not left_out else None
        if counting is not None:
            counting.phase = name
        with self.clock(name), counting or nullcontext():
            yield

    def summary(self, phases: dict[str, float]) -> dict[str, Any]:
        """JSON-able.

        Args:
            phases: seconds of the run's other phases.
        """
        rate = self.records * self.num_steps / self.seconds if self.seconds else None
        named = {"prepare": "encode"}  # reading records and filling the cache
        others = {named.get(k, k): v for k, v in phases.items() if k != "train"}
        found: dict[str, Any] = {
            "records_per_second_and_process": rate and round(rate, 4),
            "seconds": {k: round(v, 3) for k, v in (others | self.clock.seconds).items()},
        }
        work = self._work()
        if work is None or not work.floor:
            return found | {"flops": "not counted: the network is compiled, or no step was taken"}
        peak = peak_of(self.device, self.dtype)
        return found | {
            "flops_per_record": round(work.total),
            "flops": {k: round(v) for k, v in work.by_kind.items() if v},
            "flops_leave_out": "sampling and judging" if self._sampled else None,
            "floor": round(work.floor),
            "share_of_floor": round(work.share, 4),
            "mfu": rate and round(work.floor * rate / peak.flops, 4),
            "hfu": rate and round(work.total * rate / peak.flops, 4),
            "peak_flops": round(peak.flops),
            "peak_from": peak.source,
        }


def account_of(recipe: Recipe, setup: Setup, needs: Needs, views: Views) -> Account:
    """Of a run whose network is loaded and, where the recipe says so, compiled."""
    train, trunk = recipe.train, views.trunk
    return Account(
        setup.accelerator.device,
        HALVES[train.mixed_precision] or DTYPES[recipe.model.dtype],
        train.train_batch_size * train.gradient_accumulation_steps,
        in_trunk=None if trunk is None else lambda: trunk.recording,
        counted=train.compile == "none",
        sampled=needs.feed != "stored",
    )


def line(found: dict[str, Any]) -> str:
    """A summary for people."""
    rate = found["records_per_second_and_process"]
    parts = [f"{rate} records/s a process after the first step"] if rate else []
    if "floor" in found:
        parts.insert(0, f"{tera(found['flops_per_record'])} a record")
        parts.insert(1, f"{found['share_of_floor']:.2f} of its floor (policy forward + backward)")
        if rate:
            parts.append(f"MFU {100 * found['mfu']:.1f} % of {tera(found['peak_flops'])}/s")
            parts.append(found["peak_from"])
    else:
        parts.append(f"FLOPs {found['flops']}")
    by_time = sorted(found["seconds"].items(), key=lambda pair: -pair[1])
    parts.append("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in by_time))
    return "cost: " + "; ".join(parts)


def tera(flops: float) -> str:
    """FLOPs with a unit."""
    for size, unit in ((1e12, "TFLOP"), (1e9, "GFLOP")):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e6:.3g} MFLOP"
