"""Recomputing some blocks: the same gradients, FLOPs by the share, and no more than the plan needs.

The plan of a share is held against torch's MemTracker around real steps.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from t2i_align.errors import RecipeError
from t2i_align.generators.checkpointing import Recomputed, set_share
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.recipe import Recipe, load_recipe
from t2i_align.train.loop import Run
from t2i_align.train.plan import plan
from t2i_align.train.recompute import SHARES, budget, told
from tests import measuring, runs
from tests.denoisers import errors, event, generator, train_adapters
from tests.runs import forget_precision
from tests.tiny import pipeline_folder
from tests.tiny_flux import chroma

FAMILIES = ("sdxl", "sd3", "chroma")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A UNet, a DiT, and a DiT whose blocks' own calls are recomputed."""
    where = tmp_path_factory.mktemp("tiny")
    made = {name: pipeline_folder(name, where / name) for name in ("sdxl", "sd3")}
    return made | {"chroma": chroma(where / "chroma")}


@pytest.mark.parametrize(
    ("share", "taken"),
    [(0.0, ""), (0.25, "37"), (0.5, "1357"), (0.75, "123567"), (1.0, "01234567")],
)
def test_a_share_is_spread_evenly(share: float, taken: str) -> None:
    """Of eight blocks, by the order of their first calls; the same at each later call."""
    own, blocks = Recomputed(), [nn.Identity() for _ in range(8)]
    own.share = share
    for _ in range(2):
        assert "".join(str(k) for k, block in enumerate(blocks) if own.takes(block)) == taken


def step(g: DiffusersGenerator, drawn: Any) -> tuple[list[Tensor], int, int]:
    """Gradients, and FLOPs of forward and backward."""
    with FlopCounterMode(display=False) as forward:
        loss = errors(g, drawn, "policy").sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    grads = [p.grad.clone() for p in g.views.trained().values() if p.grad is not None]
    g.module.zero_grad(set_to_none=True)
    return grads, forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_and_flops_grow_with_the_share(
    family: str, tiny: dict[str, Path]
) -> None:
    """Share 0 costs what no checkpointing costs, share 1 most; gradients to the last bit."""
    lora = {"r": 2, "lora_alpha": 4}  # 64 px, as tests.denoisers has it
    plain = generator(tiny[family], lora=lora)
    lean = generator(tiny[family], lora=lora, gradient_checkpointing=True)
    for g in (plain, lean):
        train_adapters(g)
    drawn = event(plain)
    wanted, forward, backward = step(plain, drawn)
    spent = []
    for share in SHARES:
        set_share(lean.module, share)
        found, same, again = step(lean, drawn)
        assert same == forward and len(found) == len(wanted) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        spent.append(again - backward)
    assert spent[0] == 0 and spent == sorted(spent)
    assert 0 < spent[2] < spent[4] <= forward


def test_only_a_network_with_checkpointing_has_a_share(tiny: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="loaded without gradient checkpointing"):
        set_share(generator(tiny["sdxl"]).module, 0.5)


def test_a_frozen_copy_runs_its_own_blocks(tiny: dict[str, Path]) -> None:
    """Full training of a network whose blocks' calls are replaced: the copy is no second name."""
    asked = {"name_or_path": str(tiny["chroma"]), "resolution": 64, "gradient_checkpointing": True}
    g = DiffusersGenerator(DiffusersOptions.model_validate(asked))
    g.load_module(0, reference=True)
    drawn = event(g)
    with torch.no_grad():
        before = errors(g, drawn, "reference")
        for p in g.module.parameters():
            p.mul_(1.5)
        assert torch.equal(errors(g, drawn, "reference"), before)
        assert not torch.equal(errors(g, drawn, "policy"), before)


def recipe_of(folder: Path, tiny: dict[str, Path], name: str, **train: Any) -> Recipe:
    """Full training of the tiny SDXL, as much recomputed as ``train`` leaves."""
    data = folder.parent / "pairs.parquet"
    if not data.exists():
        runs.pickapic(data, 6)
    chosen = train.pop("checkpointing", "auto")
    sections: dict[str, Any] = {
        "model": {
            "name_or_path": str(tiny["sdxl"]),
            "resolution": 128,
            "gradient_checkpointing": chosen,
        },
        "objective": {"type": "dpo", "beta": 50.0},
        "data": {"type": "pickapic", "path": str(data)},
        "cache": {"dir": str(folder.parent / "cache")},
        "train": {"report_to": "none", "max_train_steps": 2, "train_batch_size": 2, **train},
    }
    return load_recipe(runs.write_recipe(folder, name, sections))


def peaks(tiny: dict[str, Path], folder: Path) -> tuple[float, float]:
    """Planned GB without and with recomputation."""
    found = [
        plan(recipe_of(folder, tiny, f"p{c}", checkpointing=c), "cpu").memory["peak"] / 1e9
        for c in (False, True)
    ]
    return found[0], found[1]


def test_no_more_is_recomputed_than_the_plan_needs(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Plenty: nothing. Between: the least share that fits. Too little: all, and it is said."""
    most, least = peaks(tiny, tmp_path)
    assert least < most
    found = plan(recipe_of(tmp_path, tiny, "a", memory_gb=most * 1.001), "cpu")
    assert found.recomputed == 0 and found.memory["peak"] / 1e9 == pytest.approx(most)
    assert ("recomputed", "0% of blocks") in found.rows()
    middle = plan(recipe_of(tmp_path, tiny, "b", memory_gb=(most + least) / 2), "cpu")
    assert middle.recomputed in SHARES[1:]
    assert least * 1e9 <= middle.memory["peak"] <= (most + least) / 2 * 1e9
    tight = plan(recipe_of(tmp_path, tiny, "c", memory_gb=least / 2), "cpu")
    assert tight.recomputed == 1 and tight.memory["peak"] / 1e9 == pytest.approx(least)
    assert told(1.0, 2 * 10**9, 1e9).endswith("planned peak 2.00 GB of 1.00 GB, which is too much")
    assert found.flops_per_record < middle.flops_per_record <= tight.flops_per_record
    assert plan(recipe_of(tmp_path, tiny, "d", checkpointing=True), "cpu").recomputed is None


def test_a_run_recomputes_what_was_planned(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Losses are those of a run without; FLOPs and memory those of the plan; the log says so."""
    most, least = peaks(tiny, tmp_path)
    curves, told_, bytes_ = {}, {}, {}
    for name, gb in (("none", most * 1.01), ("some", (most + least) / 2), ("all", least / 2)):
        recipe = recipe_of(tmp_path, tiny, name, memory_gb=gb)
        forget_precision()
        console = Console(file=io.StringIO(), width=200)
        run = Run(recipe, console)
        with measuring.Tracked(run) as tracked:
            curves[name] = [run._step()["loss"] for _ in range(2)]
        run.feed.close()
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        told_[name] = next(x for x in text.splitlines() if x.startswith("gradient checkpointing"))
        bytes_[name] = tracked.peak
        assert tracked.peak == pytest.approx(plan(recipe, "cpu").memory["peak"], rel=0.05)
        again = run.account.work
        assert again is not None and (again.by_kind.get("recompute", 0) > 0) == (name != "none")
    assert curves["none"] == curves["some"] == curves["all"]
    assert bytes_["all"] < bytes_["some"] < bytes_["none"]
    assert "no block recomputed" in told_["none"] and "too much" in told_["all"]


def test_without_a_number_the_device_decides(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    recipe = recipe_of(tmp_path, tiny, "device")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert budget(recipe) == 0.9 * 4096 * 1000
    assert budget(recipe_of(tmp_path, tiny, "given", memory_gb=24)) == 24e9


def test_another_word_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.gradient_checkpointing"):
        recipe_of(tmp_path, tiny, "word", checkpointing="sometimes")
