"""Changes that must not change a run: how a batch is split, where it is interrupted, how many
processes share it.

Every test compares whole loss curves and final weights of real runs through the trainer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.tiny import pipeline_folder

TRAIN: dict[str, Any] = {
    "report_to": "none",
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "train_batch_size": 4,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.pickapic(tmp_path_factory.mktemp("data") / "pairs.parquet", 18)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def sections(
    model: Path, data: Path, cache: Path, *, lora: bool = True, **train: Any
) -> dict[str, Any]:
    chosen: dict[str, Any] = {"name_or_path": str(model), "resolution": 64, "random_flip": True}
    if lora:
        chosen["lora"] = {"r": 4, "lora_alpha": 4}
    return {
        "model": chosen,
        "objective": {"type": "dpo", "beta": 500.0},
        "data": {"type": "pickapic", "path": str(data), "proportion_empty_prompts": 0.3},
        "cache": {"dir": str(cache)},
        "train": TRAIN | train,
    }


def assert_same_weights(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float
) -> None:
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=atol, rtol=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sdxl: Path, pairs: Path, cache: Path) -> Path:
    """The uninterrupted run every other one is compared with."""
    folder = tmp_path_factory.mktemp("whole")
    runs.train(folder, "run", sections(sdxl, pairs, cache))
    return folder / "run"


def test_the_run_itself_moves(whole: Path) -> None:
    curve = runs.losses(whole)
    assert curve[:2] == pytest.approx([0.6931472] * 2, abs=1e-6)  # warm-up starts at rate 0
    assert len(set(curve[1:])) == 5
    assert len(runs.weights(whole, 6)) > 0


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (2, 2)])
def test_accumulation_equals_a_larger_batch(
    whole: Path, tmp_path: Path, sdxl: Path, pairs: Path, cache: Path, batch: int, accumulation: int
) -> None:
    split = sections(
        sdxl, pairs, cache, train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    runs.train(tmp_path, "split", split)
    assert runs.losses(tmp_path / "split") == pytest.approx(runs.losses(whole), abs=2e-4)
    assert_same_weights(runs.weights(tmp_path / "split", 6), runs.weights(whole, 6), 2e-4)


def test_gradient_checkpointing_changes_nothing(
    whole: Path, tmp_path: Path, sdxl: Path, pairs: Path, cache: Path
) -> None:
    same = sections(sdxl, pairs, cache)
    same["model"]["gradient_checkpointing"] = True
    runs.train(tmp_path, "ckpt", same)
    assert runs.losses(tmp_path / "ckpt") == pytest.approx(runs.losses(whole), abs=1e-5)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_resume_is_bitwise(
    tmp_path: Path, sdxl: Path, pairs: Path, cache: Path, optimizer: str, lora: bool
) -> None:
    """Stopped after step 3 and continued.

    Every later loss and every weight is bit-equal, EMA included.
    """
    recipe = sections(sdxl, pairs, cache, lora=lora, optimizer=optimizer, ema_decay=0.9)
    runs.train(tmp_path, "whole", recipe)
    torch.manual_seed(123)  # nothing may depend on the global generator
    runs.train(tmp_path, "cut", recipe)
    cut = tmp_path / "cut"
    last = cut / "checkpoints" / "step-00000006"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    runs.train(tmp_path, "cut", recipe, "train.resume_from_checkpoint=latest")
    assert runs.losses(cut) == runs.losses(tmp_path / "whole")
    assert runs.losses(cut, "grad_norm") == runs.losses(tmp_path / "whole", "grad_norm")
    assert_same_weights(runs.weights(cut, 6), runs.weights(tmp_path / "whole", 6), 0.0)
    name = "checkpoints/step-00000006/ema.safetensors"
    assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def command(recipe: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "t2i_align", "train", str(recipe), *overrides]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Poll until something is true of a running process."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def test_sigkill_in_the_middle_and_resume(
    tmp_path: Path, sdxl: Path, pairs: Path, cache: Path
) -> None:
    """Killed without warning after a checkpoint, then continued.

    The curve is that of an unbroken run, bit for bit.
    """
    recipe = sections(sdxl, pairs, cache, max_train_steps=60, checkpointing_steps=7)
    runs.write_recipe(tmp_path, "whole", recipe)
    path = runs.write_recipe(tmp_path, "killed", recipe)
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(path), env=environment(), stderr=subprocess.DEVNULL)
    wait_for((killed / "checkpoints" / "step-00000007").is_dir, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(runs.losses(killed)) if (killed / "metrics.jsonl").exists() else 0
    assert not (killed / "summary.json").exists() and done < 60
    subprocess.run(
        command(path, "train.resume_from_checkpoint=latest"), env=environment(), check=True
    )
    subprocess.run(command(tmp_path / "whole.yaml"), env=environment(), check=True)
    assert runs.losses(killed) == runs.losses(tmp_path / "whole")
    assert_same_weights(runs.weights(killed, 60), runs.weights(tmp_path / "whole", 60), 0.0)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_continue(
    tmp_path: Path, sdxl: Path, pairs: Path, cache: Path
) -> None:
    recipe = sections(sdxl, pairs, cache, max_train_steps=5000, checkpointing_steps=5000)
    path = runs.write_recipe(tmp_path, "run", recipe)
    log = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command(path), env=environment(), stderr=subprocess.PIPE)
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    text = stderr.decode()
    assert "a checkpoint was written" in text and "train.resume_from_checkpoint=latest" in text
    found = list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(found) == 1
    step = json.loads((found[0] / "trainer.json").read_text())["step"]
    assert step == len(runs.losses(tmp_path / "run"))


def test_two_processes_equal_one(
    whole: Path, tmp_path: Path, sdxl: Path, pairs: Path, cache: Path
) -> None:
    """2 processes x 2 micro-batches of 1 pair: records and gradient of 1 process x 4 pairs."""
    split = sections(sdxl, pairs, cache, train_batch_size=1, gradient_accumulation_steps=2)
    recipe = runs.write_recipe(tmp_path, "two", split)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, "-m", "t2i_align", "train", str(recipe)],
        env=environment() | {"ACCELERATE_USE_CPU": "true"},
        check=True,
        timeout=300,
    )
    assert runs.losses(tmp_path / "two") == pytest.approx(runs.losses(whole), abs=2e-4)
    assert_same_weights(runs.weights(tmp_path / "two", 6), runs.weights(whole, 6), 2e-4)
