"""YAML as located data."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i_align.errors import RecipeError
from t2i_align.yaml_source import Document, dotted, override, parse_text, parse_value, read


def problem(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_text(text, "f.yaml")
    assert len(caught.value.problems) == 1
    return str(caught.value.problems[0])


def test_yaml_1_2_scalars() -> None:
    """``1e-5`` is a number without a dot, and ``no`` is text."""
    doc = parse_text("lr: 1e-5\nmixed: no\nbig: 1_000\nlist: [1, true, null]\n", "f.yaml")
    assert doc.data == {"lr": 1e-5, "mixed": "no", "big": 1000, "list": [1, True, None]}
    assert [type(v) for v in doc.data["list"]] == [int, bool, type(None)]
    assert type(doc.data["lr"]) is float


def test_every_key_has_its_line() -> None:
    doc = parse_text("# c\na:\n  b: 1\n\n  c:\n    - x\n    - y\n", "f.yaml")
    assert doc.lines == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 5,
        ("a", "c", 0): 6,
        ("a", "c", 1): 7,
    }
    assert doc.where(("a", "missing")) == "f.yaml:2"
    assert doc.where(("nothing",)) == "f.yaml:1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", 'f.yaml:4: YAML: found duplicate key "c"'),
        ("a: [1\nb: 2\n", "f.yaml:2: YAML: expected ',' or ']'"),
        ("- a\n- b\n", "f.yaml:1: (top): got a list; must be 'key: value' lines"),
        ("", "f.yaml:1: (top): got nothing; must be 'key: value' lines"),
        ("a: 1\nb: {c: .nan}\n", "f.yaml:2: b.c: got nan; numbers must be finite"),
        ("a: 1\nb: .inf\n", "f.yaml:2: b: got inf; numbers must be finite"),
        ("a: 2024-01-01\n", "f.yaml:1: a: a date is not allowed here"),
        ("a: !x y\n", "f.yaml:1: a: a tagged value is not allowed here"),
        ("a: 1\n2: b\n", "f.yaml:2: 2: key 2 is not text"),
        ("a: &x [*x]\n", "f.yaml:1: YAML: aliases are not read; write the value out"),
        ("a: " + "[" * 17 + "]" * 17, "nested deeper than 16"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested deeper than 16"),
        (f"a: [{'1, ' * 5000}]", "more than 5000 values"),
    ],
)
def test_what_is_not_plain_data_is_an_error_with_its_line(text: str, said: str) -> None:
    assert said in problem(text)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for path, said in [
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "none.yaml", "cannot be read: No such file"),
    ]:
        with pytest.raises(RecipeError, match=said):
            read(path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(RecipeError, match=r"is not UTF-8 text \(byte 3\)"):
        read(tmp_path / "latin.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * ((1 << 18) + 1))
    with pytest.raises(RecipeError, match="at most 262144"):
        read(tmp_path / "huge.yaml")


def test_overrides_edit_a_copy_and_are_located() -> None:
    doc = parse_text("a:\n  b: 1\nc: {d: null}\n", "f.yaml")
    texts = ["a.b=1e-5", "c.d.e=[x, 'y z']", "new.key=~/p", "c.f=null"]
    edited, problems = override(doc, texts)
    assert not problems
    assert edited.data == {
        "a": {"b": 1e-5},
        "c": {"d": {"e": ["x", "y z"]}, "f": None},
        "new": {"key": "~/p"},
    }
    assert doc.data == {"a": {"b": 1}, "c": {"d": None}}
    assert edited.where(("a", "b")) == "command line"
    assert edited.where(("c", "d", "e", 0)) == "command line"
    assert edited.where(("a",)) == "f.yaml:1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.b", "a.b: is not section.key=value\n    like train.learning_rate=1e-5"),
        ("a..b=1", "a..b=1: is not section.key=value"),
        ("=1", "=1: is not section.key=value"),
        ("a.b.c=1", "a.b.c: a.b is not a section"),
        ("l.x=1", "l.x: l is a list; replace it whole"),
        ("a.p=*.parquet", "'*.parquet': "),
        ("a.b=.nan", "'.nan': got nan; numbers must be finite"),
    ],
)
def test_a_bad_override_says_what_to_write(text: str, said: str) -> None:
    doc = parse_text("a: {b: 1}\nl: [1]\n", "f.yaml")
    _, problems = override(doc, [text])
    assert len(problems) == 1
    assert str(problems[0]).startswith("command line: ")
    assert said in str(problems[0])


def test_an_override_given_twice_is_an_error() -> None:
    _, problems = override(Document("f", {}), ["a.b=1", "a.b=2"])
    assert str(problems[0]) == "command line: a.b: is set twice\n    keep one of them"


def test_dotted_names_list_items_by_index() -> None:
    assert dotted(("validation", "prompts", 2)) == "validation.prompts[2]"


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text("abc xyz:#-'\"[]{}", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(plain)
def test_json_is_read_as_itself(value: object) -> None:
    """JSON is YAML: what json writes, the reader gives back."""
    import json

    assert parse_value(json.dumps(value)) == value
