"""What of a batch is random, and that it depends on (run seed, record, draw) only."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data_builders import (
    CacheSettings,
    fake_generator,
    image_bytes,
    item,
    list_source,
    pair,
    ranking,
    text_of,
)

from t2i_align.contract import Coupling, Layout
from t2i_align.data.batch import Batch, item_seeds
from t2i_align.data.order import data_order, picks
from t2i_align.data.prepare import Prepared, prepare
from t2i_align.data.records import Record
from t2i_align.errors import DataError
from t2i_align.process.seeds import derive

NUM = 6


def prepared(
    folder: Path, records: list[Record], layout: Layout = "pairs", **options: Any
) -> Prepared:
    variants = options.pop("variants", ("",))
    settings = CacheSettings(str(folder / "cache"))
    generator = fake_generator(variants=variants)
    return prepare(list_source(records), generator, layout, settings, **options)


@pytest.fixture
def pairs(tmp_path: Path) -> Prepared:
    return prepared(tmp_path, [pair(k) for k in range(NUM)], variants=("", "flip"))


def draw(data: Prepared, chosen: list[tuple[int, int]], **changes: Any) -> Batch:
    options = {"run_seed": 3, "coupling": "time+noise", "empty_prompts": 0.5} | changes
    return data.batch(chosen, **options)


def facts(batch: Batch) -> dict[str, list[Any]]:
    """Everything about each record of a batch of pairs."""
    items = zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)
    columns = [
        batch.sample.state["x0"],
        batch.sample.cond["text"],
        batch.seeds.time,
        batch.seeds.noise,
    ]
    return {
        name: [[c[i].tolist() for c in columns] for i in pair_items]
        for name, pair_items in zip(batch.record_ids, items, strict=True)
    }


@pytest.mark.parametrize("coupling", ["none", "time", "time+noise"])
def test_a_record_does_not_depend_on_its_batch(pairs: Prepared, coupling: Coupling) -> None:
    alone = {}
    for index in range(NUM):
        alone |= facts(draw(pairs, [(index, 4)], coupling=coupling))
    shuffled = [(index, 4) for index in (3, 0, 5, 1, 4, 2)]
    assert facts(draw(pairs, shuffled, coupling=coupling)) == alone
    assert facts(draw(pairs, shuffled[:2], coupling=coupling)).items() <= alone.items()


def test_draws_and_run_seeds_differ(pairs: Prepared) -> None:
    seen = {
        (int(b.seeds.time[0]), int(b.seeds.noise[0]))
        for b in (
            draw(pairs, [(0, 0)]),
            draw(pairs, [(0, 1)]),
            draw(pairs, [(1, 0)]),
            draw(pairs, [(0, 0)], run_seed=4),
        )
    }
    assert len(seen) == 4 and all(time != noise for time, noise in seen)


@pytest.mark.parametrize(
    ("coupling", "same_time", "same_noise"),
    [("none", False, False), ("time", True, False), ("time+noise", True, True)],
)
def test_coupling_says_what_winner_and_loser_share(
    pairs: Prepared, coupling: Coupling, same_time: bool, same_noise: bool
) -> None:
    batch = draw(pairs, [(0, 0), (1, 0)], coupling=coupling)
    time, noise = batch.seeds.time, batch.seeds.noise
    assert torch.equal(time[batch.chosen], time[batch.rejected]) is same_time
    assert torch.equal(noise[batch.chosen], noise[batch.rejected]) is same_noise
    assert len(set(time.tolist())) == (2 if same_time else 4)


def test_seeds_are_the_documented_function() -> None:
    seeds = item_seeds(7, [("r", 2, 0), ("r", 2, 1)], "time")
    assert seeds.time.tolist() == [derive(7, "r", 2, "time")] * 2
    assert seeds.noise.tolist() == [derive(7, "r", 2, f"noise/{k}") for k in range(2)]


def test_flip_is_joint_and_fair(pairs: Prepared) -> None:
    """Both items of a pair mirror together; over many draws half are mirrored."""
    plain = {}
    for index in range(NUM):
        row = pairs.manifest[index]
        plain[row.id] = [pairs.media.get(key)["x0"] for key in row.keys]
    flips = Counter()
    for number in range(100):
        batch = draw(pairs, [(k, number) for k in range(NUM)])
        x0 = batch.sample.state["x0"]
        for k, name in enumerate(batch.record_ids):
            sides = [x0[batch.chosen[k]], x0[batch.rejected[k]]]
            mirrored = [
                torch.equal(side, base.flip(-1))
                for side, base in zip(sides, plain[name], strict=True)
            ]
            assert mirrored[0] == mirrored[1]
            if not mirrored[0]:
                assert torch.equal(sides[0], plain[name][0])
            flips[mirrored[0]] += 1
    assert abs(flips[True] / 600 - 0.5) < 0.08  # four standard deviations


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_caption_dropout_is_joint_and_has_its_rate(pairs: Prepared, share: float) -> None:
    dropped = 0
    for number in range(100):
        batch = draw(pairs, [(k, number) for k in range(NUM)], empty_prompts=share)
        text = batch.sample.cond["text"]
        assert torch.equal(text[batch.chosen], text[batch.rejected])
        empty = (text[batch.chosen] == text_of("")).all(1)
        dropped += int(empty.sum())
    assert abs(dropped / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5 + 1e-9


def test_dropout_keeps_the_prompt_for_the_log(pairs: Prepared) -> None:
    batch = draw(pairs, [(2, 0)], empty_prompts=1.0)
    assert [m["prompt"] for m in batch.sample.meta] == ["prompt 2", "prompt 2"]


def test_dropout_without_the_empty_prompt_says_so(tmp_path: Path) -> None:
    data = prepared(tmp_path, [pair(0)], extra_prompts=())
    with pytest.raises(DataError, match="caption dropout needs the empty prompt"):
        draw(data, [(0, 0)], empty_prompts=1.0)


def test_pairs_carry_preference_and_weight(tmp_path: Path) -> None:
    records = [pair(0), pair(1, preference=0.5, weight=2.0)]
    batch = draw(prepared(tmp_path, records), [(1, 0), (0, 0)])
    assert batch.preference.tolist() == [0.5, 1.0]
    assert batch.weight is not None and batch.weight.tolist() == [2.0, 1.0]
    assert batch.labels is batch.groups is batch.ranks is batch.values is None
    assert draw(prepared(tmp_path / "b", [pair(0)]), [(0, 0)]).weight is None


def test_items_carry_labels_and_values(tmp_path: Path) -> None:
    records = [
        Record("a", "binary", (item(0, label=1, value=0.25),)),
        Record("b", "binary", (item(1, label=-1),)),
    ]
    batch = draw(prepared(tmp_path, records, "items"), [(1, 0), (0, 0)])
    assert batch.labels is not None and batch.labels.tolist() == [-1, 1]
    assert batch.values is not None
    assert batch.values[0].isnan() and batch.values[1].item() == 0.25
    assert batch.chosen.numel() == batch.rejected.numel() == batch.preference.numel() == 0
    assert batch.record_ids == ("b", "a")


def test_groups_carry_record_numbers_and_ranks(tmp_path: Path) -> None:
    records = [ranking([1, 0, 2], "g0"), ranking([0, 1], "g1", seed=5)]
    batch = draw(prepared(tmp_path, records, "groups"), [(1, 0), (0, 0)], coupling="time")
    assert batch.groups is not None and batch.groups.tolist() == [0, 0, 1, 1, 1]
    assert batch.ranks is not None and batch.ranks.tolist() == [0, 1, 1, 0, 2]
    assert batch.record_ids == ("g1", "g0")
    assert len(set(batch.seeds.time.tolist())) == 2 and len(set(batch.seeds.noise.tolist())) == 5


def test_orders_are_permutations_that_differ_by_epoch_and_seed() -> None:
    orders = [data_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert data_order(50, 0, 0).tolist() == orders[0]


def test_picks_run_through_the_epochs() -> None:
    stream = picks(0, 25, 10, seed=5)
    assert [epoch for _, epoch in stream] == [0] * 10 + [1] * 10 + [2] * 5
    assert [index for index, _ in stream[10:20]] == data_order(10, 5, 1).tolist()


def test_the_image_bytes_of_the_builders_are_distinct() -> None:
    assert len({image_bytes(k) for k in range(20)}) == 20
