"""The table of layouts in t2i_align/data/records.py, cell by cell."""

from dataclasses import replace

import pytest
from data_builders import item, pair, ranking

from t2i_align.contract import Layout
from t2i_align.data.records import Record, as_layout, dense_ranks
from t2i_align.errors import DataError


def ids(records: list[Record]) -> list[str]:
    return [record.id for record in records]


def test_a_pair_is_a_pair() -> None:
    record = pair(0)
    assert as_layout(record, "pairs") == [record]


def test_winners_of_a_pair_and_of_a_kept_tie() -> None:
    record = pair(0)
    assert [r.items[0].media for r in as_layout(record, "winners")] == [record.items[0].media]
    tie = replace(record, preference=0.5)
    assert ids(as_layout(tie, "winners")) == ["r0#0", "r0#1"]


def test_items_of_a_pair_are_good_and_bad_and_a_tie_gives_none() -> None:
    good, bad = as_layout(pair(0), "items")
    assert (good.items[0].label, bad.items[0].label) == (1, -1)
    assert (good.layout, good.id, bad.id) == ("binary", "r0#0", "r0#1")
    assert as_layout(replace(pair(0), preference=0.5), "items") == []


def test_a_pair_is_a_group_of_two() -> None:
    assert as_layout(pair(0), "groups")[0].ranks == (0, 1)
    assert as_layout(replace(pair(0), preference=0.5), "groups")[0].ranks == (0, 0)


def test_pairings_of_a_ranking() -> None:
    record = ranking([2, 0, 3, 1])
    assert ids(as_layout(record, "pairs", "best_worst")) == ["g#1-2"]
    assert ids(as_layout(record, "pairs", "adjacent")) == ["g#1-3", "g#3-0", "g#0-2"]
    all_pairs = as_layout(record, "pairs", "all")
    assert len(all_pairs) == 6
    for made in all_pairs:
        better, worse = map(int, made.id.partition("#")[2].split("-"))
        assert record.ranks is not None and record.ranks[better] < record.ranks[worse]
        assert made.items == (record.items[better], record.items[worse])


def test_equal_ranks_make_no_pair() -> None:
    assert ids(as_layout(ranking([0, 0, 1]), "pairs", "all")) == ["g#0-2", "g#1-2"]
    assert ids(as_layout(ranking([0, 0, 1]), "pairs", "adjacent")) == ["g#1-2"]
    for layout in ("pairs", "winners", "items"):
        assert as_layout(ranking([0, 0, 0]), layout) == []


def test_winners_and_items_of_a_ranking() -> None:
    record = ranking([1, 0, 2, 0])
    assert ids(as_layout(record, "winners")) == ["g#1", "g#3"]
    labelled = {r.id: r.items[0].label for r in as_layout(record, "items")}
    assert labelled == {"g#1": 1, "g#3": 1, "g#2": -1}
    assert as_layout(record, "groups") == [record]


def test_binary_records_serve_items_and_winners() -> None:
    good = Record("b", "binary", (item(0, label=1),))
    bad = Record("c", "binary", (item(1, label=-1),))
    assert as_layout(good, "items") == [good]
    assert as_layout(good, "winners") == [good]
    assert as_layout(bad, "winners") == []


@pytest.mark.parametrize("layout", ["pairs", "groups"])
def test_the_impossible_says_what_is_possible(layout: Layout) -> None:
    record = Record("b7", "binary", (item(0, label=1),))
    with pytest.raises(DataError) as caught:
        as_layout(record, layout)
    assert str(caught.value) == (
        f"record 'b7' is binary, but the objective needs {layout}\n"
        "  fix: binary records serve winners, items: choose an objective of such a layout, "
        "or a source of pairs or rankings"
    )


def test_weight_survives_every_layout() -> None:
    layouts: tuple[Layout, ...] = ("pairs", "winners", "items", "groups")
    for record in (replace(pair(0), weight=2.5), replace(ranking([0, 1, 2]), weight=2.5)):
        for layout in layouts:
            assert {r.weight for r in as_layout(record, layout, "all")} == {2.5}


def test_dense_ranks_start_at_zero_and_share_ties() -> None:
    assert dense_ranks([3, 1, 1, 7]) == (1, 0, 0, 2)
    assert dense_ranks([-1.0, 0.0]) == (0, 1)
