"""Every ``t2i-align`` command of the README, run in its order in one folder.

Two things are made smaller, nothing is left out: SDXL's weights, which cannot be fetched here, are
replaced by the bundled tiny SDXL on the line that trains, and evaluations have few pictures.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from t2i_align.catalog import find_root
from t2i_align.readme import README
from t2i_align.recipe import shipped

pytestmark = pytest.mark.slow
TINY = "model.name_or_path=bundled/scenes_sdxl model.resolution=64 train.max_train_steps=1"
SAVE = "train.gradient_accumulation_steps=1"
SMALLER = {
    "train my_recipe.yaml": f"{TINY} train.lr_warmup_steps=0 cache.dir=cache {SAVE}",
    "eval scenes": "--per-task 2",
}


def commands() -> list[str]:
    """The lines, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("t2i-align")]


def call(arguments: list[str], folder: Path) -> str:
    """Run the program; its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "t2i_align", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def test_they_all_work(tmp_path: Path) -> None:
    shutil.copy(find_root() / "datasets" / "scenes" / "pairs.parquet", tmp_path / "pairs.parquet")
    text = shipped()["scenes_dpo"].read_text()
    text = re.sub(r"max_train_steps: \d+", "max_train_steps: 2", text)
    text = re.sub(r"lr_warmup_steps: \d+", "lr_warmup_steps: 1", text)
    (tmp_path / "short.yaml").write_text(text)
    call(["quickstart", "--recipe", "short.yaml", "--per-task", "2"], tmp_path)  # as make does
    said = {}
    for line in commands():
        more = next((v for k, v in SMALLER.items() if k in line), "")
        said[line] = call(shlex.split(f"{line} {more}")[1:], tmp_path)
    assert len(said) >= 7
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert list((tmp_path / "outputs").rglob("pytorch_lora_weights.safetensors"))
    shown = next(v for k, v in said.items() if " compare " in k)
    assert "overall" in shown and "difference" in shown
