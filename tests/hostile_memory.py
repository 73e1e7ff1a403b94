"""Small files that would need gigabytes, and every reader that is given them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_builders import image_bytes
from hostile import bombs, safetensors_files
from hostile_ends import look
from hostile_readers import put, records

from t2i_align.contract import Media
from t2i_align.data.images import open_image
from t2i_align.data.media import resolve


def peak() -> int:
    """The largest resident size so far, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def warm() -> None:
    """Import what is used, so that the limit counts files only."""
    import safetensors.torch  # noqa: F401
    import transformers  # noqa: F401

    look(image_bytes(0))
    resolve(Media("image", image_bytes(0)))


def prepare(folder: Path) -> None:
    """Files that are small, or claim to be, and would need gigabytes."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, raw in enumerate(bombs().values()):
        put(folder / f"bomb{number}", raw)
    cell = "0" * (1 << 26)
    for name, value in (("jpg_0", cell.encode()), ("caption", cell)):
        row = {"caption": ["a"], "jpg_0": [b"x"], "jpg_1": [b"x"], "label_0": [1.0]}
        batch = pa.record_batch(row | {name: [value]})
        rows = 18 if name == "caption" else 1  # of a group: the first packs more than is allowed
        pq.write_table(
            pa.Table.from_batches([batch] * 18),
            folder / f"{name}.parquet",
            row_group_size=rows,
            compression="zstd",
            use_dictionary=False,
        )
    for name in ("line.jsonl", "line.json"):
        with (folder / name).open("wb") as file:
            file.truncate(3 << 30)  # one endless line; takes no disk
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 12, 1 << 12, 1 << 12)}
    )
    put(folder / "voxels.npy", header.getvalue())
    with (folder / "huge.png").open("wb") as file:
        file.truncate(3 << 30)
    put(folder / "w.safetensors", safetensors_files()["giant tensor"])


def greedy(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every reader on the files of :func:`prepare`."""
    from t2i_align.judges.weight_files import load_tensors

    for number, name in enumerate(BOMBS):
        raw = (folder / f"bomb{number}").read_bytes()
        yield name, lambda r=raw: look(r)
    for name in ("jpg_0", "caption"):
        yield name, lambda n=name: records("pickapic", path=str(folder / f"{n}.parquet"))
    for name in ("line.jsonl", "line.json"):
        yield name, lambda n=name: records("trl", path=str(folder / n))
    yield "voxels", lambda: resolve(Media("voxels", folder / "voxels.npy"))
    yield "huge file", lambda: resolve(Media("image", folder / "huge.png"))
    yield "huge picture", lambda: open_image(folder / "huge.png")
    yield "giant tensor", lambda: load_tensors(folder / "w.safetensors")


BOMBS = (
    *("png of 4 gigapixels", "png of 2^31", "png whose pixels never end", "png with a text bomb"),
    *("png with a profile bomb", "gif of 4 gigapixels", "bmp of 10 gigapixels"),
    *("bmp of negative width", "ppm of 10 gigapixels", "ppm of many digits"),
    *("tiff of 10 gigapixels", "tiff in a circle"),
)
