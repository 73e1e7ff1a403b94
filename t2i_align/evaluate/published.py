"""Published numbers beside ours, where both were made alike.

    eval/<benchmark>/published/*.yaml

A table names its source and, field by field of our protocol, how its numbers were made; ``null`` is
what the source does not say. Rows stand beside ours only where every field it states is known here
and agrees; which fields do not, and which the source leaves open, is always said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from t2i_align.catalog import find_root
from t2i_align.errors import RecipeError
from t2i_align.explain import validate
from t2i_align.options import Options
from t2i_align.yaml_source import read

HASH = re.compile("[0-9a-f]{40,}")
LONGEST = 120  # characters of a value in a sentence


class Row(Options):
    """One model of a table."""

    model: str = Field(description="as the source names it")
    overall: float | None = Field(default=None, description="null: the source gives parts only")
    tasks: dict[str, float] = Field(default_factory=dict, description="by our names")
    note: str = Field(default="", description="what the source or others say of the number")
    source: str | None = Field(
        default=None, description="where this row stands, if not with the table"
    )


class Published(Options):
    """One table."""

    benchmark: str = Field(description="name of our benchmark")
    title: str = Field(description="what the table is")
    source: str = Field(description="repository and file, or paper")
    read: str = Field(description="when and at which state it was read")
    protocol: dict[str, Any] = Field(description="fields of our protocol; null: not stated")
    rows: list[Row] = Field(min_length=1, description="models")


def published(benchmark: str, root: Path | None = None) -> list[Published]:
    """All tables of a benchmark, by file name.

    Args:
        benchmark: its name.
        root: the catalogue; found when left out.

    Raises:
        RecipeError: every problem of a file, with its line.
    """
    folder = (root or find_root()) / "eval" / benchmark / "published"
    found = []
    for path in sorted(folder.glob("*.yaml")):
        document = read(path)
        table, problems = validate(Published, document.data, (), document.where)
        if table is None:
            raise RecipeError(problems, str(path))
        found.append(table)
    return found


def agreement(table: Published, protocol: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """How a table's protocol relates to ours.

    Args:
        table: published.
        protocol: of our evaluation.

    Returns:
        ``field: theirs; ours`` of the fields that differ or that nobody knows here, and the fields
        that the table leaves open.
    """
    differ, unstated = [], []
    for name, theirs in table.protocol.items():
        ours = protocol.get(name)
        if theirs is None:
            unstated.append(name)
        elif theirs != ours:
            here = "unknown" if ours is None else _short(ours)
            differ.append(f"{name}: {_short(theirs)} there, {here} here")
    return differ, unstated


def _short(value: Any) -> str:
    """A value in a sentence: hashes by how they begin."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = json.dumps(value) if isinstance(value, dict) else text
    return f"{text[:12]}..." if HASH.fullmatch(text) else text[:LONGEST]


def beside(summary: Mapping[str, Any], root: Path | None = None) -> list[dict[str, Any]]:
    """Tables with what sets them apart from an evaluation; rows only where nothing does.

    Args:
        summary: ``summary.json`` of an evaluation.
        root: the catalogue.

    Returns:
        ``{title, source, read, differ, unstated, rows}`` a table; ``rows`` starts with ours.
    """
    protocol = summary["protocol"]
    found = []
    for table in published(protocol["benchmark"], root):
        differ, unstated = agreement(table, protocol)
        if other := protocol.get("replayed_with"):
            differ.append(f"judged again with other options here: {_short(other)}")
        if summary.get("partial"):
            differ.append("pictures are missing here")
        rows = [] if differ else [_ours(summary), *(_theirs(row) for row in table.rows)]
        facts = {"title": table.title, "source": table.source, "read": table.read}
        found.append(facts | {"differ": differ, "unstated": unstated, "rows": rows})
    return found


def _ours(summary: Mapping[str, Any]) -> dict[str, Any]:
    name = summary.get("lora") or summary.get("denoiser") or summary.get("model")
    row: dict[str, Any] = {"model": f"ours: {name or 'pictures of elsewhere'}"}
    overall = summary["overall"]
    bounds = f" [{overall['low']:.3f}, {overall['high']:.3f}]"
    row["overall"] = f"{overall['mean']:.3f}{bounds}"
    return row | {k: f"{v:.3f}" for k, v in summary["tasks"].items()}


def _theirs(row: Row) -> dict[str, Any]:
    facts: dict[str, Any] = {"model": row.model, "overall": row.overall, **row.tasks}
    facts |= {"note": row.note} if row.note else {}
    return facts | ({"source": row.source} if row.source else {})
