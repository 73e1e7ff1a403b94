"""Scores on disk while they are made: parts that are whole or absent, and files made of them.

    <folder>/identity.json          all that the numbers depend on
    <folder>/part-<first row>.parquet
                                    rows from there on: name, prompt, group, a number and a reason
                                    a judge; written to a temporary name, synced, renamed

A call that finds parts of the same identity goes on behind them. Rows reach a judge in batches that
start at multiples of the batch size, whoever asks, so a run killed anywhere and continued gives the
bytes of one that was not.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2i_align.data.cache import atomic, make_folder
from t2i_align.errors import DataError
from t2i_align.judges.facts import JudgeFacts

FORMAT = 1
FLUSH_ROWS = 4096
FLUSH_SECONDS = 30.0
EXPORT_ROWS = 4096
COMPLETE = "complete.json"
TEXTS = ("file", "prompt", "group", "stamp")


@dataclass(frozen=True)
class Identity:
    """All that a table of scores depends on.

    Args:
        source: fingerprint of the pictures and prompts.
        judges: in the order of the columns.
        settings: device, precision, batch size, whether numbers are normalised.
    """

    source: Mapping[str, Any]
    judges: tuple[JudgeFacts, ...]
    settings: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the judges."""
        return [facts.name for facts in self.judges]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        judges = [facts.to_dict() for facts in self.judges]
        parts = {"source": dict(self.source), "judges": judges, "settings": dict(self.settings)}
        return {"format": FORMAT, **parts}

    def digest(self) -> str:
        """Short name of it."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ScoredRow:
    """One picture and what the judges said.

    Args:
        file: its name.
        prompt: its prompt.
        values: a number a judge, None where it failed.
        reasons: why, None elsewhere.
        group: what it is compared within, for labels.
        stamp: size and time of its file, for labels.
    """

    file: str
    prompt: str | None
    values: Sequence[float | None]
    reasons: Sequence[str | None]
    group: str | None = None
    stamp: str | None = None


class ScoreStore:
    """Rows in parts.

    Args:
        folder: made if missing.
        identity: of the rows.
        flush_rows: a part is written when this many wait.
        flush_seconds: and when the last was this long ago, so that a kill costs seconds.

    Raises:
        DataError: the folder holds rows of another identity.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        *,
        flush_rows: int = FLUSH_ROWS,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        """Find the parts that are there."""
        self.folder, self.identity = folder, identity
        self.flush_rows, self.flush_seconds = flush_rows, flush_seconds
        self._waiting: list[ScoredRow] = []
        self._flushed = time.monotonic()
        make_folder(folder)
        self._claim()
        self._parts: list[Path] = []
        self._stored = 0
        while (part := self._part(self._stored)).is_file():
            self._append(part)

    def _claim(self) -> None:
        marker = self.folder / "identity.json"
        text = json.dumps(self.identity.to_dict(), indent=1, sort_keys=True)
        if marker.is_file() and marker.read_text(encoding="utf-8") != text:
            raise DataError(f"{self.folder} holds scores of something else", "delete the folder")
        if not marker.is_file():
            with atomic(marker) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _part(self, first: int) -> Path:
        return self.folder / f"part-{first:012d}.parquet"

    def _append(self, part: Path) -> None:
        import pyarrow.parquet as pq

        self._parts.append(part)
        self._stored += pq.read_metadata(part).num_rows

    def __len__(self) -> int:
        """Rows, those that wait included."""
        return self._stored + len(self._waiting)

    def add(self, rows: Sequence[ScoredRow]) -> None:
        """Append rows; writes a part when one is due."""
        self._waiting += rows
        due = time.monotonic() - self._flushed > self.flush_seconds
        if due or len(self._waiting) >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            StorageError: the disk is full or not writable; earlier parts are intact.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._flushed = time.monotonic()
        if not self._waiting:
            return
        columns: dict[str, Any] = {
            name: [getattr(r, name) for r in self._waiting] for name in TEXTS
        }
        for k, judge in enumerate(self.identity.names):
            columns[judge] = pa.array([r.values[k] for r in self._waiting], pa.float64())
            columns[f"{judge}.reason"] = pa.array(
                [r.reasons[k] for r in self._waiting], pa.string()
            )
        columns |= {name: pa.array(columns[name], pa.string()) for name in TEXTS}
        part = self._part(self._stored)
        with atomic(part) as temporary:
            pq.write_table(pa.table(columns), temporary)
        self._waiting = []
        self._append(part)

    def numbers(self, judge: str) -> np.ndarray:
        """A judge's column ``(n,)`` float64, NaN where it failed."""
        parts = [np.array(part, dtype=np.float64) for part in self._read([judge], judge)]
        return np.concatenate(parts) if parts else np.empty(0)

    def texts(self, column: str) -> list[str | None]:
        """A column of :data:`TEXTS`."""
        return [value for part in self._read([column], column) for value in part]

    def reasons(self, judge: str) -> dict[str, int]:
        """Why a judge failed and how often, most first."""
        counts: dict[str, int] = {}
        name = f"{judge}.reason"
        for part in self._read([name], name):
            for why in part:
                if why is not None:
                    counts[why] = counts.get(why, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def _read(self, columns: list[str], column: str) -> Iterator[list[Any]]:
        """One column, part by part; what waits is written first."""
        import pyarrow.parquet as pq

        self.flush()
        for part in self._parts:
            yield pq.read_table(part, columns=columns)[column].to_pylist()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Public rows: file, prompt, numbers, reason, and where each number comes from.

        ``<judge>.version`` is the card's, ``<judge>.weights_sha256`` of what was loaded,
        ``<judge>.depends_on`` a hash of what else it told, where it did.
        """
        import pyarrow.parquet as pq

        self.flush()
        names = self.identity.names
        facts = {f"{f.name}.version": f.version for f in self.identity.judges}
        facts |= {f"{f.name}.weights_sha256": f.weights_sha256 for f in self.identity.judges}
        facts |= {f"{f.name}.depends_on": f.digest for f in self.identity.judges if f.digest}
        if self.identity.settings.get("normalized"):
            facts["normalized"] = True
        for part in self._parts:
            for row in pq.read_table(part).to_pylist():
                whys = {n: row[f"{n}.reason"] for n in names if row[f"{n}.reason"] is not None}
                made = {"file": row["file"], "prompt": row["prompt"]} | {n: row[n] for n in names}
                yield made | {"reason": _reason(whys, len(names))} | facts

    def finish(self) -> None:
        """Note that nothing is missing."""
        self.flush()
        with atomic(self.folder / COMPLETE) as temporary:
            temporary.write_text(json.dumps({"rows": len(self)}), encoding="utf-8")

    @property
    def complete(self) -> bool:
        """Whether :meth:`finish` was called and all its rows are here."""
        marker = self.folder / COMPLETE
        return marker.is_file() and json.loads(marker.read_text())["rows"] == len(self)

    def remove(self) -> None:
        """Delete the parts, once files were made of them."""
        shutil.rmtree(self.folder)


def _reason(whys: dict[str, str], num_judges: int) -> str:
    """Reasons in a line; once where all judges give the same."""
    if len(set(whys.values())) == 1 and (len(whys) == num_judges or num_judges == 1):
        return next(iter(whys.values()))
    return "; ".join(f"{name}: {why}" for name, why in whys.items())


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows with a header; what failed is an empty cell."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A row a line; what failed is null."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(path: Path, rows: Iterator[dict[str, Any]], identity: Identity) -> None:
    """Row groups of :data:`EXPORT_ROWS`; the identity is in the file's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("file", pa.string()), ("prompt", pa.string())]
    fields += [(name, pa.float64()) for name in identity.names]
    fields += [("reason", pa.string())]
    fields += [(f"{name}.version", pa.int64()) for name in identity.names]
    fields += [(f"{name}.weights_sha256", pa.string()) for name in identity.names]
    fields += [(f"{f.name}.depends_on", pa.string()) for f in identity.judges if f.digest]
    if identity.settings.get("normalized"):
        fields.append(("normalized", pa.bool_()))
    about = {"t2i_align.scores": json.dumps(identity.to_dict(), sort_keys=True)}
    schema = pa.schema(fields, metadata=about)
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while part := list(itertools.islice(rows, EXPORT_ROWS)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
