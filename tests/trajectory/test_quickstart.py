"""The quickstart end to end, shortened: every phase is the public verb a person would type."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from t2i_align.catalog import find_root
from t2i_align.data import rows as data_rows
from t2i_align.errors import DataError
from t2i_align.evaluate.compare import compare
from t2i_align.recipe import shipped
from t2i_align.scenes import quickstart as module
from t2i_align.scenes.grammar import TASKS
from t2i_align.scenes.quickstart import JUDGES, fingerprint, phases, quickstart

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


@pytest.mark.slow
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
    assert compare(out / "before", out / "after").items() <= summary.items()
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


def test_its_fingerprint_covers_the_recipes_data_and_the_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another row of the pairs or another weight of a judge is another quickstart."""
    for name in JUDGES:
        shutil.copytree(find_root() / "reward_models" / name, tmp_path / "reward_models" / name)
    data = tmp_path / "datasets" / "scenes" / "pairs_repairs.parquet"
    data.parent.mkdir(parents=True)
    row = {"caption": "a cat", "jpg_0": b"0", "jpg_1": b"1", "label_0": 1.0, "label_1": 0.0}
    for module_of_root in (module, data_rows):
        monkeypatch.setattr(module_of_root, "find_root", lambda: tmp_path)

    def found(caption: str = "a cat", out: Path = tmp_path / "out") -> str:
        pq.write_table(pa.Table.from_pylist([row | {"caption": caption}]), data)
        return fingerprint(phases(out, "scenes_dpo", **SETTINGS), out, "scenes_dpo")

    first = found()
    assert found() == first and found("a dog") != first and found() == first
    assert found(out=Path("moved")) == first, "the same run by another path"
    weights = tmp_path / "reward_models" / "scenes_clip" / "open_clip_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert found() != first
