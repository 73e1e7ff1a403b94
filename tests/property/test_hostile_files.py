"""Files that strangers made, given to every reader of the suite.

Each is refused with a message (UserError; MediaError of one medium, whose row is then skipped and
counted) or read as what it is. Nothing in it is run, nothing outside its folder is opened, and
memory stays bounded. Other exceptions are defects; the tests print how many files came to what end.
"""

from __future__ import annotations

import io
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_builders import image_bytes, pickapic_row, write_parquet
from hostile import (
    BROKEN,
    bombs,
    json_texts,
    no_pictures,
    zero_sized,
)
from hostile_ends import REFUSED, end_of, look, settle
from hostile_memory import BOMBS, prepare
from hostile_readers import JSON, SOURCES, put, records

from t2i_align.data.images import image_size, open_image


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    """Gives an empty folder each time."""
    numbers = iter(range(1_000_000))

    def make() -> Path:
        folder = tmp_path / f"case{next(numbers)}"
        folder.mkdir()
        return folder

    return make


# -- JSON


@pytest.mark.parametrize("name", JSON)
def test_json_of_any_shape_is_refused_or_read(name: str, fresh: Callable[[], Path]) -> None:
    texts = json_texts()
    ends = {what: end_of(lambda w=what: JSON[name](fresh(), texts[w])) for what in texts}
    absent = name in ("vae/config.json",)  # of a folder: not described by them
    settle(ends, lambda what: what in BROKEN and not absent)
    assert REFUSED in ends.values()


# -- tables

CELLS: dict[str, Any] = {
    "a whole number": 7,
    "text": "x",
    "a list": ["x"],
    "lists of lists": [[1.5], [2.5]],
    "an object": {"bytes": 3, "path": 4},
    "objects of objects": {"bytes": {"path": b"x"}, "path": {"a": [1]}},
    "null": None,
    "not a number": float("nan"),
    "infinity": float("inf"),
    "a truth": True,
    "bytes": b"\xff\xfe",
    "a long number": 2**63 - 1,
}


def rows_of(kind: str) -> dict[str, Any]:
    """A good row of a source."""
    image, lists = image_bytes(0), [image_bytes(1), image_bytes(2)]
    good: dict[str, dict[str, Any]] = {
        "trl": {"prompt": "a", "chosen": image, "rejected": image_bytes(1), "weight": 1.0},
        "pickapic": pickapic_row(0),
        "binary": {"prompt": "a", "image": image, "label": 1, "value": 0.5},
        "captions": {"prompt": "a", "negative_prompt": "b", "image": image},
        "ranked": {"prompt": "a", "images": lists, "ranks": [0, 1], "values": [0.5, 0.1]},
        "ranked hpdv2": {"prompt": "a", "image_path": lists, "rank": [1, 2]},
        "ranked hpdv3": {"prompt": "a", "path1": image, "path2": image_bytes(1)},
        "ranked imagerewarddb": {"prompt": "a", "generations": lists, "ranking": [1, 2]},
    }
    return good[kind]


@pytest.mark.parametrize("kind", SOURCES)
def test_a_column_of_another_type_is_refused_or_skipped(
    kind: str, fresh: Callable[[], Path]
) -> None:
    good, ends = rows_of(kind), {}
    for column in good:
        for what, cell in CELLS.items():
            file = write_parquet(fresh() / "d.parquet", [good | {column: cell}])
            run = lambda f=file: records(kind.split()[0], path=str(f), **SOURCES[kind])  # noqa: E731
            ends[f"{column}: {what}"] = end_of(run)
    settle(ends)


def test_torn_and_edited_parquet_is_refused_or_read(fresh: Callable[[], Path]) -> None:
    raw = write_parquet(fresh() / "d.parquet", [pickapic_row(i) for i in range(3)]).read_bytes()
    chance, ends = random.Random(0), {}
    for number in range(120):
        torn = bytearray(raw[: chance.randrange(len(raw))] if number % 2 else raw)
        for _ in range(3 if torn else 0):
            torn[chance.randrange(len(torn))] ^= 1 << chance.randrange(8)
        file = put(fresh() / "d.parquet", bytes(torn))
        ends[str(number)] = end_of(lambda f=file: records("pickapic", path=str(f)))
    settle(ends)
    assert Counter(ends.values())[REFUSED] >= 60


# -- pictures


@pytest.mark.parametrize("make", [zero_sized, no_pictures])
def test_what_is_no_picture_is_refused(make: Callable[[], dict[str, bytes]]) -> None:
    files = make()
    settle({k: end_of(lambda n=k: look(files[n])) for k in files}, lambda _: True)


def encoded(kind: str, **options: Any) -> bytes:
    """A picture of 24 x 16 in a format."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(image_bytes(3))).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM"])
def test_torn_and_edited_pictures_are_refused_or_read(kind: str) -> None:
    raw, chance, ends = encoded(kind), random.Random(kind), {}
    for end in range(0, len(raw), max(1, len(raw) // 60)):
        ends[f"torn at {end}"] = end_of(lambda e=end: look(raw[:e]))
    for number in range(120):
        edited = bytearray(raw)
        for _ in range(chance.choice((1, 4, 32))):
            edited[chance.randrange(len(raw))] = chance.randrange(256)
        ends[f"edit {number}"] = end_of(lambda e=bytes(edited): look(e))
    settle(ends)
    half = [v for k, v in ends.items() if k.startswith("torn") and int(k.split()[-1]) < 100]
    assert set(half) == {REFUSED}


def test_unusual_pictures_are_read_as_what_they_show() -> None:
    """CMYK, 16 bits, palettes with transparency, animations and turned ones; all the same red."""
    import numpy as np
    from PIL import Image

    red = Image.new("RGB", (6, 4), (200, 0, 0))
    grey = Image.fromarray(np.full((4, 6), 200 * 257, np.uint16))
    clear = Image.new("RGBA", (6, 4), (9, 9, 9, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [
        (red.convert("CMYK"), "JPEG", {}, (200, 0, 0), (4, 6)),
        (grey, "PNG", {}, (200, 200, 200), (4, 6)),
        (clear, "PNG", {}, (255, 255, 255), (4, 6)),
        (red, "GIF", {"save_all": True, "append_images": [clear] * 2}, (200, 0, 0), (4, 6)),
        (red, "PNG", {"save_all": True, "append_images": [clear] * 2}, (200, 0, 0), (4, 6)),
        (red, "WEBP", {"save_all": True, "append_images": [clear], "lossless": True}, 0, (4, 6)),
        (red, "JPEG", {"exif": exif.tobytes()}, (200, 0, 0), (6, 4)),
        (red, "AVIF", {"exif": exif.tobytes(), "quality": 100}, (200, 0, 0), (6, 4)),
        (red, "AVIF", {"save_all": True, "append_images": [clear], "quality": 100}, 0, (4, 6)),
    ]
    for image, kind, options, colour, size in made:
        file = io.BytesIO()
        image.save(file, kind, **options)
        found = open_image(file.getvalue())
        assert (found.height, found.width) == size == image_size(file.getvalue())
        middle = np.array(found)[2, 2].astype(int)
        assert np.abs(middle - np.array(colour or (200, 0, 0))).max() <= 3, kind


@pytest.mark.parametrize("length", [0, 3, 7, 60, 60_000])
def test_broken_exif_is_refused_or_read(length: int) -> None:
    chance, ends = random.Random(length), {}
    for number in range(30):
        body = bytes(chance.randrange(256) for _ in range(length))
        starts = (b"Exif\0\0II*\0\x08\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0", b"")
        segment = (chance.choice(starts) + body)[:65_533]
        mark = b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment
        raw = image_bytes(1)
        ends[str(number)] = end_of(lambda m=mark, r=raw: look(r[:2] + m + r[2:]))
    settle(ends)


# -- memory

LIMIT = """
import resource, sys
sys.path[:0] = {paths!r}
import hostile_memory as t
from hostile_ends import end_of
from pathlib import Path
t.warm()
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {room}, size + {room}))
before = t.peak()
for name, action in t.greedy(Path({folder!r})):
    print(name, "|", end_of(action), "|", t.peak() - before, flush=True)
"""


READABLE = {
    "png whose pixels never end",
    "png with a text bomb",
    "png with a profile bomb",
    "jpg_0",
}


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """1 GiB of address space beyond the imports is enough for all of it, half of it resident."""
    prepare(tmp_path)
    assert tuple(bombs()) == BOMBS
    tests = str(Path(__file__).parents[1])
    script = LIMIT.format(paths=[tests], room=1 << 30, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    ends, grown = {}, 0
    for line in done.stdout.strip().splitlines():
        name, end, size = (part.strip() for part in line.split("|"))
        ends[name] = end
        grown = max(grown, int(size))
    settle(ends, lambda name: name not in READABLE)
    assert len(ends) == len(BOMBS) + 8 and 0 < grown < 512 * 1024
