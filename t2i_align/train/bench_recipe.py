"""A recipe's step: seconds by phase and by kind of operation, FLOPs, and other settings beside it.

    kinds     torch.profiler's own time of every operation, put together by what it does
    phases    as in every run's summary
    variants  the same recipe with other settings, each in fresh processes, in turns with the recipe
              itself (one that keeps reference errors serves the recipe too: give it another seed);
              the ratio is that of the fastest steps of all rounds, as other jobs of a machine can
              only slow a step

The first steps of a process are not counted: kernels are chosen there. Profiling slows a step, so
times are taken without it and kinds only as shares.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from t2i_align.generators.attention import float32_on_cpu
from t2i_align.recipe import load_recipe
from t2i_align.train.accounting import FLOOR, tera
from t2i_align.train.log import write_json
from t2i_align.train.loop import Run

FILE = "bench_step.json"
NUM_WARM = 2  # the first counts FLOPs, and kernels are chosen there
NUM_PROFILED = 3
# what part of an operation's name says what it is; the first that fits
KINDS = {
    "attention": ("attention",),
    "convolutions": ("convolution",),
    "norms": ("norm",),
    "optimizer": ("adam", "foreach", "lerp"),
    "matrix products": ("addmm", "baddbmm", "bmm", "aten::mm", "linear", "einsum"),
    "copies and casts": ("copy", "aten::cat", "clone", "contiguous", "aten::fill", "zero"),
}
OTHER = "sums, products, activations and the rest"


@dataclass(frozen=True)
class Job:
    """One process of a bench.

    Args:
        recipe: file or name.
        overrides: of its settings.
        num_steps: that are timed.
        profiled: whether operations are looked at, after those.
    """

    recipe: str
    overrides: tuple[str, ...]
    num_steps: int
    profiled: bool = False


def kind_of(name: str) -> str:
    """What an operation does."""
    found = (kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts))
    return next(found, OTHER)


def shares(operations: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Shares of kinds, largest first, of operations with their own seconds."""
    by_kind: dict[str, float] = defaultdict(float)
    for name, seconds in operations:
        by_kind[kind_of(name)] += seconds
    total = sum(by_kind.values()) or 1.0
    return {k: v / total for k, v in sorted(by_kind.items(), key=lambda pair: -pair[1])}


def profiled(run: Run, num_steps: int) -> list[tuple[str, float]]:
    """Operations of some steps with their own seconds, on CUDA those of the device."""
    from torch.profiler import ProfilerActivity, profile

    cuda = run.accelerator.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(num_steps):
            run._step()
    told = profiler.key_averages()
    own = (lambda e: e.self_device_time_total) if cuda else (lambda e: e.self_cpu_time_total)
    return [(event.key, own(event) / 1e6) for event in told]


def measure(job: Job) -> dict[str, Any]:
    """Train some steps in this process, into a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="t2i_align_step_") as folder:
        given = ["train.report_to=none", *job.overrides, f"output_dir={folder}/run"]
        recipe = load_recipe(job.recipe, given, cuda=torch.cuda.is_available())
        with float32_on_cpu():
            run = Run(recipe, Console(file=io.StringIO()))
            try:
                with run.kept or nullcontext():  # what the reference said serves the next round
                    return _measured(run, job)
            finally:
                run.feed.close()
                run.log.close()


def _measured(run: Run, job: Job) -> dict[str, Any]:
    losses = [run._step()["loss"] for _ in range(NUM_WARM)]
    clock = run.account.clock.seconds
    clock.clear()
    seconds = []
    for _ in range(job.num_steps):
        begin = time.perf_counter()
        losses.append(run._step()["loss"])
        seconds.append(time.perf_counter() - begin)
    phases = {k: v / job.num_steps for k, v in clock.items()}
    work = run.account.work
    return {
        "records": run.setup.records_per_step,
        "seconds": seconds,
        "phases": phases,
        "losses": losses,
        "flops": {} if work is None else {k: v for k, v in work.by_kind.items() if v},
        "kinds": shares(profiled(run, NUM_PROFILED)) if job.profiled else {},
    }


def apart(job: Job, prepare: Callable[[], None]) -> dict[str, Any]:
    """:func:`measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=prepare) as pool:
        return pool.submit(measure, job).result()


def step_seconds(found: dict[str, Any]) -> float:
    """Of the middle step."""
    return statistics.median(found["seconds"])


def fastest(runs: list[dict[str, Any]]) -> float:
    """Seconds of the fastest step of all rounds."""
    return min(seconds for run in runs for seconds in run["seconds"])


def compared(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """A variant beside the recipe itself."""
    pairs = zip(own[0]["losses"], other[0]["losses"], strict=True)
    return {
        "seconds": statistics.median(map(step_seconds, other)),
        "fastest": fastest(other),
        "ratio": fastest(other) / fastest(own),
        "loss_off": max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs),
    }


def summary(
    recipe: str, runs: dict[str, list[dict[str, Any]]], overrides: Sequence[str]
) -> dict[str, Any]:
    """JSON-able: the recipe's own step, and its variants.

    Args:
        recipe: file or name.
        runs: by variant; the recipe's own under "".
        overrides: of all.
    """
    own = runs[""]
    first = own[0]
    names = {k for run in own for k in run["phases"]}
    phases = {k: statistics.median(run["phases"].get(k, 0.0) for run in own) for k in names}
    return {
        "format": 1,
        "recipe": recipe,
        "overrides": list(overrides),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "records": first["records"],
        "seconds": statistics.median(map(step_seconds, own)),
        "fastest": fastest(own),
        "phases": phases,
        "flops": first["flops"],
        "kinds": first["kinds"],
        "variants": {k: compared(own, v) for k, v in runs.items() if k},
    }


def tables(found: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Phases, kinds of operations, variants."""
    step, total = found["seconds"], sum(found["flops"].values()) or 1.0
    floor = {"reference": "no", **dict.fromkeys(FLOOR, "yes")}
    phases = [
        {
            "phase": k,
            "seconds": f"{v:.3f}",
            "of the step": f"{100 * v / step:.0f} %",
            "FLOPs of a record": tera(found["flops"].get(k, 0)),
            "of all": f"{100 * found['flops'].get(k, 0) / total:.0f} %",
            "in the floor": floor.get(k, "no"),
        }
        for k, v in sorted(found["phases"].items(), key=lambda pair: -pair[1])
    ]
    kinds = [
        {"kind": k, "of the operations": f"{100 * v:.0f} %"} for k, v in found["kinds"].items()
    ]
    variants = [
        {
            "variant": k,
            "s a step": f"{v['seconds']:.3f}",
            "fastest": f"{v['fastest']:.3f}",
            "ratio": f"{v['ratio']:.2f}",
            "losses differ by": f"{v['loss_off']:.1e}",
        }
        for k, v in found["variants"].items()
    ]
    return {"phases": phases, "kinds": kinds, "variants": variants}


def bench(
    out: Path, job: Job, variants: Sequence[str], rounds: int, prepare: Callable[[], None]
) -> dict[str, Any]:
    """Measure a recipe and its variants in turns; writes ``bench_step.json``.

    Args:
        out: folder for it.
        job: the recipe's own.
        variants: overrides, several in one joined by spaces.
        rounds: of all.
        prepare: what each process does first.
    """
    runs: dict[str, list[dict[str, Any]]] = {"": [], **{name: [] for name in variants}}
    console = Console(stderr=True)
    for number in range(rounds):
        for name, found in runs.items():
            more = (*job.overrides, *name.split())
            looked = job.profiled and not name and not number
            found.append(apart(Job(job.recipe, more, job.num_steps, looked), prepare))
            said = f"{number + 1}/{rounds}  {name or job.recipe}: {fastest(found[-1:]):.3f} s"
            console.print(said, highlight=False)
    result = summary(job.recipe, runs, job.overrides)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, result)
    return result
