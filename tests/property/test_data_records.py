"""Laws of the layout conversions, for any ranking."""

from hypothesis import given
from hypothesis import strategies as st

from t2i_align.contract import Media
from t2i_align.data.options import Pairing
from t2i_align.data.records import Item, Record, as_layout, dense_ranks

RANKS = st.lists(st.integers(0, 5), min_size=2, max_size=9)
PAIRINGS: st.SearchStrategy[Pairing] = st.sampled_from(["best_worst", "adjacent", "all"])


def ranked(keys: list[int]) -> Record:
    items = tuple(Item(Media("image", bytes([k])), "p") for k in range(len(keys)))
    return Record("r", "ranked", items, ranks=dense_ranks(keys))


def rank_of(record: Record, item: Item) -> int:
    assert record.ranks is not None
    return record.ranks[record.items.index(item)]


@given(RANKS, PAIRINGS)
def test_a_pair_is_always_won_by_the_better(keys: list[int], pairing: Pairing) -> None:
    record = ranked(keys)
    for made in as_layout(record, "pairs", pairing):
        winner, loser = made.items
        assert rank_of(record, winner) < rank_of(record, loser)


@given(RANKS, PAIRINGS)
def test_ids_are_distinct_and_name_the_items(keys: list[int], pairing: Pairing) -> None:
    record = ranked(keys)
    made = as_layout(record, "pairs", pairing)
    assert len({m.id for m in made}) == len(made)
    for m in made:
        places = [int(place) for place in m.id.partition("#")[2].split("-")]
        assert tuple(record.items[place] for place in places) == m.items


@given(RANKS)
def test_pairings_are_nested(keys: list[int]) -> None:
    record = ranked(keys)
    every = {m.id for m in as_layout(record, "pairs", "all")}
    assert {m.id for m in as_layout(record, "pairs", "adjacent")} <= every
    assert {m.id for m in as_layout(record, "pairs", "best_worst")} <= every
    strict = sum(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert len(every) == strict


@given(RANKS)
def test_reversing_a_ranking_swaps_every_pair_and_label(keys: list[int]) -> None:
    forward, backward = ranked(keys), ranked([-key for key in keys])
    swapped = [tuple(reversed(m.items)) for m in as_layout(backward, "pairs", "all")]
    made = [m.items for m in as_layout(forward, "pairs", "all")]
    assert len(made) == len(swapped) and all(items in swapped for items in made)
    good = {(r.id, r.items[0].label) for r in as_layout(forward, "items")}
    assert good == {(r.id, -(r.items[0].label or 0)) for r in as_layout(backward, "items")}


@given(st.lists(st.integers(-1000, 1000), min_size=1))
def test_dense_ranks_keep_the_order_and_leave_no_gap(keys: list[int]) -> None:
    ranks = dense_ranks(keys)
    assert set(ranks) == set(range(len(set(keys))))
    for i, a in enumerate(keys):
        for j, b in enumerate(keys):
            assert (a < b) == (ranks[i] < ranks[j])
