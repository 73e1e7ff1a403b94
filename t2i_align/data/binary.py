"""Items labelled good or bad: ``prompt``, ``image``, ``label`` (true/false, 1/0 or 1/-1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from t2i_align.contract import MediaError
from t2i_align.data.media import cell_media
from t2i_align.data.options import FileOptions
from t2i_align.data.records import Item, Record
from t2i_align.data.rows import Row, Rows
from t2i_align.data.source import Stats, number, record_options, require_text, usable
from t2i_align.options import Options

REQUIRED = ("prompt", "image", "label")
OPTIONAL = ("id", "weight", "value")


class BinaryOptions(FileOptions):
    """Options of ``data: {type: binary}``."""

    known_columns: ClassVar[tuple[str, ...]] = REQUIRED + OPTIONAL

    type: Literal["binary"] = "binary"


def parse_label(value: Any) -> int | None:
    """+1 or -1; None for null. True and 1 are good; false, 0 and -1 are bad."""
    label = number(value, "label")
    if label is None:
        return None
    if label not in (-1.0, 0.0, 1.0):
        raise MediaError(f"label is {value!r}; allowed: true, false, 1, 0, -1")
    return 1 if label == 1 else -1


class Binary:
    """Labelled single items."""

    Options: ClassVar[type[Options]] = BinaryOptions

    def __init__(self, options: BinaryOptions) -> None:
        """Read nothing yet."""
        self.options = options
        self.stats = Stats()
        self.rows = Rows(options, REQUIRED, OPTIONAL)

    @staticmethod
    def check(options: BinaryOptions) -> list[str]:
        """Problems visible without reading rows."""
        return Rows(options, REQUIRED, OPTIONAL).check()

    def __iter__(self) -> Iterator[Record]:
        """Stream labelled items."""
        self.stats = Stats()
        return usable(self.rows, self._record, self.stats, self.options.max_records)

    def fingerprint(self) -> dict[str, Any]:
        """Files and options behind the records; images named by a path are not looked at."""
        return self.rows.fingerprint() | record_options(self.options, ())

    def count(self) -> int | None:
        """Rows of the parquet files."""
        return self.rows.count()

    def _record(self, row: Row) -> Record | None:
        label = parse_label(row.cells.get("label"))
        if label is None:
            self.stats.no_label += 1
            return None
        media = cell_media("image", row.cells.get("image"), row.folder)
        value = number(row.cells.get("value"), "value")
        weight = number(row.cells.get("weight"), "weight")
        return Record(
            id=str(row.cells.get("id") or row.name),
            layout="binary",
            items=(Item(media, require_text(row, "prompt"), label=label, value=value),),
            weight=1.0 if weight is None else weight,
        )
