"""Pictures as a stream: every layout gives the same pictures, and errors name the file."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_builders import image_bytes, write_jsonl, write_parquet

from t2i_align.contract import Media
from t2i_align.data.media import resolve
from t2i_align.errors import DataError, UserError
from t2i_align.evaluate.score_source import Entry, Pictures

DATA = [image_bytes(k) for k in range(4)]
TEXTS = [f"prompt {k}" for k in range(4)]


def seen(entries: Iterable[Entry]) -> list[tuple[bytes, str | None]]:
    return [(resolve(e.media).data, e.prompt) for e in entries]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_members(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    texts = [(f"a.b/{k:05d}.txt", TEXTS[k].encode()) for k in numbers]
    pictures = [(f"a.b/{k:05d}.jpg", DATA[k]) for k in numbers]
    return [m for pair in zip(pictures, texts, strict=True) for m in pair]


def test_every_layout_gives_the_same_pictures(tmp_path: Path) -> None:
    expected = list(zip(DATA, TEXTS, strict=True))
    for k in range(4):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{k}.jpg").write_bytes(DATA[k])
        (tmp_path / "files" / f"{k}.txt").write_text(TEXTS[k])
    rows = [{"image": DATA[k], "prompt": TEXTS[k]} for k in range(4)]
    write_parquet(tmp_path / "t.parquet", rows)
    names = [{"file_name": f"files/{k}.jpg", "text": TEXTS[k]} for k in range(4)]
    write_jsonl(tmp_path / "t.jsonl", names)
    (tmp_path / "shards").mkdir()
    for half in (0, 1):
        members = shard_members((2 * half, 2 * half + 1))
        write_tar(tmp_path / "shards" / f"{half}.tar", members)
    places = ("files", "files/*.jpg", "t.parquet", "t.jsonl", "shards", "shards/*.tar")
    for place in places:
        pictures = Pictures([tmp_path / place])
        assert pictures.survey() == 4, place
        assert seen(pictures) == seen(pictures) == expected, place


def test_parts_of_a_stopped_call_are_no_tables(tmp_path: Path) -> None:
    """They lie in a hidden folder beside the output, which may lie beside the tables."""
    write_parquet(tmp_path / "t.parquet", [{"image": DATA[0], "prompt": TEXTS[0]}])
    parts = tmp_path / ".scores.parquet.parts-1"
    parts.mkdir()
    (parts / "identity.json").write_text("{}")
    write_parquet(parts / "part-0.parquet", [{"image": DATA[1], "prompt": TEXTS[1]}])
    assert seen(Pictures([tmp_path])) == [(DATA[0], TEXTS[0])]


def test_rows_with_several_pictures(tmp_path: Path) -> None:
    pairs = [{"caption": "p", "jpg_0": DATA[0], "jpg_1": DATA[1], "label_0": 1.0}]
    lists = [{"prompt": "p", "images": DATA[:3], "ranks": [0, 1, 2]}]
    for name, rows, number in (("pairs", pairs, 2), ("lists", lists, 3)):
        file = write_parquet(tmp_path / f"{name}.parquet", rows)
        pictures = Pictures([file])
        assert pictures.survey() == number
        assert seen(pictures) == [(DATA[k], "p") for k in range(number)]
        assert [e.name for e in pictures] == [f"{file}:0#{k}" for k in range(number)]


def test_a_reference_column_goes_into_the_medium(tmp_path: Path) -> None:
    row = {"image": DATA[0], "prompt": "p", "reference": DATA[1]}
    (entry,) = Pictures([write_parquet(tmp_path / "t.parquet", [row])])
    assert entry.media.meta["reference"] == Media("image", DATA[1])


def test_the_bundled_pairs_go_by_their_name() -> None:
    pictures = Pictures([Path("bundled/scenes/pairs.parquet")])
    assert pictures.survey() == 2 * 700


def test_shards_have_json_prompts_several_pictures_and_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2i_align.data.images.MAX_BYTES", 2 * len(DATA[0]))
    members = [
        ("__meta__.json", b"{}"),
        ("x.0.jpg", DATA[0]),
        ("x.1.JPG", DATA[1]),
        ("x.json", json.dumps({"caption": "two"}).encode()),
        ("y.png", b"0" * (4 * len(DATA[0]))),
        ("y.cls", b"7"),
        ("y.txt", b" big \n"),
    ]
    file = write_tar(tmp_path / "s.tar", members)
    first, second, big = Pictures([file])
    assert [e.name for e in (first, second, big)] == [
        f"{file}:{name}" for name in ("x.0.jpg", "x.1.JPG", "y.png")
    ]
    assert seen([first, second]) == [(DATA[0], "two"), (DATA[1], "two")]
    assert big.prompt == "big" and big.problem is not None and "the limit is" in big.problem


def test_a_torn_shard_and_a_wrong_one(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "s.tar", shard_members(range(4)))
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"s\.tar: not a readable tar file"):
        list(Pictures([file]))
    file.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="not a readable tar file"):
        Pictures([file]).survey()
    text = write_tar(tmp_path / "j.tar", [("x.jpg", DATA[0]), ("x.json", b"{broken")])
    with pytest.raises(DataError, match=r"j\.tar: x\.json cannot be read"):
        Pictures([text]).survey()


def test_missing_prompts_are_told_before_any_picture_is_read(tmp_path: Path) -> None:
    rows = [{"image": DATA[0], "prompt": None if k > 2 else "p"} for k in range(9)]
    file = write_parquet(tmp_path / "t.parquet", rows)
    with pytest.raises(DataError) as caught:
        Pictures([file]).survey()
    named = ", ".join(f"{file}:{k}" for k in (3, 4, 5))
    assert f"no prompt is known for {named} and 3 more" in str(caught.value)
    assert Pictures([file], prompt="q").survey() == 9
    pq.write_table(pa.table({"image": DATA}), tmp_path / "u.parquet")
    bare = Pictures([tmp_path / "u.parquet"], prompt="q")
    assert bare.survey() == 4 and {e.prompt for e in bare} == {"q"}


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, said in (("empty", "no pictures in"), ("*.jpg", "nothing at"), ("x", "nothing at")):
        with pytest.raises(DataError, match=said):
            Pictures([tmp_path / path])
    empty = write_tar(tmp_path / "e.tar", [("readme.md", b"x")])
    with pytest.raises(DataError, match=r"no pictures in .*e\.tar"):
        Pictures([empty]).survey()
    with pytest.raises(UserError, match="both given"):
        Pictures([tmp_path], "p", tmp_path / "lines")


def test_the_fingerprint_follows_files_and_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(DATA[0])
    (tmp_path / "a.txt").write_text("p")
    lines = tmp_path / "l"
    lines.write_text("q")

    def mark(prompt: str | None = None, prompts: Path | None = None) -> str:
        return json.dumps(Pictures([tmp_path], prompt, prompts).fingerprint())

    before = mark()
    assert mark() == before and len({before, mark("q"), mark("r"), mark(prompts=lines)}) == 4
    (tmp_path / "a.txt").write_text("longer")
    assert mark() != before


def test_pick_reads_up_to_the_last(tmp_path: Path) -> None:
    rows = [{"image": DATA[k], "prompt": TEXTS[k]} for k in range(4)]
    pictures = Pictures([write_parquet(tmp_path / "t.parquet", rows)])
    found = pictures.pick([2, 0, 2])
    assert {k: e.prompt for k, e in found.items()} == {0: TEXTS[0], 2: TEXTS[2]}
    assert pictures.pick([]) == {}
