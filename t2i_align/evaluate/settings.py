"""Options of a benchmark from the command line: ``key=value``, the value as YAML reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t2i_align.errors import UserError


def read_settings(given: Sequence[str]) -> dict[str, Any]:
    """Plain data of some ``key=value``; ``a.b=1`` sets a key of a section.

    Raises:
        UserError: one has no ``=``, sets a key twice, or has a value that YAML cannot read.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise UserError(f"--set takes key=value, got '{text}'", "e.g. --set threshold=0.3")
        *sections, last = name.strip().split(".")
        inside = found
        for section in sections:
            inside = inside.setdefault(section, {})
            if not isinstance(inside, dict):
                raise UserError(f"--set {name}: '{section}' is no section")
        if last in inside:
            raise UserError(f"--set {name} is given twice")
        inside[last] = _value(name, value)
    return found


def _value(name: str, text: str) -> Any:
    from ruamel.yaml import YAML, YAMLError

    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise UserError(f"--set {name}: '{text}' is no YAML value: {error}") from error
    plain = value is None or isinstance(value, bool | int | float | str | list | dict)
    return value if plain else text  # a date stays text
