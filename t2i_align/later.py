"""Imports that need not be made, or not so slowly.

Optional libraries that others import at their top are loaded when something of them is used.

diffusers imports bitsandbytes with its first model, whatever the model is, and with it torch's
compiler: seconds of every start. A stand-in takes its place in ``sys.modules`` until an attribute
or a submodule is asked for; then the library is imported and answers from there on. Of torchao
single names are imported, which cannot wait, so it is hidden from diffusers and transformers, whose
quantisers are not this package's (``generators/quantize.py``), until ``optional.require`` asks.

Modules are built of objects that stay. Python's collector looks at them again and again while
thousands are imported, a quarter of the time, so it waits until they are there.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

LATER = ("bitsandbytes",)
HIDDEN = ("torchao",)


class Later(ModuleType):
    """Stands for a module that was not imported yet.

    ``__path__`` is not known either, so that importing a submodule loads the parent first.
    """

    def __getattr__(self, name: str) -> Any:
        """Import the module at the first attribute that is its own."""
        if name.startswith("__") and name != "__path__":  # what tools ask of any module
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def import_later(names: tuple[str, ...] = LATER) -> None:
    """Let stand-ins answer for libraries that are installed and not imported yet."""
    for name in names:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec is not None:
            module = Later(name)
            module.__spec__ = spec
            sys.modules[name] = module


def hide(names: tuple[str, ...] = HIDDEN) -> None:
    """Let libraries look as if they were not installed, unless they are imported already."""
    modules = cast(dict[str, ModuleType | None], sys.modules)
    for name in names:
        modules.setdefault(name, None)


def show(name: str) -> None:
    """Let a library be imported that was hidden."""
    if sys.modules.get(name, name) is None:
        del sys.modules[name]


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of large libraries: the collector of cycles waits."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
