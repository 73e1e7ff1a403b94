"""Literal tables ``name -> "module:Class"`` and the one function that resolves them.

A table is import-light: listing names imports nothing, resolving one imports one module.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from t2i_align.errors import UserError

Table = dict[str, str]


def nearest(name: str, allowed: list[str]) -> str:
    """``did you mean 'x'?`` or an empty string; two letters in each other's place come first."""
    pairs = range(len(name) - 1)
    swapped = {f"{name[:i]}{name[i + 1]}{name[i]}{name[i + 2 :]}" for i in pairs} & set(allowed)
    if swapped:
        return f"did you mean '{min(swapped)}'?"
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else ""


def resolve(path: str) -> Any:
    """Import ``package.module:Class`` and return the class."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load(table: Table, name: str, noun: str) -> Any:
    """The class a table names.

    Raises:
        UserError: the name is not in the table; lists what is and the nearest match.
    """
    if name not in table:
        hint = nearest(name, list(table)) or "see the list"
        raise UserError(f"unknown {noun} '{name}'; known: {', '.join(sorted(table))}", hint)
    return resolve(table[name])
