"""TRL's columns: ``prompt``, ``chosen``, ``rejected``; images, clips, codec codes or voxel grids.

The shared convention of preference data sets (huggingface/trl, docs/source/dataset_formats.md).
Optional columns: ``id``, ``weight``, and ``score_chosen`` / ``score_rejected`` which become the
items' values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from t2i_align.data.media import cell_media
from t2i_align.data.options import FileOptions
from t2i_align.data.records import Item, Record
from t2i_align.data.rows import Row, Rows
from t2i_align.data.source import Stats, number, record_options, require_text, usable
from t2i_align.options import Options

REQUIRED = ("prompt", "chosen", "rejected")
OPTIONAL = ("id", "weight", "score_chosen", "score_rejected")


class TRLOptions(FileOptions):
    """Options of ``data: {type: trl}``."""

    known_columns: ClassVar[tuple[str, ...]] = REQUIRED + OPTIONAL

    type: Literal["trl"] = "trl"
    media: Literal["image", "video", "codes", "voxels"] = Field(
        "image",
        description="what chosen and rejected hold: images or videos (bytes, {bytes, path} or a "
        "path; mp4, webm, mov, gif), lists of codec codes, or voxel grids (nested lists, .npy "
        "bytes or a path)",
    )


class TRL:
    """Pairs from files with TRL's columns."""

    Options: ClassVar[type[Options]] = TRLOptions

    def __init__(self, options: TRLOptions) -> None:
        """Read nothing yet."""
        self.options = options
        self.stats = Stats()
        self.rows = Rows(options, REQUIRED, OPTIONAL)

    @staticmethod
    def check(options: TRLOptions) -> list[str]:
        """Problems visible without reading rows."""
        return Rows(options, REQUIRED, OPTIONAL).check()

    def __iter__(self) -> Iterator[Record]:
        """Stream pairs, winner first."""
        self.stats = Stats()
        return usable(self.rows, self._record, self.stats, self.options.max_records)

    def fingerprint(self) -> dict[str, Any]:
        """Files and options behind the records; media named by a path are not looked at."""
        return self.rows.fingerprint() | record_options(self.options, ("media",))

    def count(self) -> int | None:
        """Rows of the parquet files."""
        return self.rows.count()

    def _record(self, row: Row) -> Record:
        prompt = require_text(row, "prompt")
        weight = number(row.cells.get("weight"), "weight")
        return Record(
            id=str(row.cells.get("id") or row.name),
            layout="pair",
            items=(self._item(row, "chosen", prompt), self._item(row, "rejected", prompt)),
            weight=1.0 if weight is None else weight,
        )

    def _item(self, row: Row, side: str, prompt: str) -> Item:
        media = cell_media(self.options.media, row.cells.get(side), row.folder)
        score = f"score_{side}"
        return Item(media, prompt, value=number(row.cells.get(score), score))
