"""DeepSpeed's ZeRO in two processes is one process without it: losses, weights, resume, export.

    pytest -m gpu tests/gpu/test_zero.py        two CUDA devices, or none: then DeepSpeed on gloo

Needs the extra ``deepspeed``; a user's run on a CPU is refused, these go round that check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.generators.views import Views
from t2i_align.train.options import TrainOptions
from t2i_align.train.zero import Zero
from tests import ranks, runs

pytestmark = pytest.mark.gpu
WAYS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": {"r": 4, "lora_alpha": 4}}}
STAGES = (2, 3)


def sections(folder: Path, way: str, batch: int, **train: Any) -> dict[str, Any]:
    options = {
        "train_batch_size": batch,
        "learning_rate": 1e-2,
        "max_train_steps": 5,
        "checkpointing_steps": 3,
        "lr_scheduler": "cosine",
        "adam_epsilon": 1e-4,
    }
    files = folder / "model", folder / "pairs.jsonl", folder / "cache"
    recipe = runs.voxel_sections(*files, **options | train)
    return recipe | {"model": recipe["model"] | WAYS[way]}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    how = {"backend": "deepspeed", "zero_stage": stage, **more}
    return {"distributed": how, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process by every way, then two under every stage, then what goes on from where."""
    where = tmp_path_factory.mktemp("zero")
    runs.point_model(where / "model")
    runs.point_pairs(where / "pairs.jsonl", 11, seed=0)
    recipes, later = [], []
    for way in WAYS:
        runs.train(where, f"{way}-1", sections(where, way, 8))
        for stage in STAGES:
            split = sections(where, way, 2, **zero(stage))
            recipes.append(runs.write_recipe(where, f"{way}-zero{stage}", split))
            start = {"resume_from_checkpoint": str(where / f"{way}-1/checkpoints/step-00000003")}
            resumed = sections(where, way, 2, **zero(stage) | start)
            recipes.append(runs.write_recipe(where, f"{way}-zero{stage}-on", resumed))
            start = {"resume_from_checkpoint": str(checkpoint(where, way, stage))}
            other = sections(where, way, 2, **zero(5 - stage) | start)
            later.append(runs.write_recipe(where, f"{way}-zero{stage}-to", other))
    half = {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    recipes.append(runs.write_recipe(where, "bf16-ddp", sections(where, "lora", 2, **half)))
    for stage in STAGES:
        split = sections(where, "lora", 2, **half | zero(stage))
        recipes.append(runs.write_recipe(where, f"bf16-zero{stage}", split))
    ended = ranks.start(where, [*recipes, *later], cpu=not torch.cuda.is_available(), seconds=1500)
    for code, said in ended:
        assert code == 0, said[-3000:]
    return where


def checkpoint(where: Path, way: str, stage: int) -> Path:
    return where / f"{way}-zero{stage}" / "checkpoints" / "step-00000003"


def assert_same(folder: Path, name: str, way: str, *, begun: int = 0) -> None:
    whole = runs.losses(folder / f"{way}-1")[begun:]
    assert runs.losses(folder / name) == pytest.approx(whole, abs=1e-5)
    norms = runs.losses(folder / f"{way}-1", "grad_norm")[begun:]
    assert runs.losses(folder / name, "grad_norm") == pytest.approx(norms, rel=1e-3, abs=1e-5)
    rates = runs.losses(folder / f"{way}-1", "lr")[begun:]
    assert runs.losses(folder / name, "lr") == rates
    one, two = (runs.weights(folder / run, 5) for run in (f"{way}-1", name))
    assert one.keys() == two.keys()
    for k in one:
        assert (one[k] - two[k]).abs().max() < 1e-5, k


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_weights_are_those_of_one_process(folder: Path, stage: int, way: str) -> None:
    assert len(set(runs.losses(folder / f"{way}-1"))) >= 4
    assert_same(folder, f"{way}-zero{stage}", way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_goes_on_from_one_process_and_from_the_other_stage(
    folder: Path, stage: int, way: str
) -> None:
    assert_same(folder, f"{way}-zero{stage}-on", way, begun=3)
    assert_same(folder, f"{way}-zero{stage}-to", way, begun=3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on(folder: Path, tmp_path: Path, stage: int, way: str) -> None:
    start = {"resume_from_checkpoint": str(checkpoint(folder, way, stage))}
    runs.train(tmp_path, "one", sections(folder, way, 8, **start))
    whole = runs.losses(folder / f"{way}-1")[3:]
    assert runs.losses(tmp_path / "one") == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_export_is_whole(folder: Path, stage: int, way: str) -> None:
    from safetensors.torch import load_file

    (file,) = {p.name for p in (folder / f"{way}-1").glob("*.safetensors")}
    one, two = (load_file(folder / n / file) for n in (f"{way}-1", f"{way}-zero{stage}"))
    assert one.keys() == two.keys()
    assert all(one[k].shape == two[k].shape for k in one)
    assert all((one[k] - two[k]).abs().max() < 1e-5 for k in one)


@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_is_autocast_as_without(folder: Path, stage: int) -> None:
    plain = runs.losses(folder / "bf16-ddp")
    assert runs.losses(folder / f"bf16-zero{stage}") == pytest.approx(plain, abs=2e-3)
    kept = runs.weights(folder / f"bf16-zero{stage}", 5)
    assert {x.dtype for x in kept.values()} == {torch.float32}


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One process as a group, once: DeepSpeed keeps the group it has seen first."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    where = f"file://{tmp_path_factory.mktemp('group') / 'm'}"
    backend = "nccl" if found == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=where, rank=0, world_size=1)
    yield found
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_no_number_touches_no_weight(
    stage: int, dtype: torch.dtype, device: str
) -> None:
    """Told as a norm that is no number, and the step after it is a step."""
    network = torch.nn.Linear(4, 4).to(device, dtype)
    options = TrainOptions.model_validate(zero(stage) | {"gradient_accumulation_steps": 1})
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    engine = Zero(options, Views(network, None), optimizer)
    norms, weights = [], []
    for factor in (1.0, float("nan"), 1.0):
        engine.micro(last=True)
        x = torch.ones(2, 4, device=device, dtype=dtype)
        engine.backward(factor * engine.engine(x).sum())
        norms.append(engine.step())
        weights.append(engine.gather()["weights"]["weight"].clone())
    assert [math.isfinite(norm) for norm in norms] == [True, False, True]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert weights[2].isfinite().all()
