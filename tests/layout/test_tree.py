"""What lies where: the top level, the catalogue without Python, names that would shadow."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from source_tree import ROOT, modules

TOP = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "Makefile",
    "constraints.txt",
    "t2i_align",
    "reward_models",
    "datasets",
    "eval",
    "tests",
}
CATALOGUE = ("reward_models", "datasets", "eval")
SHADOWING = {"datasets", "logging", "typing", "types", "random"}


def tracked() -> list[Path]:
    """Files git tracks or would track; outside a git checkout, every file that is not hidden."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return [Path(name) for name in run.stdout.split("\0") if name and (ROOT / name).exists()]
    files = (p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file())
    return [p for p in files if not p.parts[0].startswith(".") and "__pycache__" not in p.parts]


def test_the_top_level_is_closed() -> None:
    names = {path.parts[0] for path in tracked() if not path.parts[0].startswith(".")}
    assert names <= TOP
    assert names >= TOP - {"README.md"}


def test_no_python_in_the_catalogue() -> None:
    """A top-level ``datasets`` with Python in it would shadow Hugging Face's package."""
    found = [path for folder in CATALOGUE for path in (ROOT / folder).rglob("*.py*")]
    assert found == []


@pytest.mark.parametrize("how", [["-c"], ["-m"]])
def test_datasets_is_hugging_faces_package_from_the_root(how: list[str], tmp_path: Path) -> None:
    """With the checkout first on the path, in a ``-c`` and in a ``-m`` program."""
    code = "import datasets; print(datasets.__version__, datasets.__file__)"
    command = [sys.executable, "-c", code]
    if how == ["-m"]:
        (tmp_path / "probe.py").write_text(code)
        command = [sys.executable, "-m", "probe"]
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "HF_HOME": str(tmp_path), "PATH": ""}
    out = subprocess.check_output(command, cwd=ROOT, text=True, env=env).split()
    assert out[0] == metadata.version("datasets")
    assert not Path(out[1]).is_relative_to(ROOT / "datasets")
    assert Path(out[1]).parts[-2:] == ("datasets", "__init__.py")


def test_no_module_shadows_the_standard_library() -> None:
    assert [name for name in modules() if name.rpartition(".")[2] in SHADOWING] == []


def test_every_test_folder_has_its_place() -> None:
    """The taxonomy of tests is closed, so that a test's folder says what it proves."""
    places = {p.parts[1] for p in tracked() if p.parts[0] == "tests" and len(p.parts) > 2}
    taxonomy = "unit property parity trajectory learning cards cli layout gpu".split()
    assert places <= set(taxonomy)
