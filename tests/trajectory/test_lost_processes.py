"""A process that fails ends the run soon, says why, and leaves checkpoints to go on from.

Killed, stopped and interrupted ones are in ``test_distributed.py``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from t2i_align.errors import DataError
from t2i_align.train.checkpoint import Checkpoints
from t2i_align.train.distributed import cause
from tests import runs

ROOT = Path(__file__).resolve().parents[2]
LONG = {"max_train_steps": 100000, "checkpointing_steps": 1, "checkpoints_total_limit": 3}


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def recipe(folder: Path, **train: Any) -> Path:
    runs.point_model(folder / "model")
    runs.point_pairs(folder / "pairs.jsonl", 11, seed=0)
    files = folder / "model", folder / "pairs.jsonl", folder / "cache"
    return runs.write_recipe(folder, "run", runs.voxel_sections(*files, **train))


def good_step(folder: Path) -> int:
    found = Checkpoints(folder / "run" / "checkpoints", None).load("latest")
    assert found is not None
    return found.step


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["user", pytest.param("bug", marks=pytest.mark.slow)])
def test_a_process_that_raises(tmp_path: Path, kind: str) -> None:
    """Its own words, its exit code, two good checkpoints; the other is not waited for."""
    path = recipe(tmp_path, train_batch_size=2, **LONG)
    launch = [sys.executable, "-m", "tests.raising", kind, "train", str(path)]
    done = subprocess.run(
        [*launch, "--num-processes", "2"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,  # the run itself would take an hour
    )
    assert "process 1 said:" in done.stderr
    if kind == "user":
        assert "row 7 of this process is broken" in done.stderr and "mend it" in done.stderr
        assert done.returncode == DataError.exit_code
    else:
        assert "ValueError: a defect of this process" in done.stderr and done.returncode == 1
    assert good_step(tmp_path) == 2
    go_on = [str(path), "train.resume_from_checkpoint=latest", "train.max_train_steps=4"]
    subprocess.run(
        [*(sys.executable, "-m", "t2i_align", "train"), *go_on], env=environment(), check=True
    )
    assert len(runs.losses(tmp_path / "run")) == 4


@pytest.mark.parametrize(
    ("first", "last", "rank"),
    [
        ([None, 3], [5, 3], 1),
        ([5, None], [5, 3], 1),  # the one that lost the other ended sooner
        ([None, 1, None], [5, 1, None], 1),
        ([None, 5], [5, 5], 1),
        ([5, 5], [5, 5], 0),
    ],
)
def test_whose_words_are_shown(first: list[int | None], last: list[int | None], rank: int) -> None:
    assert cause(first, last) == rank


# -- several machines
# --------------------------------------------------------------------------------------------------


class Machines:
    """A run on two machines, both of them this one, as a user starts it on each.

    Args:
        path: the recipe.
        num_processes: of both together.
    """

    def __init__(self, path: Path, num_processes: int) -> None:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [*(sys.executable, "-m", "t2i_align", "train", str(path))]
        command += ["--num-processes", str(num_processes), "--num-machines", "2"]
        command += ["--main-process-ip", "127.0.0.1", "--main-process-port", port]
        self.nodes = [
            subprocess.Popen(
                [*command, "--machine-rank", str(rank)],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in (0, 1)
        ]

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *error: object) -> None:
        """End what is left: the verbs, torchrun, and its processes in sessions of their own."""
        for node in self.nodes:
            below = descendants(node.pid) if node.poll() is None else {}
            for pid in (node.pid, *below):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            node.wait()

    def ended(self) -> list[tuple[int, str]]:
        """Exit code and output of each."""
        said = [node.communicate(timeout=600)[0] for node in self.nodes]
        return [(node.returncode, text) for node, text in zip(self.nodes, said, strict=True)]

    def worker(self, rank: int) -> int:
        """Process id of the training process on a machine: below the verb and torchrun."""
        below = descendants(self.nodes[rank].pid)
        return max(below, key=lambda pid: len(below[pid]))


def descendants(pid: int, above: Sequence[int] = ()) -> dict[int, tuple[int, ...]]:
    """All processes below one, with those above each."""
    found: dict[int, tuple[int, ...]] = {}
    tasks = Path(f"/proc/{pid}/task")
    for task in tasks.iterdir() if tasks.is_dir() else ():
        for child in map(int, (task / "children").read_text().split()):
            found[child] = (*above, pid)
            found |= descendants(child, found[child])
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_machines_are_one(tmp_path: Path) -> None:
    """One process on each of two machines: the losses and weights of one process."""
    path = recipe(tmp_path, train_batch_size=4, max_train_steps=5, checkpointing_steps=5)
    with Machines(path, 2) as machines:
        for code, said in machines.ended():
            assert code == 0, said[-3000:]
    one = recipe(tmp_path, train_batch_size=8, max_train_steps=5, checkpointing_steps=5)
    (tmp_path / "run").rename(tmp_path / "two")
    subprocess.run(
        [sys.executable, "-m", "t2i_align", "train", str(one)], env=environment(), check=True
    )
    curve = runs.losses(tmp_path / "run")
    assert len(set(curve)) == 5
    assert runs.losses(tmp_path / "two") == pytest.approx(curve, abs=1e-5)
    mine, theirs = (runs.weights(tmp_path / name, 5) for name in ("two", "run"))
    assert all((mine[k] - theirs[k]).abs().max() < 1e-5 for k in theirs)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_lost_machine_ends_the_others(tmp_path: Path) -> None:
    """The second machine's process is killed: both end, the first says so, checkpoints are good."""
    path = recipe(tmp_path, train_batch_size=2, **LONG)
    with Machines(path, 2) as machines:
        end = time.monotonic() + 600
        while not (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir():
            assert time.monotonic() < end and all(n.poll() is None for n in machines.nodes)
            time.sleep(0.05)
        os.kill(machines.worker(1), signal.SIGKILL)
        (first, told), (second, _) = machines.ended()
    assert first != 0 and second != 0
    assert "process 0 of 2: another process is gone" in told, told[-3000:]
    assert "train.resume_from_checkpoint=latest" in told
    assert good_step(tmp_path) >= 2
