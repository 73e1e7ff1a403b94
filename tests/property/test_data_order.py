"""Resume and sharding are slices of one stream."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2i_align.data.order import BucketOrder, Picks, picks

SHAPES = [(64, 64), (48, 80), (80, 48), (56, 72)]
ASSIGNED = st.lists(st.integers(0, 3), min_size=1, max_size=30)
BATCH = st.integers(1, 6)
SEED = st.integers(0, 2**31)


def bucketed(assigned: list[int], batch: int, seed: int) -> BucketOrder:
    return BucketOrder(torch.tensor([SHAPES[k] for k in assigned]), batch, seed)


def literal(assigned: list[int], batch: int, seed: int, passes: int) -> list[Picks]:
    """Micro-batches of the first passes: the plain stream, one queue a bucket."""
    queues: dict[int, Picks] = {}
    made = []
    for pick in picks(0, passes * len(assigned), len(assigned), seed):
        queue = queues.setdefault(assigned[pick[0]], [])
        queue.append(pick)
        if len(queue) == batch:
            made.append(list(queue))
            queue.clear()
    return made


def taken(order: BucketOrder, first: int, count: int) -> list[Picks]:
    """Micro-batches ``first`` to ``first + count``."""
    return [order(m * order.batch, order.batch) for m in range(first, first + count)]


@given(
    num_records=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 200),
    cut=st.integers(0, 30),
    rest=st.integers(0, 30),
)
def test_any_cut_of_the_stream_joins_up(
    num_records: int, seed: int, start: int, cut: int, rest: int
) -> None:
    """picks(s, a + b) == picks(s, a) + picks(s + a, b): stopping anywhere changes nothing."""
    whole = picks(start, cut + rest, num_records, seed)
    parts = picks(start, cut, num_records, seed) + picks(start + cut, rest, num_records, seed)
    assert whole == parts


@given(num_records=st.integers(1, 40), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_every_epoch_sees_every_record_once(num_records: int, seed: int, epoch: int) -> None:
    seen = picks(epoch * num_records, num_records, num_records, seed)
    assert sorted(seen) == [(index, epoch) for index in range(num_records)]


@given(assigned=ASSIGNED, batch=BATCH, seed=SEED, passes=st.integers(1, 7))
def test_bucketed_order_is_the_plain_stream_sorted_into_queues(
    assigned: list[int], batch: int, seed: int, passes: int
) -> None:
    """Found from the count alone, it is what a walk with queues from the very start gives."""
    expected = literal(assigned, batch, seed, passes)
    assert taken(bucketed(assigned, batch, seed), 0, len(expected)) == expected


@given(assigned=ASSIGNED, batch=BATCH, seed=SEED, cut=st.integers(0, 20), rest=st.integers(0, 20))
def test_bucketed_order_resumes_at_any_count(
    assigned: list[int], batch: int, seed: int, cut: int, rest: int
) -> None:
    whole = taken(bucketed(assigned, batch, seed), 0, cut + rest)
    assert taken(bucketed(assigned, batch, seed), cut, rest) == whole[cut:]


@given(assigned=ASSIGNED, batch=BATCH, seed=SEED)
def test_a_micro_batch_holds_one_bucket(assigned: list[int], batch: int, seed: int) -> None:
    for found in taken(bucketed(assigned, batch, seed), 0, 12):
        assert len(found) == batch == len(set(found))
        assert len({assigned[record] for record, _ in found}) == 1


@given(assigned=ASSIGNED, batch=BATCH, seed=SEED, passes=st.integers(1, 8))
def test_after_whole_passes_only_a_buckets_leftovers_are_behind(
    assigned: list[int], batch: int, seed: int, passes: int
) -> None:
    """Nobody was seen more than once a pass, draws count up from 0, and of bucket k exactly
    e n_k mod b visits are missing, at most ceil((b - 1) / n_k) of one record.
    """
    sizes = Counter(assigned)
    num = sum(passes * size // batch for size in sizes.values())
    seen = [pick for found in taken(bucketed(assigned, batch, seed), 0, num) for pick in found]
    visits = Counter(record for record, _ in seen)
    for bucket, size in sizes.items():
        own = [visits[record] for record, k in enumerate(assigned) if k == bucket]
        assert sum(passes - n for n in own) == passes * size % batch
        assert all(0 <= passes - n <= -(-(batch - 1) // size) for n in own)
    for record, count in visits.items():
        assert sorted(draw for r, draw in seen if r == record) == list(range(count))


@given(num=st.integers(1, 30), batch=BATCH, seed=SEED, first=st.integers(0, 20))
def test_one_bucket_alone_is_the_plain_order(num: int, batch: int, seed: int, first: int) -> None:
    order = bucketed([0] * num, batch, seed)
    assert order(first * batch, batch) == picks(first * batch, batch, num, seed)


@given(assigned=ASSIGNED, batch=BATCH, seed=SEED, step=st.integers(0, 5))
def test_processes_share_a_step_whatever_their_number(
    assigned: list[int], batch: int, seed: int, step: int
) -> None:
    """Eight micro-batches a step on 1, 2 and 4 processes, each taking positions as the feed does:
    process r starts at ``r b`` and goes on by ``b`` times the number of processes.
    """
    start, sets = step * 8 * batch, []
    for processes in (1, 2, 4):
        micro = batch * processes
        found = [
            bucketed(assigned, batch, seed)(start + rank * batch + k * micro, batch)
            for rank in range(processes)
            for k in range(8 // processes)
        ]
        sets.append(Counter(tuple(x) for x in found))
    assert sets[0] == sets[1] == sets[2]


def test_other_seeds_and_passes_are_other_orders() -> None:
    assigned = [k % 3 for k in range(30)]
    one = taken(bucketed(assigned, 5, 0), 0, 6)
    assert one != taken(bucketed(assigned, 5, 1), 0, 6)
    records = [[[r for r, _ in found] for found in part] for part in (one, _second(assigned))]
    assert records[0] != records[1]


def _second(assigned: list[int]) -> list[Picks]:
    return taken(bucketed(assigned, 5, 0), 6, 6)


def test_small_buckets_are_counted_and_wait() -> None:
    """One record alone, batch 3: its micro-batch comes after three passes, with three draws."""
    order = bucketed([0, 0, 0, 1], 3, 0)
    assert order.waiting() == 1
    assert [sorted(found) for found in taken(order, 2, 2)] in (
        [[(k, 2) for k in range(3)], [(3, 0), (3, 1), (3, 2)]],
        [[(3, 0), (3, 1), (3, 2)], [(k, 2) for k in range(3)]],
    )


def test_positions_that_cut_a_micro_batch_are_refused() -> None:
    order = bucketed([0] * 8, 4, 0)
    for start, count in ((2, 4), (0, 2)):
        with pytest.raises(ValueError, match="micro-batches of 4 records"):
            order(start, count)


def test_a_late_position_among_many_records_is_found_at_once() -> None:
    """200,000 records in 9 buckets, position in pass 40: one pass is walked, not forty."""
    num = 200_000
    assigned = torch.arange(num) % 9
    order = BucketOrder(torch.stack([assigned, assigned], 1), 8, 0)
    found = order(num * 40, 8)
    assert {epoch for _, epoch in found} <= {39, 40}
    assert order._pass.cache_info().misses <= 2
