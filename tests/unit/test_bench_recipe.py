"""The profile of a recipe's step: sums by hand, and real steps of a tiny SDXL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from t2i_align.cli import build_app
from t2i_align.train import bench_recipe
from t2i_align.train.bench_recipe import (
    FILE,
    KINDS,
    NUM_WARM,
    OTHER,
    Job,
    apart,
    compared,
    kind_of,
    measure,
    shares,
    step_seconds,
    summary,
    tables,
)
from tests import runs
from tests.runs import forget_precision
from tests.tiny import pipeline_folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny SDXL with adapters, two pairs a step."""
    folder = tmp_path_factory.mktemp("profile")
    pipeline_folder("sdxl", folder / "m")
    runs.pickapic(folder / "pairs.parquet", 8)
    lora = {"r": 2, "lora_alpha": 4}
    sections = {
        "model": {"name_or_path": str(folder / "m"), "resolution": 64, "lora": lora},
        "data": {"type": "pickapic", "path": str(folder / "pairs.parquet")},
        "objective": {"type": "dpo", "beta": 50.0},
        "cache": {"dir": str(folder / "cache")},
        "train": {"max_train_steps": 9, "train_batch_size": 2},
    }
    return str(runs.write_recipe(folder, "profile", sections))


@pytest.fixture(scope="module")
def found(recipe: str) -> dict[str, Any]:
    """Two timed steps, and their operations."""
    forget_precision()
    return measure(Job(recipe, (), 2, profiled=True))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::convolution_backward", "convolutions"),
        ("aten::native_group_norm_backward", "norms"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::addmm", "matrix products"),
        ("aten::mm", "matrix products"),
        ("aten::copy_", "copies and casts"),
        ("aten::cat", "copies and casts"),
        ("aten::silu", OTHER),
        ("aten::mul", OTHER),
    ],
)
def test_what_operations_are(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_shares_by_hand() -> None:
    told = shares([("aten::mm", 1.0), ("aten::addmm", 2.0), ("aten::silu", 5.0), ("aten::cat", 2)])
    assert told == {OTHER: 0.5, "matrix products": 0.3, "copies and casts": 0.2}
    assert list(told) == [OTHER, "matrix products", "copies and casts"]
    assert shares([]) == {}


def run_of(seconds: list[float], *losses: float) -> dict[str, Any]:
    phases = {"forward": seconds[0] / 2, "reference": seconds[0] / 4}
    flops = {"reference": 1e9, "forward": 1e9, "backward": 2e9}
    return {"seconds": seconds, "losses": list(losses), "phases": phases, "flops": flops} | {
        "records": 4,
        "kinds": {"norms": 1.0},
    }


def test_a_variant_is_held_by_its_fastest_step() -> None:
    """A busy machine slows single steps: 1.6 of 2.0 is what is left of 9, 5, 7 and 3."""
    own = [run_of([2.0, 9.0, 2.0], 1.0, 2.0), run_of([5.0], 1.0, 2.0), run_of([2.0], 1.0, 2.0)]
    other = [run_of([7.0], 1.0, 2.1), run_of([1.6], 1.0, 2.1), run_of([3.0], 1.0, 2.1)]
    told = compared(own, other)
    assert told["ratio"] == 0.8 and told["seconds"] == 3.0
    assert told["loss_off"] == pytest.approx(0.05)
    whole = summary("r", {"": own, "train.x=1": other}, ())
    assert whole["seconds"] == 2.0 and list(whole["variants"]) == ["train.x=1"]
    shown = tables(whole)
    assert shown["variants"][0]["ratio"] == "0.80"
    assert [row["phase"] for row in shown["phases"]] == ["forward", "reference"]
    assert [row["in the floor"] for row in shown["phases"]] == ["yes", "no"]
    assert shown["phases"][0]["of the step"] == "50 %" and shown["phases"][0]["of all"] == "25 %"


def test_a_real_step(found: dict[str, Any]) -> None:
    """Phases fill the step, operations are found, work is what the run's summary would tell."""
    assert found["records"] == 2 and len(found["seconds"]) == 2
    assert len(found["losses"]) == NUM_WARM + 2
    inside = sum(found["phases"].values())
    assert 0.5 * step_seconds(found) < inside <= 1.01 * sum(found["seconds"]) / 2
    assert {"reference", "forward", "backward", "optimizer", "data"} <= found["phases"].keys()
    kinds = found["kinds"]
    assert sum(kinds.values()) == pytest.approx(1) and kinds.keys() <= {*KINDS, OTHER}
    assert min(kinds[k] for k in ("convolutions", "matrix products", "attention", "norms")) > 0
    flops = found["flops"]
    assert 0.7 < flops["reference"] / flops["forward"] <= 1  # adapters are off
    assert 0 < flops["backward"] < 2.1 * flops["forward"]  # adapters: no gradients of most weights


def test_the_verb_takes_turns(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round has the recipe and its variants; only the first process is looked into."""
    asked: list[Job] = []

    def here(job: Job, prepare: Callable[[], None]) -> dict[str, Any]:
        forget_precision()
        asked.append(job)
        return measure(job)

    monkeypatch.setattr(bench_recipe, "apart", here)
    line = f"bench step --recipe {recipe} --out {tmp_path} --steps 1 --rounds 2 --set seed=3"
    slow = "train.channels_last=true objective.beta=5"
    result = CliRunner().invoke(build_app(), [*line.split(), "--variant", slow])
    assert result.exit_code == 0, result.output + repr(result.exception)
    told = [(job.overrides, job.profiled) for job in asked]
    own, other = ("seed=3",), ("seed=3", *slow.split())
    assert told == [(own, True), (other, False), (own, False), (other, False)]
    written = json.loads((tmp_path / FILE).read_text())
    assert written["variants"][slow]["loss_off"] > 1e-6 and len(written["kinds"]) > 4
    assert "convolutions" in result.output and "in the floor" in result.output


@pytest.mark.slow
def test_processes_of_their_own(recipe: str) -> None:
    """What a fresh process trains is what this one trains."""
    forget_precision()
    job = Job(recipe, (), 1)
    assert apart(job, forget_precision)["losses"] == measure(job)["losses"]
