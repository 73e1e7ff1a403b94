"""How verbs print: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import typer

PIPED = 500


def print_json(value: Any) -> None:
    """Indented JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table of rows with equal keys; a line when there are none."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not rows:
        console.print(f"[bold]{title}[/]: none yet")
        return
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED  # a log or a pipe has no width to fold cells into
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, no_wrap=column == "name", overflow="fold", style=_style(column))
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    console.print(table)


def print_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """A table of two columns, without a header."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False
    )
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(escape(name), escape(value))
    Console(highlight=False).print(table)


def _style(column: str) -> str:
    return "cyan" if column == "name" else ""
