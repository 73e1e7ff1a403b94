"""What two processes do for the tests, in one launch: exchanges, then whole runs.

    python -m tests.ranks FOLDER RECIPE [RECIPE...]     once a process, RANK and others in the env

Each run writes ``<recipe>.rank-<n>.json``: the records and noise seeds of every micro-batch, and
what kind of tensor the trained parameters are.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def start(
    folder: Path, recipes: Sequence[Path], num: int = 2, *, cpu: bool = True, seconds: float = 280
) -> list[tuple[int, str]]:
    """Run this module in ``num`` processes; exit code and output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num)},
        "OMP_NUM_THREADS": "1",
    }
    if cpu:
        shared |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(folder), *map(str, recipes)],
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num)
    ]
    try:
        said = [p.communicate(timeout=seconds)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, text) for p, text in zip(processes, said, strict=True)]


def exchanges(rank: int) -> dict[str, Any]:
    """Statistics over ranks that have different numbers of rows, one of them none."""
    from accelerate import Accelerator

    from t2i_align.train.engine import Engine, RankStats

    accelerator = Accelerator()
    stats = RankStats(accelerator)
    here = accelerator.device
    mine = torch.arange(3.0, device=here) + 10 if rank == 0 else torch.zeros(0, device=here)
    rows = torch.full((1 + rank, 2), float(rank), device=here)
    engine = Engine.__new__(Engine)  # what it gathers needs no model
    engine.accelerator = accelerator
    metrics = {"loss": [torch.tensor([1.0 + rank])]} | ({} if rank else {"only": [mine]})
    gathered = engine.gather_metrics(metrics)
    return {
        "mean": float(stats.mean(mine)),
        "gather": stats.gather(mine).tolist(),
        "rows": stats.gather(rows).tolist(),
        "metrics": {k: v.tolist() for k, v in gathered.items()},
    }


@contextlib.contextmanager
def noting() -> Iterator[tuple[list[Any], set[str]]]:
    """Note every micro-batch trained on, and the kinds of the network's parameters.

    A micro-batch is its records, the sum of its noise minus data, and that of each of its items.
    """
    from t2i_align.train.engine import Engine
    from t2i_align.train.offline import StoredFeed

    drawn: list[Any] = []
    kinds: set[str] = set()
    real_next, real_step = StoredFeed.next, Engine.step

    def next_one(self: StoredFeed) -> Any:
        found = real_next(self)
        assert found.event.target is not None  # noise minus data
        items = found.event.target.double().flatten(1).sum(1)
        drawn.append([list(found.record_ids), float(items.sum()), items.tolist()])
        return found

    def step(self: Engine, records: int) -> float:
        kinds.update(type(p).__name__ for p in self.views.module.parameters())
        return real_step(self, records)

    StoredFeed.next, Engine.step = next_one, step
    try:
        yield drawn, kinds
    finally:
        StoredFeed.next, Engine.step = real_next, real_step


def watched(recipe: Path, rank: int) -> None:
    """Train, noting draws and parameters."""
    from rich.console import Console

    from t2i_align.recipe import load_recipe
    from t2i_align.train.run import train_one

    forget_precision()
    with noting() as (drawn, kinds):
        train_one(load_recipe(recipe), Console(file=io.StringIO()))
    facts = {"drawn": drawn, "kinds": sorted(kinds)}
    recipe.with_suffix(f".rank-{rank}.json").write_text(json.dumps(facts))


def forget_precision() -> None:
    """Let the next run have a precision of its own, in the same process group."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def main(folder: Path, recipes: list[Path]) -> None:
    """One process's part."""
    from accelerate import PartialState

    rank = int(os.environ["RANK"])
    (folder / f"exchanges-{rank}.json").write_text(json.dumps(exchanges(rank)))
    for recipe in recipes:
        watched(recipe, rank)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
