"""The bench of layouts: what each saves to the last FLOP, equal losses, stopping and going on."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from t2i_align.cli import build_app
from t2i_align.contract import DrawSpec
from t2i_align.errors import OutputError
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.train import bench as module
from t2i_align.train.accounting import Account, Work
from t2i_align.train.bench import FILE, Bench, Row, markdown, notes
from t2i_align.train.bench_model import (
    RESOLUTION,
    SCHEDULER,
    VAE_SHARE,
    VAE_TOLERANCE,
    VAE_WIDTH,
    index,
    unet_config,
    vae_config,
)
from t2i_align.train.bench_step import LAYOUTS, Settings
from t2i_align.train.trace import Traced, example_event, trace
from tests.tiny import pipeline_folder

SILENT = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A tiny SDXL at 64 pixels."""
    folder = pipeline_folder("sdxl", tmp_path_factory.mktemp("m") / "m")
    return Settings(str(folder), resolution=64, pairs=2, rank=2)


@pytest.fixture(scope="module")
def done(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One timed round."""
    bench = Bench(tmp_path_factory.mktemp("bench"), settings)
    bench.run(1, SILENT)
    return bench


def total(bench: Bench, name: str) -> float:
    """FLOPs of a pair."""
    return Work(bench.rows[name].flops).total


def test_each_layout_lacks_exactly_what_it_leaves_out(done: Bench) -> None:
    """live - encode = latents, - recompute = activations, - reference = errors = the floor."""
    live = done.rows["live"].flops
    assert live.keys() >= {"encode", "reference", "forward", "backward", "recompute"}
    assert total(done, "latents") == total(done, "live") - live["encode"]
    assert total(done, "activations") == total(done, "latents") - live["recompute"]
    assert total(done, "errors") == total(done, "activations") - live["reference"]
    assert total(done, "errors") == done.rows["errors"].floor
    assert {done.rows[n].floor for n in ("live", "latents", "activations")} == {
        done.rows["errors"].floor
    }


def test_a_shared_trunk_runs_once(done: Bench) -> None:
    """The live reference adds its head alone, and the backward pass is shorter than with all."""
    shared, alone = done.rows["trunk, live"].flops, done.rows["trunk"].flops
    assert shared["trunk"] > 0 and "trunk" not in alone
    assert shared["trunk"] + shared["forward"] == alone["forward"]
    assert shared["trunk"] + shared["reference"] == done.rows["live"].flops["reference"]
    assert done.rows["trunk, live"].floor == total(done, "trunk") == done.rows["trunk"].floor
    assert alone["backward"] < done.rows["errors"].flops["backward"]


def test_layouts_of_the_same_adapters_find_the_same(done: Bench) -> None:
    """Loss and gradient norm; not those of untouched adapters, whose loss is log 2 everywhere."""
    assert done.differences()["loss"] < 1e-6 and done.differences()["norm"] < 1e-5
    assert abs(done.rows["live"].loss - 0.6931472) > 1e-4
    assert done.rows["live"].norm > 0
    assert done.rows["trunk"].norm < done.rows["live"].norm  # fewer adapters
    assert not any("WARNING" in note for note in notes(done))


def test_flops_are_flop_counter_modes(done: Bench) -> None:
    """Around one whole step of the dearest layout."""
    layout = LAYOUTS[0]
    side = done._side(layout)
    pair = side.pair(0)
    side.recompute(on=True)
    account = Account(torch.device("cpu"), torch.float32, 2, counted=False)
    with FlopCounterMode(display=False) as counter:
        side.step(layout, pair, None, account)
    side.restore()
    assert counter.get_total_flops() / 2 == total(done, "live")


def test_weights_are_put_back(done: Bench) -> None:
    side = done._side(LAYOUTS[0])
    assert all(torch.equal(p, side.start[k]) for k, p in side.engine.trained.items())


def test_a_stopped_bench_goes_on(done: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not measured again; a lost layout is, with the same numbers."""
    found = json.loads((done.out / FILE).read_text())
    lost = found["layouts"].pop("trunk")
    (done.out / FILE).write_text(json.dumps(found))
    again = Bench(done.out, done.settings)
    asked: list[tuple[str, int]] = []
    measure = Bench._measure

    def noted(self: Bench, layout: Any, number: int) -> None:
        asked.append((layout.name, number))
        measure(self, layout, number)

    monkeypatch.setattr(Bench, "_measure", noted)
    again.run(1, SILENT)
    assert asked == [("trunk", 0), ("trunk", 1)]
    now = again.rows["trunk"]
    assert (now.flops, now.loss, now.norm) == (lost["flops"], lost["loss"], lost["norm"])
    Bench(done.out, done.settings).run(1, SILENT)
    assert len(asked) == 2
    with pytest.raises(OutputError, match="bench of other settings"):
        Bench(done.out, replace(done.settings, pairs=3))


def row(flops: float, floor: float, loss: float, seconds: list[float]) -> Row:
    return Row({"forward": floor, "reference": flops - floor}, floor, loss, 1.0, 10**9, seconds, [])


def test_the_table_by_hand(tmp_path: Path) -> None:
    """Ratios of medians would be 0.4 here; ratios within rounds are 0.5, 0.25 and 0.5."""
    bench = Bench(tmp_path, Settings(pairs=2))
    bench.facts = {"peak_flops": 100.0, "parameters": 1, "peak_from": "told", "threads": 1}
    bench.facts |= {"date": "today", "device": "cpu", "torch": "2"}
    bench.rows["live"] = row(400.0, 100.0, 0.5, [2.0, 8.0, 5.0])
    bench.rows["errors"] = row(100.0, 100.0, 0.5, [1.0, 2.0, 2.5])
    first, last = bench.table()
    assert (first["of first"], first["of its floor"], first["wall ratio"]) == (
        "1.000",
        "4.000",
        "1.00",
    )
    assert (last["of first"], last["wall ratio"], last["s a step"]) == ("0.250", "0.50", "2.00")
    assert last["MFU"] == "100 %"  # 100 FLOP a pair, one pair a second, of 100 a second
    assert "| errors |" in markdown(bench) and markdown(bench).count("\n|") == 3
    bench.rows["errors"].loss = 0.6
    assert any(note.startswith("WARNING") for note in notes(bench))


def test_the_random_model_is_of_the_size_it_claims() -> None:
    """60 to 120 M parameters, one encode 0.72 +- 0.05 of a forward, counted without weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    config: Any = unet_config()
    build: Any = AutoencoderKL
    side = RESOLUTION // 8
    with torch.device("meta"), torch.no_grad():
        net = UNet2DConditionModel(**config)
        told = {"text_embeds": torch.zeros(1, 256), "time_ids": torch.zeros(1, 6)}
        text = torch.zeros(1, 77, config["cross_attention_dim"])
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 4, side, side), torch.zeros(1), text, added_cond_kwargs=told)
        forward = counter.get_total_flops()
        vae = build(**vae_config(VAE_WIDTH))
        with FlopCounterMode(display=False) as counter:
            vae.encode(torch.zeros(1, 3, RESOLUTION, RESOLUTION))
    assert 60e6 <= sum(p.numel() for p in net.parameters()) <= 120e6
    assert counter.get_total_flops() / forward == pytest.approx(VAE_SHARE, abs=VAE_TOLERANCE)


def traced(folder: Path, *, first: int | None = None, again: bool = False) -> Traced:
    """A pair's step on the meta device, from configs alone."""
    lora = LoraOptions(r=8, lora_alpha=8, from_block=first)
    options = DiffusersOptions(
        name_or_path=str(folder), resolution=RESOLUTION, lora=lora, gradient_checkpointing=again
    )
    g = DiffusersGenerator(options, "meta")
    g.load_module(0, reference=True)
    return trace(g, example_event(g, 2, DrawSpec()), reference=True)


def test_all_cached_is_under_its_target(tmp_path: Path) -> None:
    """At most 0.45 of the first layout, by the plan's own trace of the mid-size model.

    The first: recomputed step + reference + two encodes of 0.72 forwards.
    """
    for name, config in {"unet": unet_config(), "scheduler": SCHEDULER}.items():
        (tmp_path / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (tmp_path / name / file).write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps(index()))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae_config(VAE_WIDTH)))
    plain, again, late = traced(tmp_path), traced(tmp_path, again=True), traced(tmp_path, first=3)
    whole = again.step + (1 + VAE_SHARE) * again.reference
    print(f"all cached {plain.step / whole:.3f}, trunk {late.alone / whole:.3f} forward")
    assert plain.step / whole <= 0.45
    shared = late.step + late.reference
    assert shared < 0.55 * whole
    assert late.alone - late.forward > 0.3 * plain.reference  # the trunk's share of a forward


def test_the_verb(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options reach the settings; table.md and JSON are written."""
    told: list[Any] = []

    def run(self: Bench, rounds: int, console: Console) -> None:
        told.extend([self.settings, rounds])
        self.facts = {"peak_flops": 1.0, "parameters": 1, "peak_from": "told", "threads": 1}
        self.facts |= {"date": "today", "device": "cpu", "torch": "2"}
        self.rows["live"] = row(400.0, 100.0, 0.5, [2.0])

    monkeypatch.setattr(module.Bench, "run", run)
    verb = ["bench", "train", "--out", str(tmp_path), "--rounds", "2", "--model", "x"]
    result = CliRunner().invoke(build_app(), [*verb, "--resolution", "64", "--pairs", "3"])
    assert result.exit_code == 0, result.output
    assert told == [Settings("x", 64, 3), 2]
    assert "| live |" in (tmp_path / "table.md").read_text()
    refused = CliRunner().invoke(build_app(), ["bench", "train", "--precision", "fp8"])
    assert refused.exit_code != 0 and "give no or bf16" in refused.output
