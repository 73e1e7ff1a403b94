"""Ways to spoil a recipe's text, each with what must come of it.

A mutation knows which line it touched and, where it set a value, the key and the value that the
resolved recipe must then show. Nothing here knows how recipes are read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z_0-9]+):(?P<rest> .*|)$")
UNSET: Any = object()
KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """A ``key: value`` line of block style.

    Args:
        line: 1-based.
        path: of the key.
        value: as read.
    """

    line: int
    path: KeyPath
    value: Any


@dataclass(frozen=True)
class Case:
    """One spoiled recipe.

    Args:
        kind: class of mutation.
        about: what was done, for messages.
        content: the file.
        line: where the fault stands; 0 when it has no one line.
        key: dotted key a refusal must name; empty when only its line is known.
        path: key whose value was set.
        value: that the dump shows there if this is accepted.
        same: the meaning is unchanged, so the dump is, and a refusal is wrong.
        refused: it cannot be accepted.
        overrides: of the command line.
    """

    kind: str
    about: str
    content: bytes
    line: int = 0
    key: str = ""
    path: KeyPath = ()
    value: Any = UNSET
    same: bool = False
    refused: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """A recipe to spoil.

    Args:
        lines: of the file.
        leaves: its scalar keys.
        sections: lines of the sections by name.
        chance: a stream of its own for each recipe.
    """

    lines: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    sections: Mapping[str, int]
    chance: random.Random

    @staticmethod
    def of(name: str, text: str, data: Mapping[str, Any]) -> Text:
        """Find the keys that stand on a line of their own."""
        lines, path, leaves, sections = text.split("\n"), [], [], {}
        for number, line in enumerate(lines, 1):
            found = KEY.match(line)
            if found is None:
                continue
            depth = len(found["indent"]) // 2
            path = [*path[:depth], found["key"]]
            value: Any = data
            for part in path:
                value = value[part]
            if isinstance(value, dict) and depth == 0:
                sections[found["key"]] = number
            elif not isinstance(value, dict | list):
                leaves.append(Leaf(number, tuple(path), value))
        return Text(tuple(lines), tuple(leaves), sections, random.Random(name))

    def replaced(self, line: int, *new: str) -> bytes:
        """The file with other lines in the place of one."""
        return "\n".join([*self.lines[: line - 1], *new, *self.lines[line:]]).encode()

    def some(self, num: int, keep: Callable[[Leaf], bool] = lambda _: True) -> list[Leaf]:
        """A few of the leaves."""
        kept = [leaf for leaf in self.leaves if keep(leaf)]
        return self.chance.sample(kept, min(num, len(kept)))

    def start(self, leaf: Leaf) -> str:
        """Indentation and key of a leaf's line, the colon included."""
        return self.lines[leaf.line - 1].partition(":")[0] + ":"

    def set(self, kind: str, leaf: Leaf, written: str, value: Any = UNSET) -> Case:
        """A leaf with another value."""
        content = self.replaced(leaf.line, f"{self.start(leaf)} {written}")
        about = f"{'.'.join(leaf.path)}: {written[:40]}"
        return Case(kind, about, content, leaf.line, ".".join(leaf.path), leaf.path, value)

    def odd(self, kind: str, about: str, content: bytes | str, **facts: Any) -> Case:
        """A case without a key."""
        raw = content if isinstance(content, bytes) else content.encode()
        return Case(kind, about, raw, **facts)


def is_number(leaf: Leaf) -> bool:
    """Whether a leaf holds a number."""
    return isinstance(leaf.value, int | float) and not isinstance(leaf.value, bool)


def typos(text: Text) -> Iterator[Case]:
    """Letters dropped, doubled or swapped in a key."""
    for leaf in text.some(3):
        key, head = leaf.path[-1], text.start(leaf)
        i = text.chance.randrange(len(key))
        wrong = text.chance.choice(
            [key[:i] + "x" + key[i + 1 :], key[: i + 1] + key[i:], key + "_"]
        )
        line = text.lines[leaf.line - 1].replace(head, head[: -len(key) - 1] + wrong + ":", 1)
        named = ".".join((*leaf.path[:-1], wrong))
        yield text.odd("typo", wrong, text.replaced(leaf.line, line), line=leaf.line, key=named)


def types(text: Text) -> Iterator[Case]:
    """Text, numbers and booleans in each other's place."""
    for leaf in text.some(2, is_number):
        yield text.set("type", leaf, "plenty", "plenty")
        yield text.set("type", leaf, "true", True)
    for leaf in text.some(2, lambda x: isinstance(x.value, str)):
        yield text.set("type", leaf, "17", 17)
    for leaf in text.some(1, lambda x: isinstance(x.value, bool)):
        yield text.set("type", leaf, "'true'", "true")


def ranges(text: Text) -> Iterator[Case]:
    """Numbers below, at and above what makes sense."""
    for leaf in text.some(2, is_number):
        for written in ("-1", "0", "1.5", "-1e9"):
            yield text.set("range", leaf, written, float(written))


def missing(text: Text) -> Iterator[Case]:
    """A key, or a whole section, taken away."""
    for leaf in text.some(3):
        yield text.odd("missing", ".".join(leaf.path), text.replaced(leaf.line))
    for name, line in text.sections.items():
        end = line
        while end < len(text.lines) and text.lines[end].startswith(" "):
            end += 1
        left = "\n".join([*text.lines[: line - 1], *text.lines[end:]])
        needed = name in ("objective", "data")
        yield text.odd("missing", name, left, key=name if needed else "", refused=needed)


def extras(text: Text) -> Iterator[Case]:
    """A key nobody knows, in every section and at the top."""
    for name, line in text.sections.items():
        content = text.replaced(line, text.lines[line - 1], "  frobnicate: 1")
        key = f"{name}.frobnicate"
        yield text.odd("extra", key, content, line=line + 1, key=key, refused=True)
    content, end = "\n".join([*text.lines, "frobnicate: 1"]), len(text.lines) + 1
    yield text.odd("extra", "top", content, line=end, key="frobnicate", refused=True)


def nesting(text: Text) -> Iterator[Case]:
    """A section in the place of a value, and a section one level too deep."""
    for leaf in text.some(3):
        yield text.set("nesting", leaf, "{inner: 1}", {"inner": 1})
    leaf = text.some(1)[0]
    deep = "{a: " * 40 + "1" + "}" * 40
    yield text.odd("nesting", "deep", text.set("", leaf, deep).content, refused=True)
    name = text.chance.choice([*text.sections])
    line = text.sections[name]
    lines, at = list(text.lines), line
    while at < len(lines) and (lines[at].startswith(" ") or not lines[at]):
        lines[at] = "  " + lines[at] if lines[at] else ""
        at += 1
    lines.insert(line, f"  {name}:")
    yield text.odd("nesting", f"{name}.{name}", "\n".join(lines), refused=True)


def duplicates(text: Text) -> Iterator[Case]:
    """A key or a section twice."""
    for leaf in text.some(2):
        own = text.lines[leaf.line - 1]
        content = text.replaced(leaf.line, own, own)
        about = ".".join(leaf.path)
        yield text.odd("duplicate", about, content, line=leaf.line + 1, key="YAML", refused=True)
    name = text.chance.choice([*text.sections])
    content = "\n".join([*text.lines, f"{name}: {{}}"])
    end = len(text.lines) + 1
    yield text.odd("duplicate", name, content, line=end, key="YAML", refused=True)


def anchors(text: Text) -> Iterator[Case]:
    """Anchors, aliases, merge keys and the bomb made of them."""
    first, second = text.some(2)
    plain = text.lines[first.line - 1]
    anchored = plain.replace(": ", ": &a ", 1)
    yield text.odd("anchors", "anchor", text.replaced(first.line, anchored), same=True)
    bad: dict[str, Any] = {"key": "YAML", "refused": True}
    alias = text.set("", second, "*a").content
    yield text.odd("anchors", "alias", alias, line=second.line, **bad)
    name, line = text.chance.choice([*text.sections.items()])
    merge = text.replaced(line, f"{name}: &s", "  <<: *s")
    yield text.odd("anchors", "merge", merge, line=line + 1, **bad)
    bomb = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    yield text.odd("anchors", "bomb", "\n".join([*bomb, *text.lines]), line=2, **bad)


def huge(text: Text) -> Iterator[Case]:
    """Numbers no machine holds, and those it hardly holds."""
    for leaf in text.some(1, is_number):
        yield text.set("huge", leaf, "1e400")
        yield text.set("huge", leaf, "-.inf")
        yield text.set("huge", leaf, "1e308", 1e308)
        yield text.set("huge", leaf, "1" + "0" * 40, 10**40)
        yield text.set("huge", leaf, "9" * 5000)
        yield text.set("huge", leaf, "0x" + "f" * 300, 16**300 - 1)
        yield text.set("huge", leaf, "1e-400")
    for leaf in text.some(1, lambda x: isinstance(x.value, str)):
        yield text.set("huge", leaf, "x" * 20_000, "x" * 20_000)


def unicode(text: Text) -> Iterator[Case]:
    """Look-alike letters, invisible ones, and bytes that are no text."""
    leaf = text.some(1)[0]
    own, key = text.lines[leaf.line - 1], leaf.path[-1]
    for what, other in (("look-alike", "\u0435"), ("zero width", "\u200b")):
        wrong = own.replace(key, key + other, 1)
        facts = {"line": leaf.line, "refused": True}
        yield text.odd("unicode", what, text.replaced(leaf.line, wrong), **facts)
    for number in text.some(1, is_number):
        yield text.set("unicode", number, "\uff11\uff12", "\uff11\uff12")
    for named in text.some(1, lambda x: x.path == ("output_dir",)):
        yield text.set("unicode", named, "'\u732b/\U0001f408'", "\u732b/\U0001f408")
        yield text.set("unicode", named, '"a\\0b"')
        yield text.set("unicode", named, "'~nobody-of-that-name/x'", "~nobody-of-that-name/x")
        yield text.set("unicode", named, '"\\ud800"')
    whole = "\n".join(text.lines)
    yield text.odd("unicode", "byte order mark", "\ufeff" + whole, same=True)
    yield text.odd("unicode", "control", text.replaced(leaf.line, own + "\x07"), refused=True)
    yield text.odd("unicode", "latin-1", whole.encode() + b"# \xe9\n", refused=True)
    yield text.odd("unicode", "UTF-16", whole.encode("utf-16"), refused=True)


def tabs(text: Text) -> Iterator[Case]:
    """Tabs where spaces belong."""
    for leaf in text.some(2, lambda x: len(x.path) > 1):
        own = text.lines[leaf.line - 1]
        content = text.replaced(leaf.line, "\t" + own.lstrip())
        yield text.odd("tabs", "indentation", content, key="YAML", refused=True)
    leaf = text.some(1)[0]
    own = text.lines[leaf.line - 1].replace(": ", ":\t", 1)
    yield text.odd("tabs", "behind the colon", text.replaced(leaf.line, own))


def empty(text: Text) -> Iterator[Case]:
    """Nothing at all, in several ways."""
    for content in ("", "\n\n", "# only a comment\n", "---\n", "{}", "[]", "null", "text"):
        yield text.odd("empty", repr(content), content, refused=True)
    for name, line in text.sections.items():
        if name in ("objective", "data"):
            end = line
            while end < len(text.lines) and text.lines[end].startswith(" "):
                end += 1
            left = "\n".join([*text.lines[:line], *text.lines[end:]])
            yield text.odd("empty", name, left, line=line, key=name, refused=True)


def indentation(text: Text) -> Iterator[Case]:
    """A line further in, further out, and all of it further in."""
    for leaf in text.some(3, lambda x: len(x.path) > 1):
        own = text.lines[leaf.line - 1]
        for wrong in (" " + own, own[1:], own.lstrip()):
            content = text.replaced(leaf.line, wrong)
            yield text.odd("indentation", f"{leaf.line}: {wrong[:20]}", content)
    whole = "\n".join("    " + line if line else "" for line in text.lines)
    yield text.odd("indentation", "all", whole, same=True)


def comments(text: Text) -> Iterator[Case]:
    """Comments where they are harmless, and marks that are none."""
    leaf = text.some(1)[0]
    own = text.lines[leaf.line - 1]
    notes = text.replaced(leaf.line, "# a: b", own + "  # more", "# {c: [")
    yield text.odd("comments", "between", notes, same=True)
    yield text.odd("comments", "windows", "\r\n".join(text.lines), same=True)
    for number in text.some(1, is_number):
        written = f"{number.value}#x"
        yield text.set("comments", number, written, written)
    cut = text.replaced(leaf.line, text.start(leaf) + " # " + str(leaf.value))
    yield Case("comments", "value", cut, leaf.line, ".".join(leaf.path), leaf.path, None)


def nulls(text: Text) -> Iterator[Case]:
    """No value, in the three spellings."""
    for leaf, written in zip(text.some(3), ("null", "~", ""), strict=True):
        yield text.set("null", leaf, written, None)
    for name in text.sections:
        if name in ("objective", "data", "model", "train"):
            content = "\n".join([*text.lines, f"{name}: null"])
            yield text.odd("null", name, content, key="YAML", refused=True)
            break


def lists(text: Text) -> Iterator[Case]:
    """A list in the place of a value or a section."""
    for leaf in text.some(3):
        yield text.set("lists", leaf, "[1]", [1])
        yield text.set("lists", leaf, "[]", [])
    name, line = text.chance.choice([*text.sections.items()])
    yield text.odd("lists", name, text.replaced(line, f"{name}: []"), refused=True)


def tags(text: Text) -> Iterator[Case]:
    """Tags, directives and several documents."""
    leaf = text.some(1)[0]
    harm = "!!python/object/apply:os.system ['touch /tmp/x']"
    yield text.odd("tags", "python", text.set("", leaf, harm).content, refused=True)
    for number in text.some(1, is_number):
        yield text.set("tags", number, f"!!str {number.value}", str(number.value))
    whole = "\n".join(text.lines)
    yield text.odd("tags", "two documents", f"{whole}\n---\na: 1\n", refused=True)
    yield text.odd("tags", "YAML 1.1", f"%YAML 1.1\n---\n{whole}")
    yield text.odd("tags", "set", text.set("", leaf, "!!set {a, b}").content, refused=True)


def torn(text: Text) -> Iterator[Case]:
    """The file cut off, and lines that changed places."""
    whole = "\n".join(text.lines).encode()
    for _ in range(3):
        end = text.chance.randrange(len(whole))
        yield text.odd("torn", f"at byte {end}", whole[:end])
    first, second = text.some(2)
    lines = list(text.lines)
    a, b = first.line - 1, second.line - 1
    lines[a], lines[b] = lines[b], lines[a]
    yield text.odd("torn", f"lines {a + 1} and {b + 1}", "\n".join(lines))


def commands(text: Text) -> Iterator[Case]:
    """The same faults on the command line."""
    whole = "\n".join(text.lines)
    for leaf in text.some(2):
        key = ".".join(leaf.path)
        odd = ("[1]", "{a: 1}", "*x", "1e400", "9" * 5000, "\x07", "~", "!!int x")
        for written in text.chance.sample(odd, 3):
            yield text.odd(
                "overrides", f"{key}={written[:9]}", whole, overrides=(f"{key}={written}",)
            )
        bad = (f"{key}_=1", f"{key}.more=1", key, f".{key}=1")
        for override in text.chance.sample(bad, 2):
            yield text.odd("overrides", override, whole, overrides=(override,), refused=True)


ALL = (
    *(typos, types, ranges, missing, extras, nesting, duplicates, anchors, huge, unicode),
    *(tabs, empty, indentation, comments, nulls, lists, tags, torn, commands),
)
