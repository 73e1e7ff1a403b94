"""What ``ls`` shows: one plain row for each thing a recipe can name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t2i_align.catalog import KINDS as CARD_KINDS
from t2i_align.catalog import cards
from t2i_align.registry import Table, resolve

Row = dict[str, Any]
VERIFIED = Path(__file__).parent / "generators" / "verified.json"


def first_line(thing: Any) -> str:
    """The first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n", 1)[0]


def recipes() -> list[Row]:
    """Shipped recipes, with the first line of their header."""
    from t2i_align.recipe import shipped

    rows = []
    for name, path in shipped().items():
        header = path.read_text(encoding="utf-8").split("\n", 1)[0]
        rows.append({"name": name, "summary": header.lstrip("# ")})
    return rows


def objectives() -> list[Row]:
    """Objectives, with what they need."""
    from t2i_align.objectives import OBJECTIVES

    rows = []
    for name, cls in _classes(OBJECTIVES):
        kinds, views = ", ".join(sorted(cls.needs.kinds)), ", ".join(sorted(cls.needs.views))
        row = {"name": name, "layout": cls.needs.layout, "kinds": kinds, "views": views}
        rows.append(row | {"summary": first_line(cls)})
    return rows


def generators() -> list[Row]:
    """Generators, with their likelihood and medium; of diffusers every family that is proven.

    Proofs are those of docs/backbones.md, run by the tests.
    """
    from t2i_align.generators import GENERATORS

    rows = [
        {"name": name, "kind": cls.kind, "media": cls.media_kind, "summary": first_line(cls)}
        for name, cls in _classes(GENERATORS)
    ]
    return rows + [
        {
            "name": f"diffusers: {found['name']}",
            "kind": "elbo",
            "media": found["media"],
            "summary": f"{found['pipelines']}; proofs: {found['proofs']}",
        }
        for found in json.loads(VERIFIED.read_text())
    ]


def sources() -> list[Row]:
    """Data sources."""
    from t2i_align.data import SOURCES

    return [{"name": name, "summary": first_line(cls)} for name, cls in _classes(SOURCES)]


def _classes(table: Table) -> list[tuple[str, Any]]:
    return [(name, resolve(path)) for name, path in table.items()]


def _card_rows(kind: str) -> Callable[[], list[Row]]:
    def rows() -> list[Row]:
        return [
            {
                "name": card.name,
                "version": card.version,
                "license": card.license,
                "source": card.sources[0].id,
                "summary": card.summary,
            }
            for card in cards(kind)
        ]

    return rows


LISTS: dict[str, Callable[[], list[Row]]] = {
    "recipes": recipes,
    "objectives": objectives,
    "generators": generators,
    "sources": sources,
    **{noun: _card_rows(kind) for kind, noun in CARD_KINDS.items()},
}
