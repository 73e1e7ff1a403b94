"""The quickstart end to end, shortened: every phase is the public verb a person would type."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from t2i_align.errors import DataError
from t2i_align.recipe import shipped
from t2i_align.scenes.grammar import TASKS
from t2i_align.scenes.quickstart import quickstart

pytestmark = pytest.mark.slow
SETTINGS = {"per_task": 3, "prompt_seed": 5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped recipe, four steps long."""
    text = shipped()["scenes_dpo"].read_text()
    short = {"max_train_steps": 4, "lr_warmup_steps": 1}
    for key, value in short.items():
        text = re.sub(rf"{key}: \d+", f"{key}: {value}", text)
    path = tmp_path_factory.mktemp("recipe") / "short.yaml"
    path.write_text(text)
    return str(path)


def test_quickstart_finishes_repeats_and_refuses(tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "quick"
    summary, page = quickstart(out, recipe, **SETTINGS, console=Console(file=io.StringIO()))
    names = {*TASKS, "overall"}
    assert set(summary["before"]) == set(summary["after"]) == set(summary["difference"]) == names
    for name in names:
        d = summary["difference"][name]
        assert d["low"] <= d["mean"] <= d["high"]
        assert d["mean"] == pytest.approx(summary["after"][name] - summary["before"][name])
    assert json.loads((out / "summary.json").read_text()) == summary
    assert page.read_text().lower().startswith("<!doctype html>")
    assert set(summary["seconds"]) == {
        "evaluate before",
        "train",
        "evaluate after",
        "judge before",
        "judge after",
        "total",
    }

    files = {f: f.stat().st_mtime_ns for f in (out / "policy").rglob("*") if f.is_file()}
    said = io.StringIO()
    again, _ = quickstart(out, recipe, **SETTINGS, console=Console(file=said))
    assert again == summary, "a finished quickstart is only read"
    assert said.getvalue().count("done before") == 5
    assert files == {f: f.stat().st_mtime_ns for f in (out / "policy").rglob("*") if f.is_file()}

    with pytest.raises(DataError, match="another version, recipe or setting"):
        quickstart(out, recipe, per_task=4, prompt_seed=5, console=Console(file=io.StringIO()))
