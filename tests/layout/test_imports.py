"""Imports point one way: all of them, those in functions and under TYPE_CHECKING included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from source_tree import PACKAGE, imports, modules, tree

from t2i_align.generators import GENERATORS

LEAVES = ["contract", "errors", "options", "protocols", "registry"]
# package -> packages it must not know
FORBIDDEN = {
    "process": ["generators", "objectives", "rollout", "train", "judges", "data", "evaluate"],
    "generators": ["objectives", "rollout", "train", "recipe"],
    "objectives": ["generators", "rollout", "train", "data", "judges", "evaluate", "recipe"],
    "rollout": ["train", "recipe"],
    "judges": ["objectives", "train", "recipe"],
    "data": ["objectives", "train", "recipe"],
    "evaluate": ["objectives", "train", "recipe"],
    "export": ["objectives", "rollout", "judges", "data", "evaluate"],
}
MODALITIES = {
    *("image", "images", "audio", "video", "voxels", "mesh", "codes"),
    *("token", "elbo", "transition", "masked"),
    *("sd", "sdxl", "sd3", *(set(GENERATORS) - {"diffusers"})),
}


def ours(name: str, targets: list[str]) -> list[str]:
    """Imports of a module that fall into some of our packages."""
    prefixes = [f"t2i_align.{target}" for target in targets]
    return [
        f"{name}:{line} imports {imported}"
        for imported, line in imports(modules()[name])
        if any(imported == p or imported.startswith(f"{p}.") for p in prefixes)
    ]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_direction(package: str) -> None:
    inside = [n for n in modules() if n.split(".")[1:2] == [package]]
    assert [found for name in inside for found in ours(name, FORBIDDEN[package])] == []


def test_nothing_imports_the_command_line() -> None:
    users = [n for n in modules() if not n.startswith(("t2i_align.cli", "t2i_align.__main__"))]
    assert [found for name in users for found in ours(name, ["cli"])] == []


def test_only_the_command_line_imports_export() -> None:
    """Ways out stand at the end: nothing that trains depends on them."""
    users = [n for n in modules() if not n.startswith(("t2i_align.cli", "t2i_align.export"))]
    assert [found for name in users for found in ours(name, ["export"])] == []


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_only_leaves(leaf: str) -> None:
    allowed = tuple(f"t2i_align.{name}" for name in LEAVES)
    path = PACKAGE / f"{leaf}.py"
    own = [name for name, _ in imports(path) if name.startswith("t2i_align")]
    assert [name for name in own if not name.startswith(allowed)] == []


def docstrings(module: ast.Module) -> set[int]:
    """Identities of the constant nodes that are docstrings."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


@pytest.mark.parametrize("path", sorted((PACKAGE / "train").glob("*.py")), ids=lambda p: p.name)
def test_train_does_not_know_modalities(path: Path) -> None:
    """The trainer is the same for images, tokens and voxels: it names none of them."""
    module = tree(path)
    skip = docstrings(module)
    named = [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and id(node) not in skip and node.value in MODALITIES
    ]
    assert named == []


def test_the_recipe_names_no_entry_of_a_table() -> None:
    """A new objective, generator or source never edits recipe.py (which knows a default model)."""
    from t2i_align.data import SOURCES
    from t2i_align.generators import GENERATORS
    from t2i_align.objectives import OBJECTIVES

    entries = {*OBJECTIVES, *SOURCES, *GENERATORS} - {"diffusers"}
    for name in ("recipe.py", "recipe_schema.py", "explain.py"):
        module = tree(PACKAGE / name)
        skip = docstrings(module)
        text = {
            n.value for n in ast.walk(module) if isinstance(n, ast.Constant) and id(n) not in skip
        }
        assert not entries & {value for value in text if isinstance(value, str)}
