"""docs/benchmarks.md names every benchmark, detector and layout, and says of each what is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import t2i_align
from t2i_align.cli import build_app
from t2i_align.errors import UserError
from t2i_align.evaluate.benchmarks import BENCHMARKS, build
from t2i_align.evaluate.detectors import DETECTORS
from t2i_align.evaluate.layouts import layouts
from t2i_align.evaluate.prompt_files import files_of
from t2i_align.registry import load

TEXT = (Path(t2i_align.__file__).parent / "docs" / "benchmarks.md").read_text()


def table(head: str) -> dict[str, list[str]]:
    """Cells after the first one by the name in the first one."""
    lines = TEXT[TEXT.index(f"| {head} |") :].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("` "): row[1:] for row in cells}


ROWS = table("name")


def test_every_benchmark_has_one_row_in_order() -> None:
    assert list(ROWS) == list(BENCHMARKS)
    assert all(len(row) == 4 and all(row) for row in ROWS.values())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_row_says_what_the_benchmark_does(name: str) -> None:
    """Where prompts come from, pictures a prompt, whether there are variants and which is first."""
    prompts, pictures, _, variants = ROWS[name]
    assert int(pictures) == build(name, {}).images_per_prompt
    if prompts == "fetch":
        assert all(f["url"].startswith("https://") for f in files_of(name))
    else:
        fix = "bring " if prompts == "bring" else "it needs none"
        with pytest.raises(UserError, match=fix):
            files_of(name)
    fields: dict[str, Any] = load(BENCHMARKS, name, "benchmark").Options.model_fields
    assert ("variant" in fields) == ("no variants" not in variants)
    if "variant" in fields:
        assert fields["variant"].default == ("fixed" if name == "text_rendering" else "official")


def test_every_detector_and_layout_has_a_row() -> None:
    assert set(table("detector")) == set(DETECTORS)
    of = {pattern: cells[0] for pattern, cells in table("names").items()}
    assert set(of) == {layout.pattern for name in BENCHMARKS for layout in layouts(name)}
    for pattern, said in of.items():
        readers = {n for n in BENCHMARKS if pattern in [layout.pattern for layout in layouts(n)]}
        others = set(BENCHMARKS) - readers
        named = {n for n in BENCHMARKS if f"`{n}`" in said}
        assert named == (others if said.startswith("all") else readers), pattern


def test_every_option_that_is_named_exists() -> None:
    """Options of the verb by its help, options of benchmarks by their fields."""
    text = CliRunner(env={"COLUMNS": "300"}).invoke(build_app(), ["eval", "--help"]).stdout
    known = set(re.findall(r"--[a-z-]+", text))
    assert set(re.findall(r"--[a-z][a-z-]+", TEXT)) <= known
    fields = {
        key
        for name in BENCHMARKS
        for key in load(BENCHMARKS, name, "benchmark").Options.model_fields
    }
    assert set(re.findall(r"--set (\w+)=", TEXT)) - {"key"} <= fields
