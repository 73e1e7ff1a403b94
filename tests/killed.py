"""Runs that are killed at a chosen moment, forked from a process that has imported everything.

    python -m tests.killed        one JSON job a line in, one exit code a line out

A moment is the n-th event of a run: a file or folder under its output folder is opened, made,
renamed or removed (Python's audit events), or an optimizer step begins or has just been taken. So
all of a save is covered: before and after every file, the rename and the retention.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAMESPACES = ("t2i_align", "torch", "accelerate", "diffusers", "transformers", "peft", "pyarrow")


class Killer:
    """Kills its own process at the n-th event of a folder.

    Args:
        folder: of the run.
        at: n, 0 for never.
        note: file that the event's name is added to, outside the folder.
    """

    def __init__(self, folder: str, at: int, note: str) -> None:
        self.folder, self.left = folder, at
        self.told: list[str] = []
        self.note = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, event: str, args: Any) -> None:
        if event.startswith(("open", "os.", "shutil.")):
            paths = [str(a) for a in args if isinstance(a, (str, os.PathLike))]
            if any(p.startswith(self.folder) for p in paths):
                self.count(f"{event} {Path(paths[0]).relative_to(self.folder)}")

    def count(self, event: str) -> None:
        self.left -= 1
        self.told.append(event)
        if self.left == 0:
            os.write(self.note, f"{event}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)


def watch_steps(killer: Killer) -> None:
    """Let the steps of the engine be events too."""
    from t2i_align.train.engine import Engine

    real = Engine.step

    def step(self: Engine, records: int) -> float:
        killer.count("step begins")
        norm = real(self, records)
        killer.count("step taken")
        return norm

    Engine.step = step


def run(job: dict[str, Any]) -> None:
    """Train a recipe in this process."""
    import io

    from rich.console import Console

    from t2i_align.recipe import load_recipe
    from t2i_align.train.run import train

    recipe = load_recipe(job["recipe"], job["overrides"])
    killer = Killer(recipe.output_dir, job["at"], job["note"])
    sys.addaudithook(killer)
    watch_steps(killer)
    told = io.StringIO()
    try:
        train(recipe, Console(file=told))
    finally:
        Path(job["note"]).with_suffix(".out").write_text(told.getvalue())
        Path(job["note"]).with_suffix(".modules").write_text("\n".join(sys.modules))


def call(job: dict[str, Any]) -> None:
    """Run a verb of the command line in this process; a run that ends lists its events."""
    from t2i_align.cli import build_app

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # exit codes go there
    killer = Killer(job["folder"], job["at"], job["note"])
    sys.addaudithook(killer)
    build_app()(job["words"], standalone_mode=False)
    Path(job["note"]).with_suffix(".events").write_text("\n".join(killer.told))
    Path(job["note"]).with_suffix(".modules").write_text("\n".join(sys.modules))


def learn(note: Path) -> None:
    """Import what a run that has ended had imported, so that the next one need not."""
    import contextlib
    import importlib

    listed = note.with_suffix(".modules")
    for name in listed.read_text().split() if listed.exists() else ():
        if name.startswith(NAMESPACES) and name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def serve() -> None:
    """Fork a run for every line."""
    import traceback

    import t2i_align.train.loop  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                job = json.loads(line)
                (call if "words" in job else run)(job)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        learn(Path(json.loads(line)["note"]))


class Runs:
    """The forking process, from a test's side."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.killed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def train(self, recipe: Path, note: Path, *overrides: str, kill_at: int = 0) -> int:
        """Run a recipe; its exit code, -9 when it was killed."""
        job = {"recipe": str(recipe), "overrides": overrides, "at": kill_at, "note": str(note)}
        return self._ask(job)

    def verb(self, words: list[str], folder: Path, note: Path, kill_at: int = 0) -> int:
        """Run a verb that writes to a folder; its exit code, -9 when it was killed."""
        return self._ask({"words": words, "folder": str(folder), "at": kill_at, "note": str(note)})

    def _ask(self, job: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


if __name__ == "__main__":
    serve()
