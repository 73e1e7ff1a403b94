"""What to cite for a run: BibTeX of its objective, its model family and its data, each once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from t2i_align.catalog import Card, cards
from t2i_align.checks import known_family
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.recipe import Recipe


def citations(recipe: Recipe) -> list[str]:
    """BibTeX entries of a recipe's objective, model and data, each key once."""
    entries = [recipe.chosen("objective").citation, model_citation(recipe)]
    entries += [card.citation for card in data_cards(recipe.data.model_dump())]
    by_key = {entry.split(",", 1)[0].strip(): entry.strip() for entry in entries if entry.strip()}
    return list(by_key.values())


def model_citation(recipe: Recipe) -> str:
    """BibTeX of the model family; empty when it cannot be told without a download."""
    if isinstance(recipe.model, DiffusersOptions):
        from t2i_align.generators.layouts import layout_of

        family = known_family(recipe.model)
        return layout_of(family).citation if family else ""
    return recipe.chosen("model").citation


def data_cards(data: dict[str, Any]) -> Iterator[Card]:
    """The cards of the data sets a ``data`` section names: by hub id, or by a folder of a path."""
    hub_id, path = data.get("hub_id"), data.get("path") or []
    folders = {part for p in ([path] if isinstance(path, str) else path) for part in p.split("/")}
    for card in cards("datasets"):
        ids = {source.id for source in card.sources}
        names = {card.name} | {i.rpartition("/")[2] for i in ids}
        if hub_id in ids or names & folders:
            yield card
