"""Optional packages."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from t2i_align.errors import MissingDependencyError
from t2i_align.optional import require, version_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_missing_package_names_feature_package_and_pip_line() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require("no-such-package", "hub", "data.hub_id")
    assert str(caught.value) == (
        "data.hub_id needs the package 'no-such-package', which is not installed\n"
        '  fix: pip install "t2i-align[hub]"'
    )
    assert caught.value.exit_code == 8


def test_an_installed_package_passes() -> None:
    require("pydantic", "hub", "anything")
    assert version_of("pydantic") is not None


def test_a_folder_of_the_same_name_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain folder is importable as a namespace; it is still not installed."""
    (tmp_path / "no_such_package_either").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert __import__("no_such_package_either")
    with pytest.raises(MissingDependencyError):
        require("no_such_package_either", "hub", "x")


def test_every_extra_that_errors_name_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set()
    for path in (ROOT / "t2i_align").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                index = {"require": 1, "pip_line": 0}.get(name)
                if index is not None and len(node.args) > index:
                    argument = node.args[index]
                    named |= {argument.value} if isinstance(argument, ast.Constant) else set()
    assert named >= {"quant"}
    assert named <= set(project["optional-dependencies"])
