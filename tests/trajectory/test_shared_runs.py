"""Ways to run that two processes share: adapters, a trunk, a kept reference, half precision.

DDP and FSDP2 on gloo, two processes of 2 records and two micro-batches a step, against one process
of 8; and runs that go on with other batches and another number of processes. Float32 agrees to
1e-5; in bf16 autocast each product is rounded to 8 bits, and losses agree to 5e-3.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests import ranks, runs
from tests.tiny import pipeline_folder

BACKENDS = ("ddp", "fsdp2")
LORA = {"lora": {"r": 4, "lora_alpha": 4}}
TRUNK = {"lora": {"r": 4, "lora_alpha": 4, "from_block": 1}}
BF16 = {"mixed_precision": "bf16"}
ROUND = {"draw": {"num_distinct": 1}}  # later passes meet the draws of the first
HALF_TOLERANCE = 5e-3
PICTURES: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3-again": {"gradient_checkpointing": True},
    "sd3-trunk": {"lora": {"r": 4, "lora_alpha": 4, "from_block": 1}},
}


def sections(
    folder: Path, model: dict[str, Any], batch: int, accumulation: int, **train: Any
) -> dict[str, Any]:
    options = {
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-2,
        "max_train_steps": 6,
        "checkpointing_steps": 3,
        "adam_epsilon": 1e-4,
    }
    files = folder / "model", folder / "pairs.jsonl", folder / "cache"
    recipe = runs.voxel_sections(*files, **options | train)
    return recipe | {"model": recipe["model"] | model}


def kept(folder: Path, cache: str, how: str) -> dict[str, Any]:
    return ROUND | {"cache": {"dir": str(folder / cache), "dtype": "float32", "reference": how}}


def pictures(folder: Path, batch: int, accumulation: int, **model: Any) -> dict[str, Any]:
    """A diffusers transformer, whose blocks FSDP2 makes units of their own."""
    recipe = sections(folder, {}, batch, accumulation, learning_rate=1e-3)
    lora = {"r": 4, "lora_alpha": 4}
    chosen = {"name_or_path": str(folder / "sd3"), "resolution": 64, "lora": lora}
    data = {"type": "pickapic", "path": str(folder / "pictures.parquet")}
    objective = {"type": "dpo", "beta": 500.0}
    return recipe | {"model": chosen | model, "data": data, "objective": objective}


def on(folder: Path, run: str) -> dict[str, str]:
    """Options of a run that goes on from the third step of another."""
    return {"resume_from_checkpoint": str(folder / run / "checkpoints" / "step-00000003")}


def of_two(folder: Path) -> list[Path]:
    """Recipes of two processes, in the order they are run."""

    def write(name: str, model: dict[str, Any], changes: dict[str, Any], **train: Any) -> Path:
        recipe = sections(folder, model, 2, 2, **train) | changes
        return runs.write_recipe(folder, name, recipe)

    made = []
    for backend in BACKENDS:
        how = {"distributed": {"backend": backend}}
        made += [
            write(f"lora-{backend}", LORA, {}, **how),
            write(f"trunk-{backend}", TRUNK, {}, **how),
            write(f"bf16-{backend}", LORA, {}, **how, **BF16),
            write(f"half-{backend}", LORA | {"dtype": "bfloat16"}, {}, **how, **BF16),
            write(f"kept-{backend}", LORA, kept(folder, f"of-{backend}", "always"), **how),
            write(f"read-{backend}", LORA, kept(folder, f"of-{backend}", "always"), **how),
            write(f"both-{backend}", TRUNK, kept(folder, f"of-{backend}", "always"), **how),
        ]
    for name, model in PICTURES.items():
        split = pictures(folder, 2, 2, **model)
        split["train"] |= {"distributed": {"backend": "fsdp2"}}
        made.append(runs.write_recipe(folder, f"{name}-fsdp2", split))
    made.append(write("two-on", LORA, {}, **on(folder, "lora-1")))
    fewer = sections(folder, LORA, 1, 1)
    fewer["data"]["path"] = str(folder / "one.jsonl")
    return [*made, runs.write_recipe(folder, "fewer-2", fewer)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    runs.point_model(folder / "model")
    runs.point_pairs(folder / "pairs.jsonl", 11, seed=0)
    runs.point_pairs(folder / "one.jsonl", 1, seed=0)
    with ranks.noting() as (drawn, _):
        runs.train(folder, "lora-1", sections(folder, LORA, 8, 1))
    (folder / "lora-1.drawn.json").write_text(json.dumps(drawn))
    pipeline_folder("sd3", folder / "sd3")
    runs.pickapic(folder / "pictures.parquet", 11)
    for name, model in PICTURES.items():
        runs.train(folder, f"{name}-1", pictures(folder, 8, 1, **model))
    runs.train(folder, "trunk-1", sections(folder, TRUNK, 8, 1))
    runs.train(folder, "round-1", sections(folder, LORA, 8, 1) | kept(folder, "none", "never"))
    runs.train(folder, "both-1", sections(folder, TRUNK, 8, 1) | kept(folder, "none", "never"))
    fewer = sections(folder, LORA, 2, 1)
    fewer["data"]["path"] = str(folder / "one.jsonl")
    runs.train(folder, "fewer-1", fewer)
    runs.forget_precision()
    runs.train(folder, "bf16-1", sections(folder, LORA, 8, 1, **BF16))
    half = LORA | {"dtype": "bfloat16"}
    runs.train(folder, "half-1", sections(folder, half, 8, 1, **BF16))
    runs.forget_precision()
    for code, said in ranks.start(folder, of_two(folder)):
        assert code == 0, said[-3000:]
    return folder


def assert_same(folder: Path, name: str, whole: str, *, begun: int = 0) -> None:
    curve = runs.losses(folder / whole)
    assert len(set(curve)) >= 5, "the run moves"
    assert runs.losses(folder / name) == pytest.approx(curve[begun:], abs=1e-5)
    one, two = (runs.weights(folder / run, 6) for run in (whole, name))
    assert one.keys() == two.keys()
    assert all((one[k] - two[k]).abs().max() < 1e-5 for k in one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["lora", "trunk"])
def test_adapters_and_a_trunk(both: Path, way: str, backend: str) -> None:
    assert_same(both, f"{way}-{backend}", f"{way}-1")
    kinds = json.loads((both / f"{way}-{backend}.rank-1.json").read_text())["kinds"]
    assert kinds == ["DTensor" if backend == "fsdp2" else "Parameter"]


@pytest.mark.parametrize("way", PICTURES)
def test_blocks_that_are_units(both: Path, way: str) -> None:
    """SD3's transformer: plain, checkpointed, and with a trunk; each block is gathered apart."""
    one, two = (runs.losses(both / f"{way}-{which}") for which in ("1", "fsdp2"))
    assert len(set(one)) >= 5 and two == pytest.approx(one, abs=1e-4)
    first, second = (runs.weights(both / f"{way}-{which}", 6) for which in ("1", "fsdp2"))
    assert first.keys() == second.keys()
    assert all((first[k] - second[k]).abs().max() < 1e-4 for k in first)
    kinds = json.loads((both / f"{way}-fsdp2.rank-1.json").read_text())["kinds"]
    assert kinds == ["DTensor"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kept_reference(both: Path, backend: str) -> None:
    """Written by two processes, then read by two; with a trunk below the adapters too."""
    assert_same(both, f"kept-{backend}", "round-1")
    assert_same(both, f"read-{backend}", "round-1")
    assert_same(both, f"both-{backend}", "both-1")
    cost = {
        name: json.loads((both / f"{name}-{backend}" / "summary.json").read_text())
        for name in ("kept", "read", "both")
    }
    assert cost["kept"]["reference_cache"]["scored"] > 0
    items = 6 * 4 * 2  # of one process: steps, records, sides
    for name in ("read", "both"):
        assert cost[name]["reference_cache"] == {"read": items, "scored": 0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["bf16", "half"])
def test_half_precision(both: Path, way: str, backend: str) -> None:
    """Autocast over float32 weights, and over a frozen base in bfloat16; adapters stay float32."""
    import torch

    one, two = (runs.losses(both / f"{way}-{which}") for which in ("1", backend))
    assert len(set(one)) >= 5 and two == pytest.approx(one, abs=HALF_TOLERANCE)
    full = runs.losses(both / "lora-1")
    assert one != pytest.approx(full, abs=1e-6), "it is not float32"
    assert {x.dtype for x in runs.weights(both / f"{way}-{backend}", 6).values()} == {torch.float32}


def test_fewer_records_than_processes(both: Path) -> None:
    """One record: each process has it, in another pass, so with another draw."""
    assert_same(both, "fewer-2", "fewer-1")
    facts = [json.loads((both / f"fewer-2.rank-{r}.json").read_text())["drawn"] for r in (0, 1)]
    assert all(part[0] == ["0"] for rank in facts for part in rank)
    noises = [part[1] for rank in facts for part in rank]
    assert len(set(noises)) == len(noises) == 12


# -- going on with other batches
# --------------------------------------------------------------------------------------------------


def stream(drawn: list[Any]) -> list[tuple[str, float]]:
    """Records in the order they were trained on, each with its pair's noise."""
    found = []
    for ids, _, items in drawn:
        sides = len(items) // len(ids)
        found += [(name, sum(items[k :: len(ids)])) for k, name in enumerate(ids) if sides == 2]
    return found


def assert_same_draws(mine: list[tuple[str, float]], whole: list[tuple[str, float]]) -> None:
    assert [name for name, _ in mine] == [name for name, _ in whole[: len(mine)]]
    assert [x for _, x in mine] == pytest.approx([x for _, x in whole[: len(mine)]], abs=1e-4)


def whole_stream(both: Path) -> list[tuple[str, float]]:
    found = stream(json.loads((both / "lora-1.drawn.json").read_text()))
    assert len(found) == 48
    return found


def test_one_process_becomes_two(both: Path) -> None:
    """Three steps of one process, three of two: the curve and the draws of one throughout."""
    assert_same(both, "two-on", "lora-1", begun=3)
    facts = [json.loads((both / f"two-on.rank-{r}.json").read_text())["drawn"] for r in (0, 1)]
    mine = [pair for parts in zip(*facts, strict=True) for pair in stream(list(parts))]
    assert_same_draws(mine, whole_stream(both)[24:])


def test_two_processes_become_one(both: Path, tmp_path: Path) -> None:
    for backend in BACKENDS:
        again = sections(both, LORA, 8, 1, **on(both, f"lora-{backend}"))
        with ranks.noting() as (drawn, _):
            runs.train(tmp_path, backend, again)
        assert runs.losses(tmp_path / backend) == pytest.approx(
            runs.losses(both / "lora-1")[3:], abs=1e-5
        )
        assert_same_draws(stream(drawn), whole_stream(both)[24:])


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4)])
def test_another_split_of_the_same_step(
    both: Path, tmp_path: Path, batch: int, accumulation: int
) -> None:
    again = sections(both, LORA, batch, accumulation, **on(both, "lora-1"))
    with ranks.noting() as (drawn, _):
        runs.train(tmp_path, "run", again)
    assert runs.losses(tmp_path / "run") == pytest.approx(
        runs.losses(both / "lora-1")[3:], abs=1e-5
    )
    assert_same_draws(stream(drawn), whole_stream(both)[24:])


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (3, 2), (12, 1)])
def test_another_size_of_the_step(
    both: Path, tmp_path: Path, batch: int, accumulation: int
) -> None:
    """Other records a step from the right record on: none left out, none twice, draws as before."""
    again = sections(both, LORA, batch, accumulation, **on(both, "lora-1"))
    with ranks.noting() as (drawn, _):
        runs.train(tmp_path, "run", again)
    mine = stream(drawn)
    assert len(mine) == 3 * batch * accumulation
    assert_same_draws(mine[:24], whole_stream(both)[24:])
    seen = runs.losses(tmp_path / "run", "samples_seen")
    assert seen == [24 + batch * accumulation * k for k in (1, 2, 3)]
    met = defaultdict(set)
    for name, noise in [*whole_stream(both)[:24], *mine]:
        assert round(noise, 5) not in met[name], "a draw is met twice"
        met[name].add(round(noise, 5))
