"""SDXL and SD3.5 medium at their true sizes on the CPU: LoRA DPO steps, with their memory.

Marked ``big``: each writes 6.7 GB and takes some minutes; ``make test-big`` runs them. Text and
images are encoded first and the encoders freed, so they never meet the denoiser's activations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import runs


def trained(folder: Path, name: str, kept: str, model: dict[str, Any], **train: Any) -> Any:
    """Facts of a run in a process of its own; ``kept`` names a folder to build in and keep."""
    where = Path(os.environ.get(kept, folder / name))
    program = [sys.executable, "-m", "tests.full_size"]
    if not where.exists():
        subprocess.run([*program, "build", name, str(where)], check=True)
    data = runs.pickapic(folder / "pairs.parquet", 6, broken=(2,), ties=(4,))
    adapted = {"dtype": "bfloat16", "lora": {"r": 8, "lora_alpha": 8}}
    sections = {
        "model": {"name_or_path": str(where), **adapted, **model},
        "objective": {"type": "dpo", "beta": 5000.0},
        "data": {"type": "pickapic", "path": str(data)},
        "cache": {"dir": str(folder / "cache")},
        "train": {"learning_rate": 1e-4, "report_to": "none", **train},
    }
    recipe = runs.write_recipe(folder, "run", sections)
    done = subprocess.run([*program, "train", str(recipe)], check=True, stdout=subprocess.PIPE)
    facts = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(facts))
    return facts


@pytest.mark.big
@pytest.mark.timeout(1800)
def test_full_size_sdxl_takes_dpo_steps_on_two_cores(tmp_path: Path) -> None:
    facts = trained(tmp_path, "sdxl", "T2I_ALIGN_FULL_SDXL", {"resolution": 256}, max_train_steps=3)
    assert facts["parameters"] == 2_567_463_684
    assert runs.losses(tmp_path / "run")[0] == pytest.approx(0.69314718, abs=1e-6)
    assert facts["frozen_equal"] and facts["largest_lora_B"] > 0
    assert facts["peak_rss_gb"] < 14


@pytest.mark.big
@pytest.mark.timeout(1800)
def test_full_size_sd35_takes_a_dpo_step_in_the_memory_that_was_planned(tmp_path: Path) -> None:
    """One pair at 512 px, nothing recomputed, no T5 (which the release makes optional).

    What MemTracker counts is what was planned; the process beside it holds Python, libraries, a
    thread's read-ahead and what the allocator keeps: within 20 GB in all.
    """
    facts = trained(
        tmp_path,
        "sd35",
        "T2I_ALIGN_FULL_SD35",
        {"resolution": 512},
        max_train_steps=2,
        mixed_precision="bf16",
    )
    assert facts["parameters"] == 2_243_171_520
    assert runs.losses(tmp_path / "run")[0] == pytest.approx(0.69314718, abs=1e-6)
    assert facts["frozen_equal"] and facts["largest_lora_B"] > 0
    assert facts["planned_gb"]["peak"] == pytest.approx(facts["alive_gb"], rel=0.15)
    assert facts["peak_rss_gb"] < 20
