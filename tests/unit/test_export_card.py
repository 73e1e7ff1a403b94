"""The card of an export: the hub can read it, it says how to repeat the run and tells no paths."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from t2i_align.errors import DataError, ModelError
from t2i_align.export.card import Facts, read_summary, render, shorten
from t2i_align.export.program import Request, export
from t2i_align.export.push import files_of
from tests import export_runs, tiny

PLAIN = Facts("mine", "peft", "owner/base", "diffusers", ["load()"], ["lora"])


def front_matter(card: str) -> dict[str, Any]:
    """As the hub's own class reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(card).data.to_dict()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a summary."""
    where = tmp_path_factory.mktemp("card")
    base = tiny.pipeline_folder("sdxl", where / "base")
    made = export_runs.make(where / "x", base, {"r": 4, "lora_alpha": 8})
    summary = {"steps": 3, "samples_seen": 24, "last": {"loss": 0.5, "grad_norm": 1.0}}
    (made.folder / "summary.json").write_text(json.dumps(summary))
    return made.folder


def test_the_front_matter_is_what_the_hub_reads() -> None:
    recipe = {"data": {"hub_id": "owner/pairs"}}
    found = front_matter(render(replace(PLAIN, recipe=recipe)))
    assert found == {
        "base_model": "owner/base",
        "library_name": "diffusers",
        "license": "other",
        "license_name": "inherits-base-model",
        "datasets": ["owner/pairs"],
        "tags": ["lora"],
    }


def test_local_names_stay_out_of_the_front_matter(tmp_path: Path) -> None:
    """The hub refuses a base model that is no hub id."""
    card = render(replace(PLAIN, base=str(tmp_path), recipe={"data": {"path": str(tmp_path)}}))
    assert not {"base_model", "datasets"} & front_matter(card).keys()
    assert str(tmp_path.parent) not in card
    assert f"| base model | `{tmp_path.name}` |" in card


def test_paths_are_shortened_wherever_they_stand() -> None:
    assert shorten({"a": ["/x/y.parquet", "rel/z"], "b": {"c": "~/w"}, "d": 1, "e": None}) == {
        "a": ["y.parquet", "rel/z"],
        "b": {"c": "w"},
        "d": 1,
        "e": None,
    }


@pytest.mark.parametrize("form", ["peft", "kohya", "merged"])
def test_every_export_has_a_card_with_its_recipe(run: Path, form: Any, tmp_path: Path) -> None:
    """The embedded YAML is the resolved recipe; facts, papers and licence are there."""
    from t2i_align.objectives import OBJECTIVES
    from t2i_align.registry import resolve

    export(Request(run, form, tmp_path / "mine"))
    card = (tmp_path / "mine" / "README.md").read_text()
    found = front_matter(card)
    assert found["library_name"] == "diffusers"
    assert found["tags"] == ["t2i-align", "dpo", *(["lora"] if form != "merged" else [])]
    block = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert block is not None
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    assert YAML(typ="safe").load(block[1]) == shorten(recipe)
    assert str(run.parent) not in card
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))
    assert rows["objective"] == "`dpo`" and rows["checkpoint"] == "step-00000003"
    assert rows["trained"] == "LoRA, rank 4" and rows["samples seen"] == "24"
    assert rows["last loss"] == "0.5"
    assert resolve(OBJECTIVES["dpo"]).citation.strip() in card and "podell2024sdxl" in card
    assert "inherit the base model's licence" in card
    weight = ', weight_name="mine.safetensors"' if form == "kohya" else ""
    line = 'from_pretrained("mine")' if form == "merged" else f'load_lora_weights("mine"{weight})'
    assert line in card


def test_scores_of_an_evaluation_are_in_the_card(run: Path, tmp_path: Path) -> None:
    scores = {
        "protocol": {"benchmark": "scenes"},
        "tasks": {"counting": 0.25, "colors": 0.5},
        "overall": {"mean": 0.375, "low": 0.3, "high": 0.45},
    }
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "summary.json").write_text(json.dumps(scores))
    export(Request(run, "peft", tmp_path / "mine", scores=[tmp_path / "eval"]))
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "## Scores: scenes" in card
    assert "| counting | 0.250 |" in card and "| overall | 0.375 [0.300, 0.450] |" in card
    with pytest.raises(DataError, match="holds no scores"):
        read_summary(run)
    with pytest.raises(DataError, match="cannot read"):
        read_summary(tmp_path)


def test_only_a_folder_with_a_card_is_pushed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder at"):
        files_of(tmp_path / "none")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "w.safetensors").write_bytes(b"12345")
    with pytest.raises(ModelError, match=r"has no card \(README\.md\)"):
        files_of(tmp_path)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("hidden")
    assert files_of(tmp_path) == [("README.md", 1), ("unet/w.safetensors", 5)]
