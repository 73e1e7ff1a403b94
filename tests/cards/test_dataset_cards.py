"""Cards are true: they parse, point at code that exists, and their README says what they say."""

from __future__ import annotations

import pytest

from t2i_align.catalog import KINDS, Card, cards, find_root, with_table
from t2i_align.data import SOURCES
from t2i_align.registry import resolve

DATASETS = cards("datasets")


def test_the_data_sets_recipes_speak_of_have_cards() -> None:
    names = [card.name for card in DATASETS]
    assert names == ["hpdv2", "hpdv3", "imagerewarddb", "pickapic_v1", "pickapic_v2", "scenes"]


@pytest.mark.parametrize("kind", KINDS)
def test_readmes_are_written_from_the_cards(kind: str) -> None:
    """If this fails: python -m t2i_align.catalog --write-readmes."""
    text = (find_root() / kind / "README.md").read_text()
    assert with_table(text, cards(kind)) == text


@pytest.mark.parametrize("card", DATASETS, ids=lambda c: c.name)
def test_a_data_card_points_at_a_source_that_reads_it(card: Card) -> None:
    """The ``recipe`` of a card is a valid ``data`` section of the source that implements it."""
    section = card.details["recipe"]
    path = SOURCES[section["type"]]
    assert card.implementation == path
    options = resolve(path).Options.model_validate(section)
    assert options.type == section["type"]


@pytest.mark.parametrize("card", DATASETS, ids=lambda c: c.name)
def test_history_and_citation(card: Card) -> None:
    versions = [change.version for change in card.changelog]
    assert versions == list(range(card.version, 0, -1))
    assert card.citation.startswith("@")
    assert card.citation.count("{") == card.citation.count("}")
    assert all(s.revision is None or len(s.revision) == 40 for s in card.sources)
