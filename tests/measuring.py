"""Real steps of a training run, measured: bytes that were alive, FLOPs that were done."""

from __future__ import annotations

import gc
import io
from typing import Any

from rich.console import Console
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from t2i_align.recipe import Recipe
from t2i_align.train.loop import Run
from tests.runs import forget_precision


class Tracker(MemTracker):
    """MemTracker without its account by modules.

    That one refuses frozen weights and a module that is called twice (reference, then policy; two
    micro-batches); the bytes of the whole need neither.
    """

    def _pre_fw_hook(self, module: Any, inputs: Any) -> None:
        """Not looked at."""

    def _post_fw_hook(self, module: Any, inputs: Any, outputs: Any) -> None:
        """Not looked at."""

    def _pre_bw_hook(self, module: Any, args: Any) -> None:
        """Not looked at."""

    def _post_bw_hook(self, module: Any, args: Any) -> None:
        """Not looked at."""


def started(recipe: Recipe) -> Run:
    """A run before its first step, in a process that may have had others."""
    forget_precision()
    return Run(recipe, Console(file=io.StringIO()))


class Tracked:
    """Most bytes alive in a block: weights, reference, average, and all that a run makes there.

    Args:
        run: before its first step.
    """

    def __init__(self, run: Run) -> None:
        """Count what is there."""
        views, engine = run.generator.views, run.engine
        nets = [n for n in (views.module, views.reference) if n is not None]
        averages = list(engine.ema.shadow.values()) if engine.ema else []
        gc.collect()
        self.peak = 0
        self._tracker = Tracker()
        self._tracker.track_external(*nets, *averages, *views.followed.values())

    def __enter__(self) -> Tracked:
        """Look on."""
        self._tracker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Keep the peak."""
        self._tracker.__exit__(*error)
        found = self._tracker.get_tracker_snapshot("peak")
        self.peak = sum(device["Total"] for device in found.values())


def most_bytes(run: Run, num_steps: int = 2) -> int:
    """Of whole steps; from the second on the optimizer's state is there from the beginning."""
    with Tracked(run) as tracked:
        for _ in range(num_steps):
            run._step()
    return tracked.peak


def flops(run: Run, num_steps: int) -> int:
    """FLOPs of whole steps, what the feed computes among them."""
    counter = FlopCounterMode(display=False)
    with counter:
        for _ in range(num_steps):
            run._step()
    return counter.get_total_flops()
