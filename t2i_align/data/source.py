"""What a source is, and what it counts while streaming.

A source is an iterable of records with options, counts and a fingerprint; it holds no model and
decodes no media. To add one: write a class like those beside this file and a line in ``SOURCES``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from t2i_align.contract import MediaError
from t2i_align.data.options import RecordOptions
from t2i_align.data.records import Record
from t2i_align.data.rows import Row, Rows
from t2i_align.options import Options

MAX_NAMED = 1000


@dataclass
class Stats:
    """Counts of one pass.

    Args:
        read: rows (of a ranked list of rows: lists) seen.
        ties: records without a preference that were dropped.
        no_label: rows without an annotation.
        num_skipped: records dropped because something in them is broken.
        skipped: (record id, reason) of the first :data:`MAX_NAMED` of those.
    """

    read: int = 0
    ties: int = 0
    no_label: int = 0
    num_skipped: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def skip(self, record_id: str, reason: str) -> None:
        """Count a broken record and remember why."""
        self.num_skipped += 1
        if len(self.skipped) < MAX_NAMED:
            self.skipped.append((record_id, reason))


class Source(Protocol):
    """Where preference records come from."""

    Options: ClassVar[type[Options]]
    stats: Stats

    def __iter__(self) -> Iterator[Record]:
        """Stream the records; starts the counts afresh."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able; equal fingerprints mean equal records."""
        ...

    def count(self) -> int | None:
        """How many rows there are, where that is cheap to know; for progress only."""
        ...


def usable(
    rows: Rows | Iterator[Row],
    make: Callable[[Row], Record | None],
    stats: Stats,
    max_records: int | None,
) -> Iterator[Record]:
    """Records that ``make`` gets out of rows; a row with a MediaError is skipped and counted."""

    def stream() -> Iterator[Record]:
        for row in rows:
            stats.read += 1
            try:
                record = make(row)
            except MediaError as error:
                stats.skip(str(row.cells.get("id") or row.name), str(error))
                continue
            if record is not None:
                yield record

    return itertools.islice(stream(), max_records)


def require_text(row: Row, column: str) -> str:
    """A prompt; an empty one is legal, a missing one is not."""
    value = row.cells.get(column)
    if not isinstance(value, str):
        raise MediaError(f"{column} is {'missing' if value is None else type(value).__name__}")
    return whole_text(value, column)


def whole_text(value: str, column: str) -> str:
    """A text; half a character (JSON's lone surrogates) is none, and no file takes it."""
    try:
        value.encode()
    except UnicodeError as error:
        raise MediaError(f"{column} is no text: {error}") from error
    return value


def number(value: Any, what: str) -> float | None:
    """A finite number, or None for null and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, int | float) or math.isinf(value):
        raise MediaError(f"{what} is {value!r}; a finite number is needed")
    return float(value)


def record_options(options: RecordOptions, own: tuple[str, ...]) -> dict[str, Any]:
    """The options that change records, for a fingerprint; caption dropout does not."""
    names = ("type", "max_records", "columns", *own)
    return options.model_dump(mode="json", include=set(names))
