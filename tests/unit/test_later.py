"""Libraries that wait until they are used, and those that are hidden until they are asked for."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from t2i_align import later, quiet
from t2i_align.evaluate import work
from t2i_align.later import hide, import_later, importing, show
from t2i_align.optional import require
from t2i_align.quiet import hush
from t2i_align.train import cache_build

NAME = "slow_library"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a submodule; both note that they were loaded. Returns the note."""
    note, folder = tmp_path / "note", tmp_path / NAME
    folder.mkdir()
    write = f"open({str(note)!r}, 'a').write(__name__ + ' ')\n"
    (folder / "__init__.py").write_text(f"{write}__version__ = '7'\nvalue = 3\n")
    (folder / "part.py").write_text(f"import {NAME}\n{write}value = {NAME}.value + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (NAME, f"{NAME}.part"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    note.touch()
    yield note
    for name in (NAME, f"{NAME}.part"):
        sys.modules.pop(name, None)


def test_a_stand_in_loads_at_the_first_use(library: Path) -> None:
    """Neither `import` nor what tools ask of modules loads it; an attribute does, once."""
    import_later((NAME,))
    module = importlib.import_module(NAME)
    assert find_spec(NAME) is not None and not hasattr(module, "__file__")
    assert library.read_text() == ""
    assert module.value == 3
    assert library.read_text() == f"{NAME} "
    assert module.value == 3 and importlib.import_module(NAME).value == 3
    assert library.read_text() == f"{NAME} "
    assert sys.modules[NAME] is not module and sys.modules[NAME].__version__ == "7"
    with pytest.raises(AttributeError, match="missing"):
        _ = module.missing


def test_a_submodule_loads_its_parent_first(library: Path) -> None:
    import_later((NAME,))
    assert importlib.import_module(f"{NAME}.part").value == 4
    assert library.read_text() == f"{NAME} {NAME}.part "


def test_what_is_there_or_not_installed_gets_no_stand_in(library: Path) -> None:
    module = importlib.import_module(NAME)
    import_later((NAME, "no_such_library"))
    assert sys.modules[NAME] is module and "no_such_library" not in sys.modules


def test_what_is_hidden_looks_absent_until_it_is_shown(library: Path) -> None:
    hide((NAME,))
    assert find_spec(NAME) is None
    with pytest.raises(ImportError):
        importlib.import_module(NAME)
    show(NAME)
    assert importlib.import_module(NAME).value == 3
    hide((NAME,))  # too late: what is loaded stays
    show(NAME)
    assert isinstance(sys.modules[NAME], ModuleType)
    show("never_heard_of")


def test_require_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of ours asks before it uses an optional library."""
    shown: list[str] = []
    monkeypatch.setattr("t2i_align.optional.show", shown.append)
    require("torch", "dev", "this test")
    assert shown == ["torch"]


def test_the_collector_waits_and_comes_back() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), importing():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()  # whoever turned it off keeps it off
    finally:
        gc.enable()


def test_the_real_ones_wait_and_can_still_be_used() -> None:
    """diffusers' models load neither; after that ours may use both, and diffusers bitsandbytes."""
    code = """
import sys
from t2i_align.quiet import hush
hush()
from diffusers import UNet2DConditionModel
from diffusers.quantizers.bitsandbytes import utils
print(sorted({"bitsandbytes.nn", "torchao.quantization", "torch._inductor.compile_fx"}
             & sys.modules.keys()))
from t2i_align.optional import require
for name in ("bitsandbytes", "torchao"):
    try:
        require(name, name, "this")
    except Exception as error:
        print(type(error).__name__)
        continue
    __import__(name)
    print(name, sys.modules[name].__spec__.name, utils.bnb.nn.Linear4bit.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first == "[]"
    assert others[0] == "bitsandbytes bitsandbytes Linear4bit"
    assert others[1] in ("torchao torchao Linear4bit", "MissingDependencyError")


def test_processes_of_a_quiet_one_are_quiet() -> None:
    """A pool's processes hide what the verb hides; without a verb they are left alone."""
    code = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from t2i_align import quiet
LOOK = "__import__('sys').modules.get('torchao', 0) is None"
def seen():
    with ProcessPoolExecutor(1, get_context("spawn"), quiet.hushing()) as pool:
        return pool.submit(eval, LOOK).result()
if __name__ == "__main__":
    print(seen())
    quiet.hush()
    print(seen())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_evaluations_and_cache_builds_start_their_processes_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[Any, ...]] = []

    def pool(*given: Any) -> Any:
        started.append(given)
        raise InterruptedError

    for module in (work, cache_build):
        monkeypatch.setattr(module, "ProcessPoolExecutor", pool)
    for called, wanted in (([True], hush), ([], None)):
        monkeypatch.setattr(quiet, "_HUSHED", called)
        with pytest.raises(InterruptedError):
            list(work._elsewhere(cast(Any, None), "draw", [[0]], 2, 1))
        with pytest.raises(InterruptedError):
            cache_build.spread(cast(Any, None), cast(Any, None), 2)
        (*_, (*_, of_eval)), (*_, of_build) = started[-2:]
        assert of_eval is wanted and of_build is wanted


def test_names_are_those_of_extras() -> None:
    """What is put off is optional: nothing that every run needs."""
    import tomllib

    root = Path(later.__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = {line.partition(">")[0] for line in project["dependencies"]}
    assert not {*later.LATER, *later.HIDDEN} & needed
