"""The wheel: what it holds, and that it works from another folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from source_tree import ROOT

from t2i_align import __version__

KINDS = ("reward_models", "datasets", "eval")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    run = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = out.glob("*.whl")
    return path


def names(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]


def test_every_file_is_ours(wheel: Path) -> None:
    """Nothing called ``datasets/`` at the top, which would overwrite Hugging Face's files."""
    info = f"t2i_align-{__version__}.dist-info/"
    assert [n for n in names(wheel) if not n.startswith(("t2i_align/", info))] == []
    assert {f"{info}licenses/LICENSE", f"{info}METADATA"} <= set(names(wheel))


@pytest.mark.parametrize("kind", KINDS)
def test_the_catalogue_equals_the_folders(kind: str, wheel: Path) -> None:
    prefix = f"t2i_align/_catalog/{kind}/"
    with zipfile.ZipFile(wheel) as archive:
        packed = {
            n.removeprefix(prefix): archive.read(n) for n in names(wheel) if n.startswith(prefix)
        }
    files = [p for p in (ROOT / kind).rglob("*") if p.is_file()]
    assert packed == {str(p.relative_to(ROOT / kind)): p.read_bytes() for p in files}
    assert packed


def test_package_data_is_inside(wheel: Path) -> None:
    recipes = {f"t2i_align/recipes/{p.name}" for p in (ROOT / "t2i_align/recipes").glob("*.yaml")}
    assert recipes and recipes <= set(names(wheel))


def test_the_unpacked_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """Dependencies come from this environment, the package from the wheel alone."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = "\n".join(
        [
            "import sys, runpy",
            f"sys.path[:] = [{str(site)!r}] + [p for p in sys.path if p != {str(ROOT)!r} and p]",
            "import t2i_align; print(t2i_align.__file__)",
            "from t2i_align.catalog import cards; print([c.name for c in cards('datasets')])",
            "from t2i_align.recipe import load_recipe",
            "print(load_recipe('sd15_dpo', run_checks=False).train.lr_warmup_steps)",
            "import datasets; print(datasets.__file__)",
        ]
    )
    out = subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path, text=True)
    where, found, warmup, datasets = out.splitlines()
    assert Path(where) == site / "t2i_align" / "__init__.py"
    assert "pickapic_v2" in found
    assert warmup == "500"
    assert not Path(datasets).is_relative_to(site)
