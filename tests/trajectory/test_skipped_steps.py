"""A step whose loss or gradient is no number is named, and skipped as often as the recipe says."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from t2i_align.errors import TrainingError
from t2i_align.recipe import load_recipe
from t2i_align.train.engine import Engine
from t2i_align.train.offline import StoredFeed
from t2i_align.train.run import train
from tests import runs

RESUME = "train.resume_from_checkpoint=latest"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parts")
    data = runs.point_pairs(folder / "pairs.jsonl", 12, seed=0)
    train = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    steps = {"max_train_steps": 6, "checkpointing_steps": 1, "lr_scheduler": "cosine"}
    model = runs.point_model(folder / "model")
    recipe = runs.voxel_sections(model, data, folder / "cache", **train)
    return recipe | {"train": recipe["train"] | steps}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One record of step 3's first micro-batch has a target that is no number; its id."""
    real, names = StoredFeed.next, []

    def next_one(self: StoredFeed) -> Any:
        seen = self._engine.samples_seen if self._engine else 0
        drawn = real(self)
        if seen == 8 and self._position == 8 + 2 * 2 - 2:
            drawn.event.target[3] = float("nan")  # type: ignore[index]
            names.append(drawn.record_ids[1])
        return drawn

    monkeypatch.setattr(StoredFeed, "next", next_one)
    return names


def run(folder: Path, name: str, recipe: dict[str, Any], *overrides: str) -> str:
    """Train; what it said."""
    told = io.StringIO()
    path = runs.write_recipe(folder, name, recipe)
    train(load_recipe(path, overrides), Console(file=told))
    return told.getvalue()


def test_record_noise_level_and_place_are_named(
    parts: dict[str, Any], poisoned: list[str], tmp_path: Path
) -> None:
    """The network is sound, so the objective is named; without permission the run stops."""
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, "run", parts)
    text = caught.value.message
    assert "non-finite loss at step 3; every module is finite: in the objective" in text
    assert f"records: {poisoned[0]};" in text and "noise levels: 0." in text


def test_a_broken_module_is_named(parts: dict[str, Any], tmp_path: Path) -> None:
    """Infinite weights in one block: it is the first whose output is no number."""
    recipe = parts | {"train": parts["train"] | {"max_train_steps": 1}}
    run(tmp_path, "one", recipe)
    real = Engine.micro

    def broken(self: Engine, *, last: bool) -> Any:
        with torch.no_grad():
            self.trained["blocks.1.attn.to_v.weight"].fill_(float("inf"))
        return real(self, last=last)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError) as caught:
        patch.setattr(Engine, "micro", broken)
        run(tmp_path, "two", recipe)
    assert "first in module blocks.1.attn.to_v" in caught.value.message


@pytest.mark.parametrize("allowed", [0, 2])
def test_an_adapter_that_broke_is_named_and_skipped_so_often_only(
    parts: dict[str, Any], tmp_path: Path, allowed: int
) -> None:
    """A LoRA factor is NaN from step 3 on: each step says so, one beyond the bound stops."""
    model = parts["model"] | {"lora": {"r": 2, "lora_alpha": 2}}
    real, broken = Engine.micro, "blocks.1.attn.to_v.lora_B.default.weight"

    def micro(self: Engine, *, last: bool) -> Any:
        if self.samples_seen == 8:
            with torch.no_grad():
                self.trained[broken].fill_(float("nan"))
        return real(self, last=last)

    told, path = io.StringIO(), runs.write_recipe(tmp_path, "run", parts | {"model": model})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError) as caught:
        patch.setattr(Engine, "micro", micro)
        often = [f"train.max_skipped_steps={allowed}", "train.checkpointing_steps=100"]
        recipe = load_recipe(path, often)  # a save would find the weights themselves broken
        train(recipe, Console(file=told, width=1000))
    lines = [x for x in told.getvalue().splitlines() if x.startswith("skipped")]
    assert len(lines) == allowed
    module = broken.removesuffix(".weight")
    for step, text in enumerate([*lines, caught.value.message], start=3):
        assert f"non-finite loss at step {step}; first in module {module}; noise" in text
        levels = re.search(r"noise levels: ([0-9., ]+);", text)
        assert levels and len(levels[1].split(", ")) == 2  # one a record
        assert all(0 <= float(x) <= 1 for x in levels[1].split(", "))
        named = re.search(r"records: ([0-9, ]+)", text)
        assert named and set(named[1].split(", ")) <= {str(i) for i in range(12)}
    assert ("all 2 skips were used before" in caught.value.message) == (allowed == 2)
    seen = runs.losses(tmp_path / "run", "samples_seen")
    assert seen == [4.0 * n for n in range(1, 3 + allowed)]


def test_a_skipped_step_is_one_without_update(
    parts: dict[str, Any], poisoned: list[str], tmp_path: Path
) -> None:
    """Weights stand still over step 3, and step 4 has the records it would have had."""
    told = run(tmp_path, "run", parts, "train.max_skipped_steps=1")
    assert "skipped (1 of 1): non-finite loss at step 3; " in told and poisoned[0] in told
    two, three, four = (runs.weights(tmp_path / "run", n) for n in (2, 3, 4))
    assert all(torch.equal(two[k], three[k]) for k in two)
    assert not all(torch.equal(three[k], four[k]) for k in three)
    assert runs.losses(tmp_path / "run", "samples_seen") == [4.0 * n for n in range(1, 7)]
    rates = runs.losses(tmp_path / "run", "lr")
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 6


def test_the_count_survives_a_resume_and_bounds_it(
    parts: dict[str, Any], poisoned: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continued after the skip: the bits of the whole run; a second bad step stops it."""
    import shutil

    run(tmp_path, "whole", parts, "train.max_skipped_steps=1")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    run(tmp_path, "cut", parts, "train.max_skipped_steps=1", RESUME)
    for name in ("weights.safetensors", "optimizer.safetensors", "trainer.json"):
        file = f"checkpoints/step-00000006/{name}"
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    real = Engine.backward

    def broken(self: Engine, loss: torch.Tensor) -> None:
        real(self, loss)
        self.trained["blocks.1.attn.to_v.weight"].grad.fill_(float("nan"))  # type: ignore[union-attr]

    monkeypatch.setattr(Engine, "backward", broken)
    with pytest.raises(TrainingError) as caught:
        run(tmp_path, "cut", parts, "train.max_skipped_steps=1", RESUME)
    text = caught.value.message
    assert "non-finite gradient (gradient norm nan, in blocks.1.attn.to_v) at step 6" in text
    assert "all 1 skips were used before" in text
