"""A run that is killed again and again ends as the one nobody touched, bit for bit.

Killed by SIGKILL at counted events (``tests/killed.py``), so before, inside and after saves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.killed import Runs

RESUME = "train.resume_from_checkpoint=latest"


@pytest.fixture(scope="module")
def forks() -> Iterator[Runs]:
    server = Runs()
    yield server
    server.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parts")
    data = runs.point_pairs(folder / "pairs.jsonl", 20, seed=0)
    made = runs.voxel_sections(
        runs.point_model(folder / "model"),
        data,
        folder / "cache",
        train_batch_size=4,
        learning_rate=1e-3,
        ema_decay=0.9,
        checkpointing_steps=2,
        checkpoints_total_limit=2,
    )
    grids = {"prompts": ["p", "q"], "validation_steps": 2, "num_inference_steps": 2}
    return made | {"validation": grids | {"guidance_scale": 1.0}}


def steps(recipe: dict[str, Any], num: int) -> dict[str, Any]:
    return recipe | {"train": recipe["train"] | {"max_train_steps": num}}


def everything(folder: Path) -> dict[str, bytes]:
    """All that a run leaves and that is no clock: curves, checkpoints, samples, weights."""
    kept = ("*.safetensors", "checkpoints/step-*/*", "metrics.jsonl", "samples/*")
    files = {f for pattern in kept for f in folder.glob(pattern)}
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def assert_equal_runs(killed: Path, whole: Path) -> None:
    a, b = everything(killed), everything(whole)
    assert a.keys() == b.keys() and any(k.startswith("samples/") for k in b)
    assert [k for k in b if a[k] != b[k]] == []
    left = [p.name for p in (killed / "checkpoints").iterdir() if not p.name.startswith("step-")]
    assert all(name.startswith("stale-") for name in left), left


def kill_and_end(
    forks: Runs, recipe: dict[str, Any], folder: Path, moments: list[int]
) -> tuple[list[str], Path, Path]:
    """One run nobody touches, one killed at each moment in turn and continued to the end."""
    whole, path = (runs.write_recipe(folder, name, recipe) for name in ("whole", "killed"))
    note = folder / "note.txt"
    assert forks.train(whole, folder / "none.txt") == 0
    for moment in moments:
        assert forks.train(path, note, RESUME, kill_at=moment) == -9
    assert not (folder / "killed" / "summary.json").exists()
    assert forks.train(path, note, RESUME) == 0
    return note.read_text().splitlines(), folder / "killed", folder / "whole"


def inside_a_save(event: str) -> bool:
    return "/.step-" in event


def test_three_kills_change_nothing(forks: Runs, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Killed before anything was saved, inside the first save, and after a later one."""
    told, killed, whole = kill_and_end(forks, steps(recipe, 8), tmp_path, [9, 23, 55])
    assert len(told) == 3 and inside_a_save(told[1]), told
    assert_equal_runs(killed, whole)
    assert len(runs.losses(killed)) == 8


@pytest.mark.slow
def test_twenty_five_kills_change_nothing(
    forks: Runs, recipe: dict[str, Any], tmp_path: Path
) -> None:
    moments = [random.Random(seed).randint(5, 75) for seed in range(25)]
    told, killed, whole = kill_and_end(forks, steps(recipe, 100), tmp_path, moments)
    assert len(told) == 25
    assert sum(map(inside_a_save, told)) >= 5 and any("step" in t and "/" not in t for t in told)
    assert_equal_runs(killed, whole)
