"""Counting what steps cost: against FlopCounterMode, the plan, and arithmetic by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from t2i_align.recipe import Recipe, load_recipe
from t2i_align.train import accounting
from t2i_align.train.accounting import (
    Account,
    Clock,
    Meter,
    Peak,
    Work,
    line,
    measured_peak,
    peak_of,
    tera,
)
from t2i_align.train.plan import plan
from tests import measuring, runs
from tests.denoisers import errors, event, folders, generator, train_adapters
from tests.tiny import pipeline_folder

CPU = torch.device("cpu")


def metered(net: nn.Module, x: Tensor, *, again: bool) -> dict[str, int]:
    """FLOPs of forward and backward, recomputed in between or not."""
    meter = Meter()
    with meter:
        meter.phase = "forward"
        y: Any = checkpoint(net, x, use_reentrant=False) if again else net(x)
        meter.phase = "backward"
        y.sum().backward()
    return dict(meter.flops)


@pytest.mark.parametrize("again", [False, True])
def test_products_by_hand(again: bool) -> None:
    """Two layers of 5 rows, 4 -> 6 -> 3: 2 m n k a product.

    Backward: both weights' gradients, and the inner state's; the input asks for none. Recomputation
    ends when the last tensor that was let go is there again, so before the second layer.
    """
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    first, second = 2 * 5 * 4 * 6, 2 * 5 * 6 * 3
    wanted = {"forward": first + second, "backward": first + 2 * second}
    if again:
        wanted["recompute"] = first
    assert metered(net, torch.randn(5, 4), again=again) == wanted


def test_the_sum_is_flop_counter_modes(tmp_path: Path) -> None:
    """On a UNet with attention, convolutions and recomputed blocks; forward, then backward."""
    g = generator(
        folders(tmp_path, "sdxl")["sdxl"],
        lora={"r": 2, "lora_alpha": 4},
        gradient_checkpointing=True,
    )
    train_adapters(g)
    drawn, meter = event(g), Meter()
    with FlopCounterMode(display=False) as counter:
        errors(g, drawn).sum().backward()
    with meter:
        meter.phase = "forward"
        error = errors(g, drawn)
        meter.phase = "backward"
        error.sum().backward()
    assert sum(meter.flops.values()) == counter.get_total_flops()
    assert 0 < meter.flops["recompute"] <= meter.flops["forward"]


def test_floor_and_share() -> None:
    """Eq. (1) and (2): VAE, reference and recomputation are above the floor, the trunk is in it."""
    parts = {"encode": 10.0, "reference": 30.0, "trunk": 5.0, "forward": 40.0, "backward": 55.0}
    work = Work(parts | {"recompute": 40.0, "data": 20.0})
    assert (work.total, work.floor, work.share) == (200.0, 100.0, 2.0)
    assert Work({}).share == 0.0


class Steps:
    """An account of steps with a product of each kind, taken by a clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.now = 0.0
        monkeypatch.setattr(accounting.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(accounting, "peak_of", lambda *_: Peak(1e4, "told"))
        self.account = Account(CPU, torch.float32, 4, **options)

    def take(self, seconds: float, live: bool = True) -> None:
        """Reference n, forward 2 n, data 3 n with n = 2 * 8^3 FLOPs; all time in the forward."""
        a, phase = torch.ones(8, 8), self.account.phase
        with self.account.step():
            with phase("data"):
                _ = a @ a @ a @ a
            self.account.asked(live=live)
            with phase("reference"):
                _ = a @ a if live else a
            with phase("forward"):
                _ = a @ a @ a
                self.now += seconds


def test_rates_leave_out_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four records a step: 10 s, then 2 and 3; Eq. (3) and (4) by hand."""
    steps = Steps(monkeypatch)
    for seconds in (10.0, 2.0, 3.0):
        steps.take(seconds)
    found, n = steps.account.summary({"prepare": 7.0, "train": 15.0, "checkpoint": 1.0}), 2 * 8**3
    assert found["flops_per_record"] == 6 * n / 4 and found["floor"] == 2 * n / 4
    assert found["share_of_floor"] == 3.0
    rate = 4 * 2 / 5.0
    assert found["records_per_second_and_process"] == rate
    assert found["mfu"] == round(2 * n / 4 * rate / 1e4, 4)
    assert found["hfu"] == pytest.approx(3 * found["mfu"], rel=1e-3)
    seconds = found["seconds"]
    assert (seconds["encode"], seconds["checkpoint"], seconds["forward"]) == (7.0, 1.0, 15.0)
    assert "train" not in seconds  # its parts are there
    told = line(found)
    assert "3.00 of its floor" in told and "seconds: forward 15.0" in told


def test_a_cached_reference_counts_as_often_as_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of four micro-batches asked the network."""
    steps = Steps(monkeypatch)
    for k in range(4):
        steps.take(1.0, live=k == 0)
    n = 2 * 8**3 / 4
    flops = steps.account.summary({})["flops"]
    assert flops == {"data": 3 * n, "reference": n / 4, "forward": 2 * n}


def test_sampling_is_left_out_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, sampled=True)
    steps.take(1.0)
    found = steps.account.summary({})
    assert "data" not in found["flops"]
    assert found["flops_leave_out"] == "sampling and judging"
    assert found["mfu"] is None and found["records_per_second_and_process"] is None


def test_what_cannot_be_counted_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled network: times, and a sentence where the FLOPs would be."""
    steps = Steps(monkeypatch, counted=False)
    steps.take(1.0)
    steps.take(2.0)
    found = steps.account.summary({})
    assert found["records_per_second_and_process"] == 2.0
    assert found["flops"].startswith("not counted") and "mfu" not in found
    assert "not counted" in line(found)


def test_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(accounting.time, "perf_counter", lambda: now[0])
    clock = Clock(CPU)
    for seconds in (1.0, 2.5):
        with clock("data"):
            now[0] += seconds
    with pytest.raises(KeyError), clock("backward"):
        now[0] += 4.0
        raise KeyError
    clock.settle()
    assert dict(clock.seconds) == {"data": 3.5, "backward": 4.0}


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: 2 n^3 over the fastest product's time. Published: by the driver's name."""
    ticks = iter([0.0, 1.0, 1.0, 1.5, 2.0, 2.25, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(accounting.time, "perf_counter", lambda: next(ticks))
    found = measured_peak(CPU, torch.float32, 16)
    assert found.flops == 2 * 16**3 / 0.25
    assert found.source.startswith("measured: 16 x 16 matrices in float32")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    known = peak_of(torch.device("cuda"), torch.bfloat16)
    assert known.flops == 312e12 and known.source.startswith("published for A100")


def test_units() -> None:
    assert [tera(x) for x in (6.76e12, 7.26e10, 1.5e6)] == ["6.76 TFLOP", "72.6 GFLOP", "1.5 MFLOP"]


def run_recipe(folder: Path, **sections: Any) -> Recipe:
    """Six pairs, DPO with LoRA on a tiny SDXL."""
    base: dict[str, Any] = {
        "model": {
            "name_or_path": str(pipeline_folder("sdxl", folder / "m")),
            "resolution": 64,
            "lora": {"r": 2, "lora_alpha": 4},
            **sections.pop("model", {}),
        },
        "data": {"type": "pickapic", "path": str(runs.pickapic(folder / "pairs.parquet", 6))},
        "objective": {"type": "dpo"},
        "cache": {"dir": str(folder / "cache"), **sections.pop("cache", {})},
        "train": {"report_to": "none", "max_train_steps": 3, **sections.pop("train", {})},
    }
    return load_recipe(runs.write_recipe(folder, "run", base | sections))


def test_a_run_tells_what_the_plan_told(tmp_path: Path) -> None:
    """Accumulated, recomputed, two records a micro-batch; in summary.json."""
    train = {"gradient_accumulation_steps": 2, "train_batch_size": 2}
    recipe = run_recipe(tmp_path, train=train, model={"gradient_checkpointing": True})
    measuring.started(recipe).run()
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["accounting"]
    expected = plan(recipe, "cpu")
    assert found["flops_per_record"] == pytest.approx(expected.flops_per_record, rel=0.02)
    assert found["flops"]["reference"] == pytest.approx(expected.flops["reference"], rel=0.02)
    kinds = found["flops"]
    assert kinds.keys() == {"reference", "forward", "recompute", "backward"}
    assert found["floor"] == pytest.approx(kinds["forward"] + kinds["backward"], abs=2)
    wanted = {"encode", "load", "data", "reference", "forward", "backward", "optimizer"}
    assert wanted | {"checkpoint"} <= found["seconds"].keys()
    assert math.isclose(found["hfu"] / found["mfu"], found["share_of_floor"], rel_tol=0.2)


def test_a_run_with_kept_errors_nears_its_floor(tmp_path: Path) -> None:
    """Two passes over six records, the same draws: the second pass asks once, to be sure."""
    recipe = run_recipe(
        tmp_path,
        train={"max_train_steps": 12},
        draw={"num_distinct": 1},
        cache={"reference": "always"},
    )
    measuring.started(recipe).run()
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["accounting"]
    whole = plan(recipe, "cpu").flops["reference"]
    assert found["flops"]["reference"] == pytest.approx(7 / 12 * whole, rel=0.02)
