"""The measurement of a start: lines by hand, and one real start, which loads nothing optional."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from t2i_align.cli import build_app
from t2i_align.errors import UserError
from t2i_align.train import bench_start
from t2i_align.train.bench_start import (
    CODE,
    FILE,
    FIRST,
    LAST,
    Stage,
    Start,
    cpu_seconds,
    notes,
    start,
    summary,
    watch,
)
from tests import runs
from tests.tiny import pipeline_folder

LINES = [
    (0.1, "import time: self [us] | cumulative | imported package"),
    (1.0, "import time:    400000 |     900000 | torch"),
    (1.2, "import time:    100000 |     100000 |   torch.nn"),
    (1.5, "phase begins: prepare"),
    (1.6, "reference cache: off"),
    (2.0, "phase begins: load"),
    (2.5, "import time:    250000 |     250000 | diffusers"),
    (3.0, "phase begins: checkpoint"),  # no stage of a start
    (4.0, "phase begins: train"),
    (4.1, "import time:     50000 |      50000 | torch.later"),
    (5.0, "step 1/1  loss 0.69"),
    (9.0, "import time:   9000000 |    9000000 | after"),
]


def test_lines_by_hand() -> None:
    """Each second and each import is in the stage that was open when it was told."""
    found = watch(LINES)
    assert found is not None and found.wall == 5.0
    assert found.stages == {
        FIRST: Stage(1.5, 0.5),
        "data and caches": Stage(0.5, 0.0),
        "model": Stage(2.0, 0.25),
        LAST: Stage(1.0, 0.05),
    }
    assert sum(stage.seconds for stage in found.stages.values()) == found.wall
    assert found.packages == {"torch": pytest.approx(0.55), "diffusers": 0.25}
    assert found.imports == pytest.approx(0.8) and found.optional == []
    assert watch(LINES[:-2]) is None  # it ended before its first step


def made(wall: float, imports: float, **packages: float) -> Start:
    stages = {FIRST: Stage(wall - 1, imports), LAST: Stage(1.0, 0.0)}
    return Start(wall, wall - 0.5, stages, packages)


def test_medians_and_the_bound() -> None:
    runs_ = [made(8, 4, torch=3, timm=1), made(12, 3, torch=2), made(9, 6, torch=5)]
    found = summary("r", runs_, bound=10)
    assert (found["wall"], found["cpu"], found["met"]) == (9, 8.5, True)
    assert found["import_share"] == 0.5  # of .5, .25, .667
    assert found["stages"][0] == {"stage": FIRST, "seconds": 8, "imports": 4}
    assert found["packages"] == {"torch": 3, "timm": 0.0}
    text = "\n".join(notes(found))
    assert "median of 3 warm starts: 9.00 s, CPU 8.50 s; bound 10 s: kept" in text
    assert "optional libraries loaded: timm" in text and "imports: 50 %" in text
    assert "bound 8 s: missed" in notes(summary("r", runs_, bound=8))[0]


def test_a_busy_process_has_used_its_seconds() -> None:
    code = "import time, sys\nwhile time.process_time() < .3: pass\nprint(1, flush=True)\n"
    code += "sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        process.stdout.readline()
        told = cpu_seconds(process.pid)
        process.kill()
    assert told is None or 0.25 < told < 3
    assert cpu_seconds(2**22 + 1) is None


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a tiny SDXL, as a user writes them."""
    folder = tmp_path_factory.mktemp("start")
    pipeline_folder("sdxl", folder / "m")
    runs.pickapic(folder / "pairs.parquet", 4)
    sections = {
        "model": {"name_or_path": str(folder / "m"), "resolution": 64},
        "data": {"type": "pickapic", "path": str(folder / "pairs.parquet")},
        "objective": {"type": "dpo", "beta": 50.0},
        "cache": {"dir": str(folder / "cache")},
        "train": {"max_train_steps": 2, "train_batch_size": 2},
    }
    return runs.write_recipe(folder, "start", sections)


def test_a_real_start_loads_nothing_optional(recipe: Path, tmp_path: Path) -> None:
    """The verb, with one start that counts: stages add up, imports are where they are."""
    arguments = ["bench", "start", "--recipe", str(recipe), "--runs", "1", "--bound", "600"]
    result = CliRunner().invoke(build_app(), [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "optional libraries loaded: none" in result.output
    assert "bound 600 s: kept" in result.output
    found = json.loads((tmp_path / FILE).read_text())
    assert found["optional"] == [] and found["packages"]["torch"] > 0.1
    (run,) = found["runs"]
    stages = run["stages"]
    assert list(stages) == [FIRST, "data and caches", "model", LAST]
    assert sum(s["seconds"] for s in stages.values()) == pytest.approx(run["wall"])
    assert all(0 <= s["imports"] <= s["seconds"] for s in stages.values())
    assert stages[FIRST]["imports"] > stages[LAST]["imports"]
    assert run["cpu"] is None or run["cpu"] > stages[FIRST]["imports"] / 2


def test_a_run_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"ended before its first step:\n(?s:.*)nothing_of_the_kind"
    ):
        start([str(tmp_path / "nothing_of_the_kind.yaml")])


def test_runs_are_those_of_the_verb_with_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than counts; given overrides come after ours, the folder of a run last."""
    asked: list[list[str]] = []

    def noted(arguments: list[str]) -> Start:
        asked.append(arguments)
        return made(float(len(asked)), 0.5)

    monkeypatch.setattr(bench_start, "start", noted)
    found = bench_start.measure("r", ["train.logging_steps=3"], 2, Console(file=io.StringIO()))
    assert [run.wall for run in found] == [2.0, 3.0]
    assert len(asked) == 3 and len({line[-1] for line in asked}) == 3
    assert all(line[0] == "r" and line[-1].startswith("output_dir=") for line in asked)
    ours = "train.max_train_steps=1"
    assert all(ours in line and line.index(ours) < len(line) - 2 for line in asked)
    assert "main()" in CODE
