"""Names in rows and items that lead elsewhere: above, by links, to devices and pipes."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_builders import image_bytes, pickapic_row, source, write_jsonl, write_parquet
from hostile_ends import READ, REFUSED, count, end_of
from hostile_readers import put

from t2i_align.contract import Media
from t2i_align.data.images import open_image
from t2i_align.data.media import is_inside, resolve
from t2i_align.errors import DataError

OUTSIDE = (
    *("../secret.png", "../../etc/passwd", "a/../../secret.png", "/etc/passwd", "/dev/zero"),
    *("~/secret.png", "~root/x", "link.png", "linked/secret.png", "file:///etc/passwd", "a\0b"),
    *("x" * 5000, "x" * 300, "", ".", "..", "fifo.png"),
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data folder with a good picture, links that lead out, and a pipe that never answers."""
    folder = tmp_path / "data"
    put(folder / "good.png", image_bytes(0, kind="PNG"))
    secret = put(tmp_path / "secret.png", image_bytes(1, kind="PNG"))
    (folder / "link.png").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(folder / "fifo.png")
    return folder


def path_rows(name: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """(row, options) of every source that takes files by name."""
    both = [name, "good.png"]
    return {
        "trl": ({"prompt": "a", "chosen": name, "rejected": "good.png"}, {}),
        "pickapic": (pickapic_row(0, jpg_0={"bytes": None, "path": name}), {}),
        "binary": ({"prompt": "a", "image": name, "label": 1}, {}),
        "captions": ({"prompt": "a", "negative_prompt": "b", "image": name}, {}),
        "ranked": ({"prompt": "a", "images": both, "ranks": [0, 1]}, {}),
        "ranked hpdv2": ({"prompt": "a", "image_path": both, "rank": [1, 2]}, {"format": "hpdv2"}),
        "folder": ({"file_name": name, "prompt": "a"}, {}),
    }


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_name_no_file_outside_their_folder(home: Path, suffix: str) -> None:
    """Such a row is skipped with a reason, or its one medium cannot be read; the good one can."""
    counts: Counter[str] = Counter()
    for name in (*OUTSIDE, "good.png"):
        for kind, (row, options) in path_rows(name).items():
            if kind == "folder" and suffix == "parquet":
                continue
            row = {k: v for k, v in row.items() if suffix == "parquet" or v is not None}
            if suffix == "parquet":
                write_parquet(home / "d.parquet", [row])
            elif kind != "pickapic":
                write_jsonl(home / ("metadata.jsonl" if kind == "folder" else "d.jsonl"), [row])
            else:
                continue
            file = home if kind == "folder" else home / f"d.{suffix}"
            found = source(kind.split()[0], path=str(file), **options)
            ends = [
                end_of(lambda m=item.media: open_image(resolve(m).data))
                for record in found
                for item in record.items[:1]
            ]
            ends += [REFUSED for _, reason in found.stats.skipped if reason]
            assert ends == [READ if name == "good.png" else REFUSED], (kind, name, ends)
            counts[ends[0]] += 1
    count(counts.elements())


def test_files_inside_are_inside_however_they_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    (folder / "a").mkdir(parents=True)
    put(folder / "b.png", b"x")
    (folder / "a" / "c.png").symlink_to(folder / "b.png")
    for name in ("b.png", "a/../b.png", "./b.png", "a/c.png", str(folder / "b.png"), "none.png"):
        assert is_inside(folder / name, folder), name
    assert not is_inside(folder.parent / "dd" / "b.png", folder)
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert is_inside(link / "b.png", link)


def test_links_of_a_hub_download_are_inside(tmp_path: Path) -> None:
    """A snapshot's files are links to its own repository's blobs, and to no other's."""
    for name in ("mine", "other"):
        put(tmp_path / name / "blobs" / "1f", b"x")
    folder = tmp_path / "mine" / "snapshots" / "abc" / "train"
    folder.mkdir(parents=True)
    (folder / "a.png").symlink_to("../../../blobs/1f")
    (folder / "b.png").symlink_to(tmp_path / "other" / "blobs" / "1f")
    assert is_inside(folder / "a.png", folder)
    assert not is_inside(folder / "b.png", folder)


def test_another_folder_can_be_named(home: Path) -> None:
    row = {"prompt": "a", "chosen": "secret.png", "rejected": str(home / "good.png")}
    file = write_jsonl(home / "d.jsonl", [row])
    (record,) = source("trl", path=str(file), image_dir=str(home.parent))
    assert all(resolve(item.media).data for item in record.items)


def test_score_and_the_published_sets_look_nowhere_else(home: Path) -> None:
    from t2i_align.evaluate.human_layouts import layout_of
    from t2i_align.evaluate.score_source import Pictures

    for name in OUTSIDE:
        table = write_jsonl(home / "t.jsonl", [{"image": name, "prompt": "a"}])
        for entry in Pictures([table]):
            read = lambda e=entry: open_image(resolve(e.media).data)  # noqa: E731
            assert entry.problem or end_of(read) == REFUSED, name
        rows = [{"prompt": "a", "path1": name, "path2": "good.png"}]
        put(home / "test.json", json.dumps(rows))
        for group in layout_of("hpdv3").read(home, "test"):
            read = lambda g=group: open_image(resolve(g.media[0]).data)  # noqa: E731
            assert end_of(read) == REFUSED, name


def test_a_benchmark_writes_into_its_own_folder() -> None:
    from t2i_align.evaluate.benchmark import Item
    from t2i_align.evaluate.pictures import plan

    for name in ("../x", "/x", "..", ".", "a/b", "", "a\0b"):
        with pytest.raises(DataError, match="no name of a folder"):
            plan([Item(name, "a", "t", {})], 1, Path("out"))


def test_special_files_are_not_opened(home: Path) -> None:
    for file in (Path("/dev/zero"), home / "fifo.png", home):
        for read in (lambda f=file: resolve(Media("image", f)), lambda f=file: open_image(f)):
            assert end_of(read) == REFUSED, file
