"""Pydantic's verdicts in our words: what was got, what is allowed, what was probably meant.

What is allowed is read off the field itself (its type, its bounds), never off the wording of the
validator, so one sentence serves every kind of error and stays true when a field changes.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from t2i_align.errors import Problem
from t2i_align.options import Options
from t2i_align.registry import nearest
from t2i_align.yaml_source import KeyPath, dotted

T = TypeVar("T", bound=Options)
PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def validate(
    cls: type[T], value: dict[str, Any], prefix: KeyPath, where: Callable[[KeyPath], str]
) -> tuple[T | None, list[Problem]]:
    """Validate one section.

    Args:
        cls: its Options class.
        value: its plain data.
        prefix: its key path in the file.
        where: location of a key path.

    Returns:
        The options, or None and every problem.
    """
    try:
        # As JSON, so that a list may fill a tuple field while text still never fills a number.
        return cls.model_validate_json(json.dumps(value)), []
    except ValidationError as error:
        found: dict[KeyPath, list[Any]] = {}
        for item in error.errors():
            found.setdefault(_data_path(item, value), []).append(item)
    problems = []
    for path, items in found.items():
        if _is_outer_branch(path, items, found):
            continue
        key, (message, fix) = (*prefix, *path), _sentence(cls, value, path, items)
        problems.append(Problem(dotted(key), message, where(key), fix))
    return None, problems


def _is_outer_branch(path: KeyPath, items: list[Any], found: dict[KeyPath, list[Any]]) -> bool:
    """Whether a problem is only the other branch of a union whose right branch failed deeper."""
    own = {"missing", "extra_forbidden", "value_error"} & {item["type"] for item in items}
    return not own and any(len(p) > len(path) and p[: len(path)] == path for p in found)


def _data_path(item: Any, value: Any) -> KeyPath:
    """Where in the data an error is; drops the union branches pydantic mixes into locations."""
    loc = item["loc"]
    parts = loc[:-1] if item["type"] == "missing" else loc
    path: list[str | int] = []
    for part in parts:
        if isinstance(value, dict) and part in value:
            path.append(part)
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
    return (*path, loc[-1]) if item["type"] == "missing" else tuple(path)


def _sentence(cls: type[Options], value: Any, path: KeyPath, items: list[Any]) -> tuple[str, str]:
    """Message and fix of all errors at one path."""
    kinds = {item["type"]: item for item in items}
    owner = options_at(cls, path[:-1])
    if "missing" in kinds:
        field = field_at(cls, path)
        return f"is missing; must be {allowed(field)}", (field.description or "") if field else ""
    if "extra_forbidden" in kinds:
        keys = list(owner.model_fields) if owner else []
        return f"unknown key; allowed: {', '.join(sorted(keys))}", nearest(str(path[-1]), keys)
    if "value_error" in kinds:
        return kinds["value_error"]["msg"].removeprefix("Value error, "), ""
    got = value
    for part in path:
        got = got[part]
    field = field_at(cls, path)
    annotation = item_type(field.annotation, path) if field else Any
    return f"got {show(got)}; allowed: {allowed(field, path)}", hint(got, annotation)


def show(value: Any) -> str:
    """A value as a reader of the YAML file would name it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 60 else value[:57] + '...'}'"
    if isinstance(value, (dict, list)):
        return "a section" if isinstance(value, dict) else f"a list of {len(value)}"
    return f"the number {value!r}"


def hint(got: Any, annotation: Any) -> str:
    """What was probably meant, or an empty string."""
    literals = [a for a in _flatten(annotation) if get_origin(a) is Literal]
    names = [str(v) for a in literals for v in get_args(a)]
    if isinstance(got, str) and names:
        return nearest(got, names)
    plain = set(_flatten(annotation))
    if isinstance(got, float) and got.is_integer() and int in plain:
        return f"write {int(got)}"
    if isinstance(got, str) and bool in plain and got.lower() in ("yes", "no", "on", "off"):
        return "write true or false"
    if isinstance(got, str) and plain & {int, float} and _is_number(got):
        return "remove the quotes"
    if isinstance(got, (int, float)) and str in plain:
        return "quote it to make it text"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def allowed(field: FieldInfo | None, path: KeyPath = ()) -> str:
    """What a field takes, in words: ``a whole number >= 1``, ``'a' or 'b'``."""
    if field is None:
        return "another value"
    annotation = item_type(field.annotation, path)
    words = describe(annotation)
    if annotation is not field.annotation:
        return words
    bounds, sizes = [], []
    for rule in field.metadata:
        bounds += [f"{sign} {getattr(rule, n):g}" for n, sign in BOUNDS.items() if hasattr(rule, n)]
        sizes += [f"at least {rule.min_length}"] if hasattr(rule, "min_length") else []
        sizes += [f"at most {rule.max_length}"] if hasattr(rule, "max_length") else []
    words += f" {' and '.join(bounds)}" if bounds else ""
    return words + (f" ({' and '.join(sizes)} long)" if sizes else "")


def describe(annotation: Any) -> str:
    """A type in words."""
    if annotation in PLAIN:
        return PLAIN[annotation]
    if annotation in (None, types.NoneType):
        return "null"
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"'{v}'" if isinstance(v, str) else str(v) for v in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in get_args(annotation))
    if origin in (list, tuple):
        return f"a list of {describe(get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return f"a section with {', '.join(annotation.model_fields)}"
    return "a section" if origin is dict or annotation is dict else "any value"


def _flatten(annotation: Any) -> list[Any]:
    """The members of a union, or the type itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [b for a in get_args(annotation) for b in _flatten(a)]
    return [annotation]


def item_type(annotation: Any, path: KeyPath) -> Any:
    """The type of an element when the path ends in a list index, else the type itself."""
    if not path or not isinstance(path[-1], int):
        return annotation
    lists = [a for a in _flatten(annotation) if get_origin(a) in (list, tuple)]
    return get_args(lists[0])[0] if lists else annotation


def options_at(cls: type[Options], path: KeyPath) -> type[Options] | None:
    """The Options class of a nested section."""
    current: type[Options] = cls
    for part in path:
        field = current.model_fields.get(part) if isinstance(part, str) else None
        if isinstance(part, int):
            continue
        members = _flatten(field.annotation) if field else []
        members += [b for a in members for b in get_args(a)]
        nested = [a for a in members if isinstance(a, type) and issubclass(a, Options)]
        if not nested:
            return None
        current = nested[0]
    return current


def field_at(cls: type[Options], path: KeyPath) -> FieldInfo | None:
    """The field a path names; for a list element, the list's field."""
    names = [p for p in path if isinstance(p, str)]
    owner = options_at(cls, tuple(names[:-1])) if names else None
    return owner.model_fields.get(names[-1]) if owner else None
