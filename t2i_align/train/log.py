"""What a run tells: a progress line, ``metrics.jsonl``, trackers, and ``summary.json``."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from t2i_align.progress import Line, progress

PLAIN_SECONDS = 10.0  # between lines when the output is no terminal
begun = logging.getLogger("t2i_align.phases")  # told by `bench start`, else silent


class Phases:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the block's time to ``name``."""
        begun.debug(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def reduce_metrics(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean over examples, standard deviation for names ending in ``/std``.

    NaN entries do not count.
    """
    out = {}
    for name, value in values.items():
        known = value[~value.isnan()]
        if known.numel():
            std = name.endswith("/std")
            out[name] = float(known.std(unbiased=False) if std else known.mean())
    return out


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak resident memory in GB (1e9 bytes), and peak accelerator memory where there is one."""
    out = {"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if device.type == "cuda":
        out["peak_cuda_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return {k: round(v, 3) for k, v in out.items()}


def jsonable(value: float) -> float | None:
    """NaN and infinity have no JSON."""
    return value if math.isfinite(value) else None


class RunLog:
    """Metrics and progress of one run, on the main process only.

    Args:
        folder: the output folder.
        console: where lines and the bar go.
        total: optimizer steps of the whole run.
        step: steps already done (a resumed run drops later lines of metrics.jsonl).
        active: False on other processes.
    """

    def __init__(
        self, folder: Path, console: Console, total: int, step: int, *, active: bool = True
    ) -> None:
        """Open metrics.jsonl for appending."""
        self.console = console
        self.active = active
        self.total = total
        self.last: dict[str, float] = {}
        self._plain_at = 0.0
        self.first_step = step
        self._start = (time.perf_counter(), step)
        self._bar: Line | None = None
        if active:
            path = folder / "metrics.jsonl"
            self._drop_after(path, step)
            self._file = path.open("a")

    @staticmethod
    def _drop_after(path: Path, step: int) -> None:
        """Forget steps that will be run again, and a torn last line."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                break
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{k}\n" for k in kept))
        temporary.rename(path)  # at once: a kill must not lose what was kept

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Show a bar with rate and ETA on a terminal; plain lines elsewhere."""
        if not self.active or not self.console.is_terminal:
            yield
            return
        with progress(self.console, "train", self.total, self.first_step) as self._bar:
            yield
        self._bar = None

    def line(self, text: str) -> None:
        """One line for the user."""
        if self.active:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, values: Mapping[str, float], records_per_step: int) -> None:
        """Record one step."""
        if not self.active:
            return
        self.last = dict(values)
        row = {"step": step} | {k: jsonable(v) for k, v in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        elapsed = time.perf_counter() - self._start[0]
        rate = (step - self._start[1]) / max(elapsed, 1e-9)
        shown = {
            "loss": "loss",
            "rewards/accuracies": "acc",
            "rewards/margins": "margin",
            "lr": "lr",
        }
        parts = [f"{label} {values[k]:.4g}" for k, label in shown.items() if k in values]
        note = "  ".join([*parts, f"{rate * records_per_step:.2f} records/s"])
        if self._bar is not None:
            self._bar.reach(step, note)
        elif elapsed - self._plain_at >= PLAIN_SECONDS or step in (self._start[1] + 1, self.total):
            self._plain_at = elapsed
            left = (self.total - step) / max(rate, 1e-9)
            self.line(f"step {step}/{self.total}  {note}  ETA {left:.0f} s")

    def close(self) -> None:
        """Close the file."""
        if self.active:
            self._file.close()


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(facts, indent=1))
    temporary.rename(path)
