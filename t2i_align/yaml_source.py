"""YAML as data that remembers where each key stands.

YAML 1.2 (``1e-5`` is a number, ``no`` is text), plain JSON types only, every key with its line, so
that whatever is wrong with a value can be said as ``file:line``. Dotted overrides from the command
line edit the same document, and their location is the command line. Duplicate keys, tags, dates and
non-finite numbers are errors here, because no reader of this package can mean them.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from t2i_align.errors import Problem, RecipeError

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"
MAX_BYTES = 1 << 18
MAX_DEPTH = 16
MAX_EVENTS = 5_000
MAX_DIGITS = 1_000  # the interpreter converts at most 4300
NUMBER = re.compile(rf"[-+]?(0x|0o|0b)?[0-9a-f_]{{{MAX_DIGITS},}}", re.IGNORECASE)
CORE_TAG = "tag:yaml.org,2002:"


def dotted(path: KeyPath) -> str:
    """``("validation", "prompts", 2)`` as ``validation.prompts[2]``."""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.removeprefix(".")


@dataclass(frozen=True)
class Document:
    """A YAML mapping with the line of every key.

    Args:
        name: how the file is called in messages.
        data: plain dicts, lists, text, numbers, booleans and None.
        lines: 1-based line of each key path.
        overridden: key paths set on the command line.
    """

    name: str
    data: dict[str, Any]
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    overridden: frozenset[KeyPath] = frozenset()

    def where(self, path: KeyPath) -> str:
        """``file:line`` of a key path, or of the nearest section above it."""
        for end in range(len(path), 0, -1):
            part = path[:end]
            if part in self.overridden:
                return COMMAND_LINE
            if part in self.lines:
                return f"{self.name}:{self.lines[part]}"
            if any(made[:end] == part for made in self.overridden):
                return COMMAND_LINE  # a section that only overrides have made
        return f"{self.name}:1"


class _Plain:
    """Turns ruamel's round-trip nodes into plain data and notes the lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[KeyPath, int] = {}

    def fail(self, path: KeyPath, message: str, fix: str = "") -> RecipeError:
        """The error of a node, located at the nearest known line."""
        line = next(
            (self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 1
        )
        where = COMMAND_LINE if self.name == COMMAND_LINE else f"{self.name}:{line}"
        return RecipeError([Problem(dotted(path) or "(top)", message, where, fix)], self.name)

    def convert(self, node: Any, path: KeyPath) -> Any:
        """Plain data of one node."""
        if isinstance(node, Mapping):
            return self._mapping(node, path)
        if isinstance(node, (list, tuple)):
            self.lines |= {(*path, i): mark[0] + 1 for i, mark in _marks(node).items()}
            return [self.convert(item, (*path, i)) for i, item in enumerate(node)]
        return self._scalar(node, path)

    def _mapping(self, node: Mapping[Any, Any], path: KeyPath) -> dict[str, Any]:
        marks = _marks(node)
        plain: dict[str, Any] = {}
        for key, value in node.items():
            if key in marks:
                self.lines[(*path, str(key))] = marks[key][0] + 1
            if not isinstance(key, str):
                raise self.fail((*path, str(key)), f"key {key!r} is not text", "quote the key")
            self._unicode(key, path)
            plain[str(key)] = self.convert(value, (*path, str(key)))
        return plain

    def _unicode(self, text: str, path: KeyPath) -> None:
        """Refuse escapes that no file name, file or screen takes."""
        if "\0" in text:
            raise self.fail(path, "the character U+0000 is not allowed")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise self.fail(path, "half a character (a lone surrogate)", "write the character")

    def _scalar(self, node: Any, path: KeyPath) -> Any:
        if node is None or isinstance(node, bool):
            return node
        if isinstance(node, int):
            # ruamel's booleans with an anchor and its formatted integers are subclasses of int.
            if type(node).__name__ == "ScalarBoolean":
                return bool(node)
            if abs(node) > sys.float_info.max:
                raise self.fail(path, "got a number beyond 1.8e308; numbers must be finite")
            return int(node)
        if isinstance(node, float):
            if not math.isfinite(node):
                raise self.fail(path, f"got {float(node)}; numbers must be finite")
            return float(node)
        if isinstance(node, str):
            self._unicode(node, path)
            return str(node)
        kind = "a date" if hasattr(node, "isoformat") else "a tagged value"
        raise self.fail(path, f"{kind} is not allowed here", "quote it to make it text")


def _screen(text: str) -> None:
    """Refuse, event by event, what would be slow or endless to build; raises MarkedYAMLError."""
    from ruamel.yaml import YAML
    from ruamel.yaml import events as kinds
    from ruamel.yaml.error import MarkedYAMLError

    depth = 0
    for count, event in enumerate(YAML(typ="rt", pure=True).parse(StringIO(text))):
        starts = isinstance(event, (kinds.MappingStartEvent, kinds.SequenceStartEvent))
        ends = isinstance(event, (kinds.MappingEndEvent, kinds.SequenceEndEvent))
        depth += int(starts) - int(ends)
        tag = getattr(event, "tag", None)
        version = getattr(event, "version", None)
        if isinstance(event, kinds.AliasEvent):
            problem = "aliases are not read; write the value out, or quote it if it is text"
        elif tag is not None and str(tag).startswith(CORE_TAG):
            problem = "tags are not read; quote a value to make it text, else write it plain"
        elif isinstance(event, kinds.DocumentStartEvent) and version not in (None, (1, 2)):
            problem = "recipes are YAML 1.2; remove the %YAML line"
        elif isinstance(event, kinds.ScalarEvent) and NUMBER.fullmatch(event.value):
            problem = f"a number of more than {MAX_DIGITS} digits"
        elif depth > MAX_DEPTH or count > MAX_EVENTS:
            problem = f"nested deeper than {MAX_DEPTH} or more than {MAX_EVENTS} values"
        else:
            continue
        raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _marks(node: Any) -> Mapping[Any, Sequence[int]]:
    """0-based (line, column, ...) of each key or index of a node, where ruamel noted them."""
    return getattr(getattr(node, "lc", None), "data", None) or {}


def _load(text: str, name: str) -> Any:
    """Ruamel's round-trip tree, with syntax errors as problems."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    try:
        _screen(text)
        return YAML(typ="rt", pure=True).load(StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        where = COMMAND_LINE if name == COMMAND_LINE else f"{name}:{line}"
        problem = Problem("YAML", str(error.problem or error.context), where)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        said = f"the character U+{error.character:04X} is not allowed in a file"
        problem = Problem("YAML", said, COMMAND_LINE if name == COMMAND_LINE else f"{name}:{line}")
    except (YAMLError, ValueError) as error:  # of a value that is not what it looks like
        place = COMMAND_LINE if name == COMMAND_LINE else f"{name}:1"
        problem = Problem("YAML", str(error).splitlines()[0], place)
    raise RecipeError([problem], name)


def parse_text(text: str, name: str) -> Document:
    """Parse a YAML mapping.

    Raises:
        RecipeError: not YAML, or not a mapping of plain values; the one problem has its line.
    """
    tree = _load(text, name)
    if not isinstance(tree, Mapping):
        got = "nothing" if tree is None else "a list" if isinstance(tree, list) else "one value"
        raise RecipeError(
            [Problem("(top)", f"got {got}; must be 'key: value' lines", f"{name}:1")], name
        )
    plain = _Plain(name)
    return Document(name, plain.convert(tree, ()), plain.lines)


def read(path: Path, name: str | None = None) -> Document:
    """Parse a YAML file.

    Args:
        path: the file.
        name: how messages call it; the path when left out.

    Raises:
        RecipeError: it cannot be read, or as for :func:`parse_text`.
    """
    name = name or str(path)
    try:
        raw = path.read_bytes()
        if len(raw) > MAX_BYTES:
            raise RecipeError(
                [Problem("file", f"{len(raw)} bytes; at most {MAX_BYTES}", name)], name
            )
        text = raw.decode("utf-8")
    except OSError as error:
        problem = Problem("file", f"cannot be read: {error.strerror}", name)
        raise RecipeError([problem], name) from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        said = f"is not UTF-8 text (byte {error.start})"
        problem = Problem("file", said, f"{name}:{line}")
        raise RecipeError([problem], name) from error
    return parse_text(text, name)


def parse_value(text: str) -> Any:
    """The value of an override, read as YAML: ``1e-5``, ``null``, ``[a, b]``."""
    return _Plain(COMMAND_LINE).convert(_load(text, COMMAND_LINE), ())


def override(document: Document, overrides: Sequence[str]) -> tuple[Document, list[Problem]]:
    """Apply ``section.key=value`` overrides; sections on the way are made where missing.

    Returns:
        The edited document, and the problems of overrides that could not be applied.
    """
    data = _copy(document.data)
    problems: list[Problem] = []
    seen: set[KeyPath] = set()
    for text in overrides:
        key, equals, raw = text.partition("=")
        path = tuple(key.split("."))
        if not equals or not all(path):
            example = "train.learning_rate=1e-5"
            problems.append(
                Problem(text, "is not section.key=value", COMMAND_LINE, f"like {example}")
            )
        elif path in seen:
            problems.append(Problem(key, "is set twice", COMMAND_LINE, "keep one of them"))
        else:
            seen.add(path)
            problems.extend(_set(data, path, key, raw))
    lines = {p: n for p, n in document.lines.items() if p not in seen}
    return Document(document.name, data, lines, frozenset(seen)), problems


def _set(data: dict[str, Any], path: tuple[str, ...], key: str, raw: str) -> list[Problem]:
    """Set one value in place; the problem if that cannot be done."""
    try:
        value = parse_value(raw)
    except RecipeError as error:
        fix = f"quote the value: '{key}=\"{raw}\"'"
        return [Problem(key, f"{raw!r}: {error.problems[0].message}", COMMAND_LINE, fix)]
    node = data
    for depth, part in enumerate(path[:-1], start=1):
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            what = "a list; replace it whole" if isinstance(child, list) else "not a section"
            return [Problem(key, f"{dotted(path[:depth])} is {what}", COMMAND_LINE)]
        node = child
    node[path[-1]] = value
    return []


def _copy(value: Any) -> Any:
    """A deep copy of plain data."""
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value
