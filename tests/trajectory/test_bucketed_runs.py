"""Aspect buckets through the trainer: pairs of unequal files, killed, shared, and compared."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from t2i_align.data.label_source import build_source
from t2i_align.data.prepare import Prepared, prepare
from t2i_align.errors import TrainingError
from t2i_align.recipe import load_recipe
from t2i_align.train.run import train
from tests import runs
from tests.tiny import pipeline_folder
from tests.trajectory.test_trajectories import command, environment, wait_for

# (height, width) of winner and loser; their buckets at resolution 64 in steps of 8
FILES = [((60, 100), (70, 90)), ((72, 72), (80, 64)), ((110, 60), (96, 128))]
BUCKETS = [(48, 80), (64, 64), (80, 48)]
NUM = 17  # 6, 6 and 5 pairs: with micro-batches of 4 no bucket comes out even


def rows(path: Path, files: list[tuple[tuple[int, int], tuple[int, int]]], num: int) -> Path:
    """Pick-a-Pic's columns; the winner is the second picture of every other pair."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = []
    for i in range(num):
        winner, loser = (runs.jpeg(2 * i + k, *size) for k, size in enumerate(files[i % 3]))
        first = i % 2 == 0
        row: dict[str, Any] = {"caption": f"thing {i % 5}", "has_label": True, "ranking_id": i}
        row |= {"jpg_0": winner if first else loser, "jpg_1": loser if first else winner}
        made.append(row | {"label_0": float(first), "label_1": float(not first)})
    pq.write_table(pa.Table.from_pylist(made), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("bucketed")
    found = {family: pipeline_folder(family, base / family) for family in ("sd", "sdxl", "sd3")}
    squares = [((72, 72), (80, 80)), ((64, 64), (90, 90)), ((100, 100), (66, 66))]
    return found | {
        "cache": base / "cache",
        "pairs": rows(base / "pairs.parquet", FILES, NUM),
        "squares": rows(base / "squares.parquet", squares, 9),
    }


def sections(
    folders: dict[str, Path], data: str = "pairs", family: str = "sdxl", **options: Any
) -> dict[str, Any]:
    model = {"name_or_path": str(folders[family]), "resolution": 64, "random_flip": True}
    model |= {"aspect_buckets": {"step": 8}, "lora": {"r": 4, "lora_alpha": 4}}
    return {
        "model": model,
        "objective": {"type": "dpo", "beta": 500.0},
        "data": {
            "type": "pickapic",
            "path": str(folders[data]),
            "proportion_empty_prompts": 0.3,
        },
        "cache": {"dir": str(folders["cache"])},
        "train": {
            "report_to": "none",
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
            "max_train_steps": 8,
            "checkpointing_steps": 3,
            "train_batch_size": 4,
            **options,
        },
    }


def cached(tmp_path: Path, recipe: dict[str, Any]) -> Prepared:
    loaded: Any = load_recipe(runs.write_recipe(tmp_path, "cached", recipe))
    generator = loaded.chosen("model")(loaded.model)
    source = build_source(loaded.chosen("data"), loaded.data, loaded.cache.dir, None)
    return prepare(source, generator, "pairs", loaded.cache)


def draw(data: Prepared, *records: int) -> Any:
    picks = [(record, 0) for record in records]
    return data.batch(picks, run_seed=0, coupling="time+noise", empty_prompts=0.0)


def same_weights(a: Path, b: Path, step: int, atol: float = 0.0) -> None:
    mine, theirs = runs.weights(a, step), runs.weights(b, step)
    assert mine.keys() == theirs.keys()
    for k in mine:
        torch.testing.assert_close(mine[k], theirs[k], atol=atol, rtol=0)


def test_latents_share_a_shape_and_time_ids_are_each_pictures_own(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    """By hand: covering 48 x 80 takes 60 x 100 to itself and 70 x 90 to 62 x 80 (7 rows cut above);
    covering 80 x 48 takes 110 x 60 to 88 x 48 (4 rows) and 96 x 128 to 80 x 106 (29 columns).
    """
    recipe = sections(folders)
    recipe["model"]["random_flip"] = False
    data = cached(tmp_path, recipe)
    expected = [
        ([60, 100, 0, 0, 48, 80], [70, 90, 7, 0, 48, 80]),
        ([72, 72, 0, 0, 64, 64], [80, 64, 8, 0, 64, 64]),
        ([110, 60, 4, 0, 80, 48], [96, 128, 0, 29, 80, 48]),
    ]
    for record, (height, width) in enumerate(BUCKETS):
        batch = draw(data, record, record + 3)
        assert batch.sample.state["mean"].shape == (4, 4, height // 8, width // 8)
        ids = batch.sample.cond["added_cond_kwargs.time_ids"].tolist()
        winner, loser = expected[record]
        assert ids == [winner, winner, loser, loser]
    recipe["model"]["time_ids"] = "constant"
    ids = draw(cached(tmp_path, recipe), 0).sample.cond["added_cond_kwargs.time_ids"]
    assert ids.tolist() == [[48, 80, 0, 0, 48, 80]] * 2


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_every_family_trains_on_them(tmp_path: Path, folders: dict[str, Path], family: str) -> None:
    """ln 2 at the start; then the loss moves. The summary and the console count the buckets."""
    path = runs.write_recipe(
        tmp_path, "run", sections(folders, family=family, max_train_steps=4, train_batch_size=2)
    )
    screen = io.StringIO()
    summary = train(load_recipe(path), Console(file=screen))
    curve = runs.losses(tmp_path / "run")
    assert curve[0] == pytest.approx(0.6931472, abs=1e-6) and len(set(curve)) == 4
    assert summary["data"]["buckets"] == {"48x80": 6, "64x64": 6, "80x48": 5}
    assert summary["data"]["beyond_aspect"] == 0 and summary["data"]["usable"] == NUM
    assert "buckets: 48x80 6, 64x64 6, 80x48 5\n" in screen.getvalue()


def test_too_small_buckets_and_too_slender_pictures_are_told(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    """110 x 60 is within 2, but not within 1.7 (and 80 x 48 is)."""
    recipe = sections(folders, max_train_steps=1, train_batch_size=6)
    recipe["model"]["aspect_buckets"] |= {"max_aspect": 1.7}
    screen = io.StringIO()
    summary = train(load_recipe(runs.write_recipe(tmp_path, "run", recipe)), Console(file=screen))
    assert summary["data"]["beyond_aspect"] == 5
    told = " ".join(screen.getvalue().split())
    assert "; 5 records are beyond them, cropped to the nearest" in told
    assert "; 5 records are in buckets of fewer than train_batch_size 6, so they wait" in told


def test_square_files_give_the_plain_run(tmp_path: Path, folders: dict[str, Path]) -> None:
    """One bucket in use: the order, the crops, the time ids and so every loss are those without."""
    recipe = sections(folders, "squares")
    runs.train(tmp_path, "bucketed", recipe)
    recipe["model"]["aspect_buckets"] = None
    runs.train(tmp_path, "plain", recipe)
    assert runs.losses(tmp_path / "bucketed") == runs.losses(tmp_path / "plain")
    assert len(set(runs.losses(tmp_path / "plain"))) == 8
    same_weights(tmp_path / "bucketed", tmp_path / "plain", 8)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, folders: dict[str, Path]) -> None:
    """SIGKILL between checkpoints, then continued: the curve of a run that was left alone."""
    recipe = sections(folders, max_train_steps=40, checkpointing_steps=7)
    runs.train(tmp_path, "whole", recipe)
    path, killed = runs.write_recipe(tmp_path, "killed", recipe), tmp_path / "killed"
    process = subprocess.Popen(command(path), env=environment(), stderr=subprocess.DEVNULL)
    wait_for((killed / "checkpoints" / "step-00000007").is_dir, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists() and len(runs.losses(killed)) < 40
    subprocess.run(
        command(path, "train.resume_from_checkpoint=latest"), env=environment(), check=True
    )
    assert runs.losses(killed) == runs.losses(tmp_path / "whole")
    same_weights(killed, tmp_path / "whole", 40)


def test_two_processes_equal_one(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Two micro-batches of 2 pairs a step, of two buckets as a rule, on one process or on two."""
    sizes: dict[str, Any] = {"train_batch_size": 2, "max_train_steps": 6}
    runs.train(tmp_path, "one", sections(folders, gradient_accumulation_steps=2, **sizes))
    recipe = runs.write_recipe(tmp_path, "two", sections(folders, **sizes))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, "-m", "t2i_align", "train", str(recipe)],
        env=environment() | {"ACCELERATE_USE_CPU": "true"},
        check=True,
        timeout=300,
    )
    curves = [runs.losses(tmp_path / name) for name in ("one", "two")]
    assert curves[1] == pytest.approx(curves[0], abs=2e-4) and len(set(curves[0])) == 6
    same_weights(tmp_path / "two", tmp_path / "one", 6, atol=2e-4)
    seen = [
        json.loads((tmp_path / name / "summary.json").read_text())["samples_seen"]
        for name in ("one", "two")
    ]
    assert seen == [24, 24]


def test_another_micro_batch_is_another_order_and_is_not_resumed(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    recipe = sections(folders, max_train_steps=3)
    runs.train(tmp_path, "run", recipe)
    more = ["train.resume_from_checkpoint=latest", "train.max_train_steps=4"]
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy)
    with pytest.raises(TrainingError, match="or another order of them"):
        runs.train(tmp_path, "run", recipe, *more, "train.train_batch_size=2")
    runs.train(tmp_path, "copy", recipe, *more)
    assert len(runs.losses(copy)) == 4


def test_validate_tells_where_the_first_records_fall(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    path = runs.write_recipe(tmp_path, "r", sections(folders))

    def asked(*more: str) -> str:
        verb = [sys.executable, "-m", "t2i_align", "validate", str(path), *more]
        done = subprocess.run(
            verb, env=environment() | {"COLUMNS": "200"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = "48x80: 6, 56x72: 0, 64x64: 6, 72x56: 0, 80x48: 5 of the first 100 rows' records"
    assert told in " ".join(asked().split())
    found = json.loads(asked("--json"))["buckets"]
    assert found == {"48x80": 6, "56x72": 0, "64x64": 6, "72x56": 0, "80x48": 5}
    assert json.loads(asked("--json", "model.aspect_buckets=null"))["buckets"] == {}
