"""From the command to the first optimizer step: where the seconds of a start go.

Each run is a process of its own, `t2i-align train RECIPE` with one step, watched from outside. With
``-X importtime`` Python tells each module it has loaded and how long that took without the modules
it loads itself; the run tells its phases; both come through one pipe, where lines get their time.

    wall      from the start of the process to the line that tells step 1
    imports   sum of the modules' own times up to there, and their share of the wall time
    cpu       user and system seconds of the process up to there (Linux)

A first process, which fills the caches, is not counted: starts are warm. The clock of another
machine, or of a busy one, is another clock; CPU seconds move less.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from t2i_align.errors import UserError
from t2i_align.train.log import write_json

FILE = "bench_start.json"
MARK = "phase begins:"
CODE = (
    "import logging, sys; from t2i_align.cli import main; "
    "log = logging.getLogger('t2i_align.phases'); log.setLevel('DEBUG'); "
    "log.propagate = False; out = logging.StreamHandler(sys.stderr); "
    f"out.setFormatter(logging.Formatter('{MARK} %(message)s')); log.addHandler(out); main()"
)
FIRST, LAST = "recipe and checks", "first step"
# a run's phase -> the stage that it begins
STAGES = {"prepare": "data and caches", "load": "model", "train": LAST}
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
STEP = "step 1/1 "
# of extras, and libraries that only some verbs need
OPTIONAL = (
    *("av", "bitsandbytes", "datasets", "deepspeed", "fastapi", "matplotlib", "onnxruntime"),
    *("open_clip", "rapidfuzz", "ray", "spacy", "timm", "torchao", "uvicorn", "xformers"),
)
NUM_PACKAGES = 10


@dataclass
class Stage:
    """A part of a start.

    Args:
        seconds: of wall time.
        imports: of them.
    """

    seconds: float = 0.0
    imports: float = 0.0


@dataclass
class Start:
    """One start.

    Args:
        wall: seconds.
        cpu: seconds; None where the system does not tell.
        stages: in order.
        packages: seconds of imports by top-level package.
    """

    wall: float
    cpu: float | None
    stages: dict[str, Stage]
    packages: dict[str, float] = field(default_factory=dict)

    @property
    def imports(self) -> float:
        """Seconds of imports."""
        return sum(stage.imports for stage in self.stages.values())

    @property
    def optional(self) -> list[str]:
        """Optional libraries that were loaded."""
        return sorted(set(OPTIONAL) & self.packages.keys())


def watch(lines: Iterable[tuple[float, str]]) -> Start | None:
    """Read what a process says until its first step; None where it ends before.

    Args:
        lines: each with the seconds since the process began.
    """
    stages, packages = {FIRST: Stage()}, defaultdict(float)
    stage, since = FIRST, 0.0
    for now, line in lines:
        if found := IMPORT.match(line):
            seconds = int(found[1]) / 1e6
            stages[stage].imports += seconds
            packages[found[2].partition(".")[0]] += seconds
        elif line.startswith(MARK) and (name := line.removeprefix(MARK).strip()) in STAGES:
            stages[stage].seconds += now - since
            stage, since = STAGES[name], now
            stages.setdefault(stage, Stage())
        elif line.startswith(STEP):
            stages[stage].seconds += now - since
            return Start(now, None, stages, dict(packages))
    return None


def cpu_seconds(pid: int) -> float | None:
    """User and system seconds of a process that runs, on Linux."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")


def start(arguments: list[str]) -> Start:
    """Start a run in a fresh process, and end it after its first step.

    Args:
        arguments: of ``t2i-align train``.

    Raises:
        UserError: it ended before its first step; the message has its last lines.
    """
    command = [sys.executable, "-X", "importtime", "-c", CODE, "train", *arguments]
    begin, kept = time.perf_counter(), []
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )

    def told() -> Iterator[tuple[float, str]]:
        assert process.stderr is not None
        for line in process.stderr:
            if not IMPORT.match(line):
                kept.append(line)
            yield time.perf_counter() - begin, line

    with process:
        try:
            found = watch(told())
            if found is not None:
                found.cpu = cpu_seconds(process.pid)
        finally:
            process.kill()
    if found is None:
        raise UserError(
            "the run ended before its first step:\n" + "".join(kept[-20:]).rstrip(),
            "mend what it says; t2i-align validate RECIPE tells more",
        )
    return found


def measure(recipe: str, overrides: list[str], num_runs: int, console: Console) -> list[Start]:
    """Start a recipe ``num_runs`` times after a first time that does not count."""
    found = []
    one = ["train.max_train_steps=1", "train.lr_warmup_steps=0", "train.logging_steps=1"]
    for number in range(num_runs + 1):
        with tempfile.TemporaryDirectory(prefix="t2i_align_start_") as folder:
            given = [*one, *overrides, f"output_dir={folder}/run"]
            run = start([recipe, *given])
        said = f"{run.wall:.2f} s" + ("" if run.cpu is None else f", CPU {run.cpu:.2f} s")
        note = f"start {number}/{num_runs}" if number else "not counted"
        console.print(f"{note}: {said}", highlight=False)
        found.append(run)
    return found[1:]


def middle(values: Iterable[float | None]) -> float | None:
    """The median of what is known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def summary(recipe: str, runs: list[Start], bound: float) -> dict[str, Any]:
    """JSON-able: medians, each run, and whether the bound is kept."""
    import torch

    wall = statistics.median(run.wall for run in runs)
    names = {name for run in runs for name in run.packages}
    costs = {k: statistics.median(run.packages.get(k, 0.0) for run in runs) for k in names}
    by_cost = sorted(costs.items(), key=lambda pair: -pair[1])[:NUM_PACKAGES]
    return {
        "format": 1,
        "recipe": recipe,
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "wall": round(wall, 3),
        "bound": bound,
        "met": wall <= bound,
        "cpu": middle(run.cpu for run in runs),
        "import_share": round(statistics.median(run.imports / run.wall for run in runs), 4),
        "stages": [
            {
                "stage": name,
                "seconds": round(statistics.median(r.stages[name].seconds for r in runs), 3),
                "imports": round(statistics.median(r.stages[name].imports for r in runs), 3),
            }
            for name in runs[0].stages
        ],
        "packages": {k: round(v, 3) for k, v in by_cost},
        "optional": sorted({name for run in runs for name in run.optional}),
        "runs": [asdict(run) for run in runs],
    }


def notes(found: dict[str, Any]) -> list[str]:
    """What the table of stages needs beside it."""
    cpu = "" if found["cpu"] is None else f", CPU {found['cpu']:.2f} s"
    verdict = "kept" if found["met"] else "missed"
    packages = ", ".join(f"{k} {v:.2f}" for k, v in found["packages"].items())
    return [
        f"median of {len(found['runs'])} warm starts: {found['wall']:.2f} s{cpu}; "
        f"bound {found['bound']:g} s: {verdict}",
        f"imports: {100 * found['import_share']:.0f} % of the time; seconds: {packages}",
        f"optional libraries loaded: {', '.join(found['optional']) or 'none'}",
        f"{found['date']}, {os.cpu_count()} CPU cores, {found['threads']} threads, "
        f"torch {found['torch']}",
    ]


def bench(
    out: Path, recipe: str, overrides: list[str], num_runs: int, bound: float
) -> dict[str, Any]:
    """Measure, write ``bench_start.json`` and return what is in it."""
    runs = measure(recipe, overrides, num_runs, Console(stderr=True))
    found = summary(recipe, runs, bound)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, found)
    return found
