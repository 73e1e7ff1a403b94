"""prepare: what is encoded, what is kept, what happens when things go wrong."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from data_builders import (
    Build,
    build_in,
    fake_generator,
    image_bytes,
    item,
    list_source,
    pair,
    ranking,
    text_of,
)
from rich.console import Console

from t2i_align.contract import Media
from t2i_align.data.manifest import ManifestRow
from t2i_align.data.media import content_hash
from t2i_align.data.prepare import Prepared
from t2i_align.data.records import Item, Record


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return build_in(tmp_path)


def batch(prepared: Prepared, index: int, **changes: Any) -> Any:
    options = {"run_seed": 0, "coupling": "time+noise", "empty_prompts": 0.0} | changes
    return prepared.batch([(index, 0)], **options)


def latent_of(seed: int) -> torch.Tensor:
    """What the fake encoder makes of image ``seed``, computed apart from the cache."""
    generator = fake_generator()
    media = Media("image", image_bytes(seed))
    media = replace(media, meta={"key": content_hash(media)})
    return generator.encode_media([generator.load_media(media, "")])[0].state["x0"]


def test_a_batch_holds_what_the_encoders_gave(build: Build) -> None:
    made = build([pair(0), pair(1)], fake_generator())
    assert len(made) == 2 and [made.ids(i) for i in range(2)] == ["r0", "r1"]
    both = made.batch([(1, 0), (0, 0)], run_seed=0, coupling="none", empty_prompts=0.0)
    expected = torch.stack([latent_of(seed) for seed in (2, 0, 3, 1)])  # winners, then losers
    assert torch.equal(both.sample.state["x0"], expected)
    texts = torch.stack([text_of(p) for p in ("prompt 1", "prompt 0") * 2])
    assert torch.equal(both.sample.cond["text"], texts)
    assert both.chosen.tolist() == [0, 1] and both.rejected.tolist() == [2, 3]
    assert both.record_ids == ("r1", "r0")
    assert [m["prompt"] for m in both.sample.meta] == ["prompt 1", "prompt 0"] * 2
    assert [m["record_id"] for m in both.sample.meta] == ["r1", "r0"] * 2
    assert all("crop_top_left" in m for m in both.sample.meta)


def test_media_and_prompts_are_encoded_once(build: Build, tmp_path: Path) -> None:
    """Four pairs over three images and two prompts, plus the empty prompt."""
    images = [item(seed, "") for seed in range(3)]
    records = [
        Record(f"r{k}", "pair", (replace(images[a], prompt=p), replace(images[b], prompt=p)))
        for k, (a, b, p) in enumerate([(0, 1, "x"), (0, 2, "x"), (1, 2, "y"), (2, 0, "y")])
    ]
    generator = fake_generator()
    made = build(records, generator)
    assert generator.loads == 3 and sum(generator.batches) == 3
    assert sorted(generator.prompts) == ["", "x", "y"]
    assert (len(made.media), len(made.text)) == (3, 3)
    assert (made.report.encoded_media, made.report.encoded_prompts) == (3, 3)
    assert len(made) == 4


def test_encoder_batches_are_full(build: Build) -> None:
    generator = fake_generator()
    build([pair(k) for k in range(5)], generator, cache={"encode_batch_size": 4})
    assert generator.batches == [4, 4, 2]


def test_a_second_run_reads_and_encodes_nothing(build: Build) -> None:
    records = [pair(k) for k in range(3)]
    first = build(records, fake_generator())
    generator = fake_generator()
    untouchable = list_source(records, fail_at=0, error=AssertionError("source was read"))
    second = build(untouchable, generator)
    assert generator.loads == 0 and generator.batches == [] and generator.prompts == []
    assert second.report == replace(first.report, encoded_media=0, encoded_prompts=0)
    assert torch.equal(batch(first, 1).sample.state["x0"], batch(second, 1).sample.state["x0"])


def test_a_new_extra_prompt_is_encoded_without_reading_the_source(build: Build) -> None:
    build([pair(0)], fake_generator())
    generator = fake_generator()
    untouchable = list_source([pair(0)], fail_at=0, error=AssertionError("source was read"))
    build(untouchable, generator, extra_prompts=("", "blurry"))
    assert generator.prompts == ["blurry"] and generator.loads == 0


def test_another_layout_or_source_reuses_the_cache(build: Build) -> None:
    records = [pair(k) for k in range(3)]
    build(records, fake_generator())
    for layout, length in (("winners", 3), ("items", 6), ("groups", 3)):
        generator = fake_generator()
        assert len(build(records, generator, layout)) == length
        assert generator.loads == 0 and generator.prompts == []
    generator = fake_generator()
    build(list_source([pair(2), pair(3)], name="other"), generator)
    assert generator.loads == 2 and generator.prompts == ["prompt 3"]


def test_another_encoder_or_precision_does_not(build: Build) -> None:
    build([pair(0)], fake_generator())
    for generator, cache in (
        (fake_generator(version=2), {}),
        (fake_generator(), {"dtype": "bfloat16"}),
    ):
        build([pair(0)], generator, cache=cache)
        assert generator.loads == 2


def test_precision_of_the_cache(build: Build) -> None:
    made = build([pair(0)], fake_generator(), cache={"dtype": "bfloat16"})
    x0 = batch(made, 0).sample.state["x0"]
    assert x0.dtype == torch.bfloat16 and torch.equal(x0[0], latent_of(0).bfloat16())


def test_an_interrupted_build_goes_on_where_it_stopped(build: Build, tmp_path: Path) -> None:
    records = [pair(k) for k in range(6)]
    first = fake_generator()
    with pytest.raises(KeyboardInterrupt):
        build(list_source(records, fail_at=4), first)
    assert sum(first.batches) == 8
    assert list((tmp_path / "cache" / "v1" / "manifests").iterdir()) == []
    second = fake_generator()
    made = build(records, second)
    assert sum(second.batches) == second.loads == 4 and len(made) == 6
    assert first.prompts and not set(first.prompts) & set(second.prompts)
    assert made.report.usable == 6


KILL = """
import functools, os, signal, sys
from data_builders import CacheSettings, fake_generator, list_source, pair
from t2i_align.data import prepare as module

class Records(list):
    def __iter__(self):
        yield from (pair(k) for k in range(5))
        os.kill(os.getpid(), signal.SIGKILL)

module.TensorStore = functools.partial(module.TensorStore, flush_bytes=600)
source = list_source(Records())
module.prepare(source, fake_generator(), "pairs", CacheSettings(sys.argv[1]))
"""


def test_a_killed_build_goes_on_from_its_last_shard(build: Build, tmp_path: Path) -> None:
    """SIGKILL in the middle: what was flushed, in shards of three media here, is not encoded again.

    Ten media were loaded, eight encoded in two batches of four, six of them flushed.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", KILL, str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    second = fake_generator()
    made = build([pair(k) for k in range(6)], second)
    assert second.loads == sum(second.batches) == 12 - 6
    assert len(made) == 6
    assert torch.equal(batch(made, 0).sample.state["x0"], torch.stack([latent_of(0), latent_of(1)]))


def test_a_lost_shard_is_rebuilt(build: Build, tmp_path: Path) -> None:
    records = [pair(k) for k in range(2)]
    before = build(records, fake_generator())
    expected = batch(before, 1).sample.state["x0"].clone()
    (shard,) = (tmp_path / "cache" / "v1").glob("media-*/shard-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    generator = fake_generator()
    after = build(records, generator)
    assert generator.loads == 4 and generator.prompts == []
    assert torch.equal(batch(after, 1).sample.state["x0"], expected)


def test_a_torn_manifest_is_rebuilt_without_encoding(build: Build, tmp_path: Path) -> None:
    records = [pair(k) for k in range(2)]
    build(records, fake_generator())
    (path,) = (tmp_path / "cache" / "v1" / "manifests").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:50])
    generator = fake_generator()
    assert len(build(records, generator)) == 2
    assert generator.loads == 0


def test_codes_keep_their_type_and_group_by_shape(build: Build) -> None:
    codes = [torch.arange(3), torch.arange(4), torch.arange(3) + 5, torch.arange(4) + 5]
    items = [Item(Media("codes", c), "say") for c in codes]
    records = [Record("a", "pair", (items[0], items[2])), Record("b", "pair", (items[1], items[3]))]
    generator = fake_generator()
    made = build(records, generator, cache={"dtype": "float16"})
    assert generator.batches == [2, 2], "equal shapes are encoded together"
    assert batch(made, 0).sample.state["codes"].tolist() == [[0, 1, 2], [5, 6, 7]]
    assert batch(made, 1).sample.state["codes"].dtype == torch.int64


def test_progress_shows_rate_and_time_left(build: Build) -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    build([pair(k) for k in range(3)], fake_generator(), console=console)
    assert "3/3" in screen.getvalue() and "records/s" in screen.getvalue()
    silent = StringIO()
    build(list_source([pair(9)], name="n"), fake_generator(), console=Console(file=silent))
    assert silent.getvalue() == ""


def test_manifest_rows_survive_the_disk(build: Build) -> None:
    record = replace(ranking([1, 0]), weight=0.25)
    first = replace(record.items[0], value=0.5)
    record = replace(record, items=(first, record.items[1]))
    row = build([record], fake_generator(), "groups").manifest[0]
    assert isinstance(row, ManifestRow)
    assert (row.id, row.prompts, row.ranks) == ("g", ["ranked", "ranked"], [1, 0])
    assert (row.values, row.labels, row.weight) == ([0.5, None], [None, None], 0.25)
    assert len(set(row.keys)) == 2 and len(set(row.prompt_keys)) == 1
