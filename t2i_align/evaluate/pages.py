"""What every HTML report is made of: sections, one style, and one step that puts the file in place.

A page needs nothing else: figures are inline, and its own content policy forbids scripts and every
request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.errors import StorageError

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """A further part of the report: a text, a table, or both.

    Args:
        title: heading.
        text: plain text below it; an empty line starts a paragraph.
        rows: of the table; columns are the keys in the order they first occur.
    """

    title: str
    text: str = ""
    rows: Sequence[Mapping[str, Any]] = ()

    @property
    def columns(self) -> list[str]:
        """Names of the table's columns."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    @property
    def paragraphs(self) -> list[str]:
        """The text's paragraphs."""
        return [part.strip() for part in self.text.split("\n\n") if part.strip()]

    @property
    def cells(self) -> list[list[str]]:
        """The table's cells as text, in the order of the columns."""
        return [[cell(row.get(key)) for key in self.columns] for row in self.rows]


def cell(value: Any) -> str:
    """A value as a table shows it: four digits of a float, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def render(template: str, parts: Mapping[str, Any]) -> str:
    """A page of its parts; every text is escaped unless it is one of our figures.

    Args:
        template: ``report`` or ``scores``.
        parts: what the template names.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{template}.html.j2").render(parts)


def write(out: Path, page: str) -> Path:
    """Put a page in its place in one step.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error}", "choose another --out") from error
    return out
