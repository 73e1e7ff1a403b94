"""Several images of one prompt in order of preference: HPDv2, HPDv3, ImageRewardDB, or any lists.

    hpdv2          train.json {prompt, image_path | file_path: [..], human_preference: [1, 0]};
                   test.json {prompt, image_path: [..], rank: [..]}
    hpdv3          {prompt, path1 (preferred), path2}: a pair
    imagerewarddb  rows {prompt_id, prompt, image, rank}, the rows of a prompt one after the other;
                   or an object a prompt {prompt, generations: [..], rank | ranking: [..]}
    generic        {prompt, images: [..], ranks: [..]}, values: [..] if there are judge numbers

Smaller ranks are better, wherever they start. What becomes of a ranking is the objective's layout
and ``pairing``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from t2i_align.contract import MediaError
from t2i_align.data.media import cell_media
from t2i_align.data.options import FileOptions
from t2i_align.data.records import Item, Record, dense_ranks
from t2i_align.data.rows import Row, Rows
from t2i_align.data.source import Stats, number, record_options, require_text, usable
from t2i_align.errors import DataError
from t2i_align.options import Options

Format = Literal["hpdv2", "hpdv3", "imagerewarddb", "generic"]
COMMON = ("id", "weight")
REQUIRED: dict[Format, tuple[str, ...]] = {
    "hpdv2": ("prompt",),
    "hpdv3": ("prompt", "path1", "path2"),
    "imagerewarddb": ("prompt",),
    "generic": ("prompt", "images", "ranks"),
}
EITHER: dict[Format, tuple[tuple[str, ...], ...]] = {
    "hpdv2": (("image_path", "file_path"), ("rank", "human_preference")),
    "hpdv3": (),
    "imagerewarddb": (("image", "generations"), ("rank", "ranking")),
    "generic": (),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "hpdv2": COMMON,
    "hpdv3": COMMON,
    "imagerewarddb": (*COMMON, "prompt_id"),
    "generic": (*COMMON, "values"),
}


def _all_columns() -> tuple[str, ...]:
    tables = [*REQUIRED.values(), *OPTIONAL.values(), *itertools.chain(*EITHER.values())]
    return tuple(dict.fromkeys(itertools.chain(*tables)))


class RankedOptions(FileOptions):
    """Options of ``data: {type: ranked}``."""

    known_columns: ClassVar[tuple[str, ...]] = _all_columns()

    type: Literal["ranked"] = "ranked"
    format: Format = Field("generic", description="whose columns the files have")


def _source_rows(options: RankedOptions) -> Rows:
    kind = options.format
    return Rows(options, REQUIRED[kind], OPTIONAL[kind], EITHER[kind])


class Ranked:
    """Rankings (HPDv3: pairs)."""

    Options: ClassVar[type[Options]] = RankedOptions

    def __init__(self, options: RankedOptions) -> None:
        """Read nothing yet."""
        self.options = options
        self.stats = Stats()
        self.rows = _source_rows(options)

    @staticmethod
    def check(options: RankedOptions) -> list[str]:
        """Problems visible without reading rows."""
        return _source_rows(options).check()

    def __iter__(self) -> Iterator[Record]:
        """Stream rankings."""
        self.stats = Stats()
        rows: Rows | Iterator[Row] = self.rows
        if self.options.format == "imagerewarddb":
            rows = gather(iter(self.rows))
        make = _MAKE[self.options.format]
        return usable(
            rows,
            lambda row: make(row, row.folder),
            self.stats,
            self.options.max_records,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Files and options behind the records; images named by a path are not looked at."""
        return self.rows.fingerprint() | record_options(self.options, ("format", "image_dir"))

    def count(self) -> int | None:
        """Rows of the parquet files, where a row is a ranking."""
        return None if self.options.format == "imagerewarddb" else self.rows.count()


def gather(rows: Iterator[Row]) -> Iterator[Row]:
    """Join consecutive rows of one ``prompt_id`` to a row of lists; rows of lists pass.

    Raises:
        DataError: the rows of a prompt are not consecutive.
    """
    seen: set[Any] = set()
    for key, group in itertools.groupby(rows, lambda row: row.cells.get("prompt_id")):
        members = list(group)
        if "generations" in members[0].cells:
            yield from members
            continue
        if key is None or key in seen:
            problem = "has no prompt_id" if key is None else f"comes back to prompt_id '{key}'"
            raise DataError(
                f"{members[0].name}: row {problem}",
                "the rows of a prompt must follow each other: sort the file by prompt_id",
            )
        seen.add(key)
        first = members[0].cells
        cells = {"id": key, "prompt": first.get("prompt"), "weight": first.get("weight")}
        for ours, theirs in (("generations", "image"), ("rank", "rank")):
            cells[ours] = [member.cells.get(theirs) for member in members]
        yield Row(members[0].name, members[0].folder, cells)


def _ranking(row: Row, folder: Path | None, images: Any, keys: Any, values: Any = None) -> Record:
    """A ranked record; ``keys`` order the images, smaller is better."""
    if not isinstance(images, list) or not isinstance(keys, list) or len(images) != len(keys):
        raise MediaError("images and ranks are two lists of one length")
    if len(images) < 2:
        raise MediaError(f"a ranking of {len(images)} image(s) says nothing")
    prompt = require_text(row, "prompt")
    numbers = [number(key, "rank") for key in keys]
    if None in numbers:
        raise MediaError("a rank is missing")
    values = values or [None] * len(images)
    if not isinstance(values, list):
        raise MediaError(f"values is {values!r}, not a list")
    if len(values) != len(images):
        raise MediaError(f"{len(values)} values for {len(images)} images")
    items = tuple(
        Item(cell_media("image", image, folder), prompt, value=number(value, "value"))
        for image, value in zip(images, values, strict=True)
    )
    ranks = dense_ranks([n for n in numbers if n is not None])
    return Record(_name(row), "ranked", items, ranks=ranks, weight=_weight(row))


def _name(row: Row) -> str:
    name = row.cells.get("id", row.cells.get("prompt_id"))
    return row.name if name is None else str(name)


def _weight(row: Row) -> float:
    weight = number(row.cells.get("weight"), "weight")
    return 1.0 if weight is None else weight


def _hpdv2(row: Row, folder: Path | None) -> Record:
    cells = row.cells
    images = cells.get("image_path") or cells.get("file_path")
    keys = cells.get("rank")
    if keys is None and isinstance(cells.get("human_preference"), list):
        keys = [-(number(votes, "human_preference") or 0.0) for votes in cells["human_preference"]]
    return _ranking(row, folder, images, keys)


def _hpdv3(row: Row, folder: Path | None) -> Record:
    prompt = require_text(row, "prompt")
    preferred, other = (
        Item(cell_media("image", row.cells.get(name), folder), prompt)
        for name in ("path1", "path2")
    )
    return Record(_name(row), "pair", (preferred, other), weight=_weight(row))


def _imagerewarddb(row: Row, folder: Path | None) -> Record:
    cells = row.cells
    return _ranking(
        row, folder, cells.get("generations"), cells.get("rank") or cells.get("ranking")
    )


def _generic(row: Row, folder: Path | None) -> Record:
    cells = row.cells
    return _ranking(row, folder, cells.get("images"), cells.get("ranks"), cells.get("values"))


_MAKE: dict[Format, Callable[[Row, Path | None], Record]] = {
    "hpdv2": _hpdv2,
    "hpdv3": _hpdv3,
    "imagerewarddb": _imagerewarddb,
    "generic": _generic,
}
