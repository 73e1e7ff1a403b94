"""The generated tables of the README: ``python -m t2i_align.readme`` writes them anew.

A table stands between ``<!-- ls KIND: begin -->`` and ``<!-- ls KIND: end -->`` and shows the rows
of ``t2i-align ls KIND``; a test keeps it true.
"""

from __future__ import annotations

import re
from pathlib import Path

from t2i_align.listing import LISTS

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- ls (\w+): begin -->\n)(.*?)(<!-- ls \2: end -->)", re.DOTALL)
COLUMNS = {
    "objectives": ("name", "kinds", "layout", "summary"),
    "judges": ("name", "version", "license", "summary"),
    "benchmarks": ("name", "version", "license", "summary"),
    "recipes": ("name", "summary"),
}


def table(kind: str) -> str:
    """Markdown of one list, a column an attribute, names as code."""
    columns = COLUMNS[kind]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in LISTS[kind]():
        cells = [str(row[c]).replace("|", "\\|") for c in columns]
        cells[0] = f"`{cells[0]}`"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """A text with every marked table replaced."""
    return BLOCK.sub(lambda m: m[1] + table(m[2]) + m[4], text)


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
