"""Cards: what the suite knows about judges, data sets and benchmarks, as YAML anyone can edit.

A card is ``<kind>/<name>/card.yaml``. In a checkout the three folders stand at the top; a wheel
carries them inside the package. ``python -m t2i_align.catalog --write-readmes`` writes the tables
of the folders' READMEs from the cards.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from t2i_align.errors import RecipeError, UserError
from t2i_align.explain import validate
from t2i_align.options import Options
from t2i_align.yaml_source import read

PACKAGE = Path(__file__).resolve().parent
KINDS = {"reward_models": "judges", "datasets": "datasets", "eval": "benchmarks"}
BEGIN = "<!-- table of cards: begin -->"
END = "<!-- table of cards: end -->"


class CardSource(Options):
    """Where something was published, and exactly which state of it."""

    id: str = Field(description="hub id or address")
    revision: str | None = Field(None, description="commit; null: not pinned")
    sha256: str | None = Field(None, description="of the file the card's numbers come from")


class Change(Options):
    """One line of a card's history."""

    version: int = Field(ge=1, description="card version")
    change: str = Field(description="what changed, so that old scores can be placed")


class Card(Options):
    """A judge, a data set or a benchmark."""

    name: str = Field(description="the folder's name")
    version: int = Field(ge=1, description="raised whenever numbers made with the card may change")
    changelog: list[Change] = Field(min_length=1, description="newest first")
    implementation: str | None = Field(
        None, pattern=r"^[\w.]+:\w+$", description="module:Class that runs it, or null"
    )
    sources: list[CardSource] = Field(min_length=1, description="where it comes from")
    license: str = Field(description="SPDX id, or the owner's words")
    summary: str = Field(description="one sentence")
    input: str = Field(description="what goes in: columns, media, preprocessing")
    output: str = Field(description="what comes out: records, formula")
    range: str | None = Field(None, description="of the output, for judges and benchmarks")
    direction: str | None = Field(None, description="which end is better")
    citation: str = Field(description="BibTeX")
    failure_modes: list[str] = Field(default_factory=list, description="known traps")
    golden: str | None = Field(None, description="file of reference values beside the card")
    details: dict[str, Any] = Field(default_factory=dict, description="facts of this kind only")


def find_root(package: Path = PACKAGE) -> Path:
    """The folder that holds the three catalogue folders.

    Args:
        package: the package folder.

    Raises:
        UserError: neither a wheel's catalogue nor a checkout; names both places.
    """
    bundled, checkout = package / "_catalog", package.parent
    if bundled.is_dir():
        return bundled
    if (checkout / "pyproject.toml").is_file():
        return checkout
    raise UserError(
        f"the catalogue of cards was not found; tried {bundled} (an installed package) and "
        f"{checkout} (a checkout, with pyproject.toml)",
        "install t2i-align again, or run from a complete checkout",
    )


def read_card(path: Path) -> Card:
    """One card.

    Raises:
        RecipeError: every problem of the file, with its line.
    """
    document = read(path)
    card, problems = validate(Card, document.data, (), document.where)
    if card is None:
        raise RecipeError(problems, str(path))
    if card.name != path.parent.name:
        raise UserError(f"{path}: name is '{card.name}' but the folder is '{path.parent.name}'")
    return card


def cards(kind: str, root: Path | None = None) -> list[Card]:
    """All cards of a kind, by name.

    Args:
        kind: ``reward_models``, ``datasets`` or ``eval``.
        root: the catalogue; found when left out.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of card '{kind}'; known: {', '.join(KINDS)}")
    folder = (root or find_root()) / kind
    return [read_card(path) for path in sorted(folder.glob("*/card.yaml"))]


def table(found: list[Card]) -> str:
    """The markdown table of a catalogue README."""
    if not found:
        return "none yet"
    rows = [
        "| name | version | licence | source | revision | what it is |",
        "|---|---|---|---|---|---|",
    ]
    for card in found:
        source = card.sources[0]
        link = f"[{card.name}]({card.name}/card.yaml)"
        pinned = source.revision[:12] if source.revision else "not pinned"
        facts = (link, str(card.version), card.license, f"`{source.id}`", pinned, card.summary)
        rows.append(f"| {' | '.join(facts)} |")
    return "\n".join(rows)


def with_table(readme: str, found: list[Card]) -> str:
    """A README's text with the table between its markers replaced.

    Raises:
        UserError: the markers are not there.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError("a catalogue README has no table markers", f"add '{BEGIN}' and '{END}'")
    return f"{head}{BEGIN}\n{table(found)}\n{END}{tail}"


def write_readmes() -> None:
    """Write every catalogue README's table anew."""
    root = find_root()
    for kind in KINDS:
        path = root / kind / "README.md"
        path.write_text(with_table(path.read_text(encoding="utf-8"), cards(kind)), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-readmes"]:
        sys.exit("usage: python -m t2i_align.catalog --write-readmes")
    write_readmes()
