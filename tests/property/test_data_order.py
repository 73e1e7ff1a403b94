"""Resume and sharding are slices of one stream."""

from hypothesis import given
from hypothesis import strategies as st

from t2i_align.data.order import picks


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
