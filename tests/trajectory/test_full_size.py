"""SDXL at its true size on the CPU: three LoRA DPO steps within 14 GB.

Marked ``big``: it writes 6.7 GB and takes some minutes; ``make test-big`` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import runs


@pytest.mark.big
@pytest.mark.timeout(1800)
def test_full_size_sdxl_takes_dpo_steps_on_two_cores(tmp_path: Path) -> None:
    folder = Path(os.environ.get("T2I_ALIGN_FULL_SDXL", tmp_path / "sdxl"))
    program = [sys.executable, "-m", "tests.full_size"]
    if not folder.exists():
        subprocess.run([*program, "build", str(folder)], check=True)
    data = runs.pickapic(tmp_path / "pairs.parquet", 6, broken=(2,), ties=(4,))
    recipe = runs.write_recipe(
        tmp_path,
        "run",
        {
            "model": {
                "name_or_path": str(folder),
                "resolution": 256,
                "dtype": "bfloat16",
                "lora": {"r": 8, "lora_alpha": 8},
            },
            "objective": {"type": "dpo", "beta": 5000.0},
            "data": {"type": "pickapic", "path": str(data)},
            "cache": {"dir": str(tmp_path / "cache")},
            "train": {"learning_rate": 1e-4, "max_train_steps": 3, "report_to": "none"},
        },
    )
    done = subprocess.run([*program, "train", str(recipe)], check=True, stdout=subprocess.PIPE)
    facts = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(facts))
    assert facts["parameters"] == 2_567_463_684
    assert runs.losses(tmp_path / "run")[0] == pytest.approx(0.69314718, abs=1e-6)
    assert facts["frozen_equal"] and facts["largest_lora_B"] > 0
    assert facts["peak_rss_gb"] < 14
