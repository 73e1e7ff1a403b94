"""The shipped recipe of every family trains: tiny weights and data, the rest as it stands."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from t2i_align.recipe import load_recipe, shipped
from t2i_align.train.run import train
from tests import cases_flux, cases_image, cases_language, cases_video
from tests.backbones import pairs
from tests.runs import forget_precision, pickapic

GROUPS = (cases_flux, cases_image, cases_language, cases_video)
CASES = {case.name: case for group in GROUPS for case in group.CASES}
FAMILY = {
    "chroma_dpo_lora": "chroma",
    "cogvideox_dpo_lora": "cogvideox_2b",
    "cogview4_dpo_lora": "cogview4",
    "flux2_dpo_lora": "flux2",
    "flux_dpo_lora": "flux",
    "hunyuanimage_dpo_lora": "hunyuan_image",
    "ltx_dpo_lora": "ltx",
    "lumina2_dpo_lora": "lumina2",
    "pixart_dpo_lora": "pixart_sigma",
    "qwenimage_dpo_lora": "qwen_image",
    "sana_dpo_lora": "sana",
    "sd15_dpo_lora_8gb": "sd",
    "sd3_dpo_lora_24gb": "sd3",
    "sdxl_dpo_lora_24gb": "sdxl",
    "wan_dpo_lora": "wan",
    "zimage_dpo_lora": "z_image",
}


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """Runs before and after these have other precisions."""
    forget_precision()
    yield
    forget_precision()


def test_every_recipe_with_lora_pairs_is_here() -> None:
    assert set(FAMILY) == {name for name in shipped() if "_dpo_lora" in name}


@pytest.mark.parametrize("name", FAMILY)
def test_a_step_of_the_recipe(name: str, tmp_path: Path) -> None:
    case = CASES[FAMILY[name]]
    folder = tmp_path / "model"
    case.build(folder)
    given: dict[str, Any] = {f"model.{k}": v for k, v in case.options.items()}
    side, frames = given["model.resolution"], given.get("model.num_frames", 1)
    data = pickapic(tmp_path / "d.parquet", 3) if frames == 1 else pairs(tmp_path, side, frames)
    given |= {
        "output_dir": tmp_path / "run",
        "model.name_or_path": folder,
        "data.path": data,
        "cache.dir": tmp_path / "cache",
        "train.max_train_steps": 3,
        "train.lr_warmup_steps": 1,  # of 3 steps, the first at rate 0
        "train.gradient_accumulation_steps": 2,
        "train.learning_rate": 1e-3,  # seen after one step
        "train.report_to": "none",
    }
    recipe = load_recipe(name, [f"{key}={value}" for key, value in given.items()])
    summary = train(recipe, Console(file=io.StringIO()))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert summary["steps"] == 3 and last["step"] == 3
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # adapters start at the reference
    assert last["loss"] != first["loss"] and math.isfinite(last["loss"])
