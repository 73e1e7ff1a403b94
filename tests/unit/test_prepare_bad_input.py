"""prepare on broken media, useless records, bad numbers and a full disk."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from data_builders import (
    Build,
    build_in,
    fake_generator,
    image_bytes,
    item,
    list_source,
    pair,
    pickapic_row,
    ranking,
    source,
    write_parquet,
)

from t2i_align.contract import Media
from t2i_align.data.records import Item, Record
from t2i_align.errors import DataError, ModelError, StorageError


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return build_in(tmp_path)


def shard_names(tmp_path: Path) -> set[str]:
    return {p.name for p in (tmp_path / "cache").rglob("shard-*")}


def test_broken_media_are_skipped_counted_and_named(build: Build, tmp_path: Path) -> None:
    good = pair(0)
    broken = [
        replace(
            pair(1), items=(item(2), Item(Media("image", image_bytes(3, (64, 64))[:900]), "p"))
        ),
        replace(pair(2), items=(Item(Media("image", b"no image"), "p"), item(5))),
        replace(pair(3), items=(item(6), Item(Media("image", tmp_path / "gone.png"), "p"))),
        replace(pair(4), items=(item(8), Item(Media("image", b""), "p"))),
    ]
    generator = fake_generator()
    made = build([good, *broken], generator)
    assert len(made) == made.report.usable == 1 and made.report.num_skipped == 4
    assert sum(generator.batches) == 2, "the whole half of a broken pair is not encoded"
    assert dict(made.report.skipped) == {
        "r1": made.report.skipped[0][1],
        "r2": "not an image (starts with b'no image')",
        "r3": f"missing file {tmp_path / 'gone.png'}",
        "r4": "empty file (0 bytes)",
    }
    assert "image file is truncated" in made.report.skipped[0][1]
    assert "p" not in generator.prompts


def test_only_the_media_of_chosen_pairs_are_read(build: Build, tmp_path: Path) -> None:
    """best_worst of a ranking never opens the middle image, which is missing."""
    record = ranking([0, 1, 2])
    items = list(record.items)
    items[1] = Item(Media("image", tmp_path / "gone.png"), "ranked")
    record = replace(record, items=tuple(items))
    made = build([record], fake_generator(), pairing="best_worst")
    assert (made.report.usable, made.report.num_skipped) == (1, 0)
    made = build([record], fake_generator(), pairing="all")
    assert [n for n, _ in made.report.skipped] == ["g#0-1", "g#1-2"] and len(made) == 1


def test_pairs_of_a_ranking_decode_each_image_once(build: Build) -> None:
    generator = fake_generator()
    assert len(build([ranking([3, 2, 1, 0])], generator, pairing="all")) == 6
    assert generator.loads == 4


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            [pickapic_row(k, 0.5) for k in range(3)],
            "0 usable pairs of 3 records: 3 ties dropped (data.ties: drop)\n"
            "  fix: set data.ties: keep (or first), or use data with preferences",
        ),
        (
            [pickapic_row(0, 0.5), pickapic_row(1, jpg_0=b"x"), pickapic_row(2, jpg_0=b"x")],
            "0 usable pairs of 3 records: 2 broken or missing, 1 ties dropped (data.ties: drop)\n"
            "    1: not an image (starts with b'x')\n"
            "    2: not an image (starts with b'x')\n"
            "  fix: are the media where the paths point, and whole?",
        ),
        (
            [pickapic_row(0, None)],
            "0 usable pairs of 1 records: 1 without a label\n  fix: use a split that has labels",
        ),
    ],
)
def test_nothing_usable_says_where_the_records_went(
    build: Build, tmp_path: Path, rows: list[dict[str, Any]], text: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError) as caught:
        build(source("pickapic", path=str(path)), fake_generator())
    assert str(caught.value) == text
    assert list((tmp_path / "cache" / "v1" / "manifests").iterdir()) == []


def test_rankings_of_equals_have_no_preference(build: Build) -> None:
    with pytest.raises(DataError) as caught:
        build([ranking([0, 0])], fake_generator())
    assert str(caught.value) == (
        "0 usable pairs of 1 records: 1 without a preference\n  fix: use data with preferences"
    )


def test_report_joins_the_counts_of_source_and_cache(build: Build, tmp_path: Path) -> None:
    rows = [
        pickapic_row(0),
        pickapic_row(1, 0.5),
        pickapic_row(2, has_label=False),
        pickapic_row(3, jpg_1=b"broken"),
        pickapic_row(4, jpg_0=None),
    ]
    made = build(
        source("pickapic", path=str(write_parquet(tmp_path / "a.parquet", rows))), fake_generator()
    )
    report = made.report.to_dict()
    assert {k: report[k] for k in ("read", "usable", "ties", "no_label", "num_skipped")} == {
        "read": 5,
        "usable": 1,
        "ties": 1,
        "no_label": 1,
        "num_skipped": 2,
    }
    assert [name for name, _ in report["skipped"]] == ["a.parquet:4", "3"]


def test_labels_that_a_layout_cannot_use_are_counted(build: Build) -> None:
    records = [
        Record(f"b{k}", "binary", (item(k, label=label),)) for k, label in enumerate([1, -1])
    ]
    assert build(records, fake_generator(), "winners").report.unused == 1
    with pytest.raises(DataError, match="0 usable winners of 1 records: 1 of no use for winners"):
        build(list_source(records[1:], name="bad"), fake_generator(), "winners")


def test_an_impossible_layout_is_told_at_once(build: Build) -> None:
    generator = fake_generator()
    with pytest.raises(DataError, match="is binary, but the objective needs pairs"):
        build([Record("b", "binary", (item(0, label=1),))], generator)
    assert generator.loads == 0


@pytest.mark.parametrize("poison", [float("nan"), 1e6])
def test_numbers_that_cannot_be_cached_name_record_and_fix(build: Build, poison: float) -> None:
    with pytest.raises(ModelError) as caught:
        build([pair(7)], fake_generator(poison=poison), cache={"dtype": "float16"})
    text = str(caught.value)
    assert text.startswith("record 'r7': ")
    if poison == 1e6:
        assert (
            "x0 reaches 1e+06, float16 ends at 6.55e+04" in text and "cache.dtype: float32" in text
        )
    else:
        assert text.endswith(
            "non-finite x0 from the frozen encoder\n  fix: non-finite latents: the SDXL VAE "
            "overflows in float16; set model.vae_dtype: float32 or bfloat16, or "
            "model.vae_name_or_path: madebyollin/sdxl-vae-fp16-fix"
        )


def test_disk_full_keeps_what_was_cached(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build([pair(0)], fake_generator())
    before = shard_names(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    records = [pair(0), pair(1)]
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(StorageError, match="disk full while writing"):
            build(list_source(records, name="more"), fake_generator())
    assert shard_names(tmp_path) == before
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    generator = fake_generator()
    assert len(build(list_source(records, name="more"), generator)) == 2 and generator.loads == 2
