"""The manifest: which records a source gave an objective's layout, as content keys into the stores.

One Arrow IPC file, memory-mapped, so a million records cost no memory, and a JSON report beside it.
Its name is a hash of everything it depends on; it is renamed into place when complete, so its
presence means there is nothing to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t2i_align.data.cache import atomic, commit, saving, temporary_name
from t2i_align.plain_json import loads

FORMAT = 1
CHUNK_ROWS = 4096
SPACES = "spaces"  # in the report's file, beside the report


def digest(value: Any) -> str:
    """Short stable hash of something JSON-able."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ManifestRow:
    """One record after its layout; lists run over its items.

    Args:
        id: record id.
        keys: content key of each medium, before the variant.
        prompts: texts, for logs.
        prompt_keys: their keys in the text store.
        preference: pairs: probability that the first is preferred.
        labels: +1, -1 or None.
        ranks: 0 = best; empty when not ranked.
        values: judge numbers or None.
        weight: of the record.
        size: (height, width) of its bucket; empty without buckets.
    """

    id: str
    keys: list[str]
    prompts: list[str]
    prompt_keys: list[str]
    preference: float
    labels: list[int | None]
    ranks: list[int]
    values: list[float | None]
    weight: float
    size: list[int] = field(default_factory=list)


@dataclass
class Report:
    """What became of the records of a source; part of a run's summary.

    Args:
        read: rows seen.
        usable: records of the layout.
        ties: records without a preference, dropped.
        no_label: rows without an annotation.
        unused: records the layout has no use for (an item labelled bad, where only winners count).
        num_skipped: records dropped for a broken or missing medium or cell.
        skipped: (id, reason) of the first 1000.
        buckets: records in each aspect bucket, named HxW; empty without buckets.
        beyond_aspect: records whose winner is narrower or wider than the buckets are meant for; it
            is cropped to the nearest.
        by_path: some media are files named by rows, which may change under the same rows.
        encoded_media: media encoded by this run; 0 when all were cached.
        encoded_prompts: the same for prompts.
    """

    read: int = 0
    usable: int = 0
    ties: int = 0
    no_label: int = 0
    unused: int = 0
    num_skipped: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    buckets: dict[str, int] = field(default_factory=dict)
    beyond_aspect: int = 0
    by_path: bool = False
    encoded_media: int = 0
    encoded_prompts: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def _schema(*, bucketed: bool) -> Any:
    import pyarrow as pa

    text = pa.list_(pa.string())
    columns = [
        ("id", pa.string()),
        ("keys", text),
        ("prompts", text),
        ("prompt_keys", text),
        ("preference", pa.float64()),
        ("labels", pa.list_(pa.int8())),
        ("ranks", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float64())),
        ("weight", pa.float64()),
    ]
    return pa.schema([*columns, ("size", pa.list_(pa.int32()))] if bucketed else columns)


class Writer:
    """Writes a manifest row by row into a temporary file; :meth:`commit` makes it the manifest.

    Args:
        path: of the manifest.
        bucketed: every row has a size.
        spaces: folders of the stores that its keys are of; for whoever clears a cache.
    """

    def __init__(self, path: Path, *, bucketed: bool = False, spaces: Sequence[str] = ()) -> None:
        """Open the temporary file."""
        import pyarrow as pa

        self.path, self.spaces = path, list(spaces)
        self._schema = _schema(bucketed=bucketed)
        self.num_rows = 0
        self._rows: list[dict[str, Any]] = []
        self._temporary = temporary_name(path)
        with saving(path):
            self._file = pa.OSFile(str(self._temporary), "wb")
            self._sink = pa.ipc.new_file(self._file, self._schema)

    def add(self, row: ManifestRow) -> None:
        """Append a record."""
        self._rows.append(asdict(row))
        self.num_rows += 1
        if len(self._rows) == CHUNK_ROWS:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa

        with saving(self.path):
            self._sink.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def commit(self, report: Report) -> None:
        """Write the report, then move the manifest into place."""
        if self._rows:
            self._write()
        with saving(self.path):
            self._sink.close()
            self._file.close()
        with atomic(_report_path(self.path)) as temporary:
            facts = report.to_dict() | {SPACES: self.spaces}
            temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        with saving(self.path):
            commit(self._temporary, self.path)

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _report_path(path: Path) -> Path:
    return path.with_suffix(".json")


def spaces_in(report: Path) -> list[str]:
    """The stores that a manifest is of, by its report; empty where that does not say."""
    try:
        found = loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    names = found.get(SPACES) if isinstance(found, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def load(path: Path) -> tuple[Manifest, Report] | None:
    """A complete manifest and its report, or None when there is none or it cannot be read."""
    import pyarrow as pa

    try:
        facts = loads(_report_path(path).read_text(encoding="utf-8"))
        facts.pop(SPACES, None)
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        facts["skipped"] = [(name, reason) for name, reason in facts["skipped"]]
        return Manifest(table), Report(**facts)
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None


class Manifest:
    """Read access to a manifest's rows.

    Args:
        table: Arrow table of the schema above.
    """

    def __init__(self, table: Any) -> None:
        """Find out once what is constant, so that a batch's form never depends on its records."""
        self.table = table
        self.has_labels = self._any("labels")
        self.has_values = self._any("values")
        self.has_ranks = self._any("ranks")
        self.has_sizes = "size" in table.schema.names
        self.has_weights = table["weight"].unique().to_pylist() not in ([], [1.0])

    def _any(self, column: str) -> bool:
        return any(chunk.flatten().drop_null() for chunk in self.table[column].chunks)

    @property
    def num_items(self) -> int:
        """Items of all records."""
        return sum(len(chunk.flatten()) for chunk in self.table["keys"].chunks)

    def num_missing(self, column: str) -> int:
        """Items without an entry in ``labels`` or ``values``; NaN is none."""
        import numpy as np

        present = 0
        for chunk in self.table[column].chunks:
            known = chunk.flatten().drop_null()
            present += len(known) - int(np.isnan(known.to_numpy(zero_copy_only=False)).sum())
        return self.num_items - present

    def __len__(self) -> int:
        """Number of records."""
        return self.table.num_rows

    def __getitem__(self, index: int) -> ManifestRow:
        """One record."""
        return ManifestRow(
            **{name: self.table[name][index].as_py() for name in self.table.schema.names}
        )

    def sizes(self) -> Any:
        """``(N, 2)`` int64 array, the (height, width) of every record's bucket; None without."""
        import numpy as np

        if not self.has_sizes:
            return None
        parts = [chunk.flatten().to_numpy() for chunk in self.table["size"].chunks]
        return np.concatenate(parts).astype(np.int64).reshape(-1, 2)

    def media(self) -> set[tuple[str, tuple[int, ...]]]:
        """Every medium at every size some record has it in; without buckets the size is ()."""
        if not self.has_sizes:
            return {(key, ()) for key in self.unique("keys")}
        rows = zip(self.table["keys"].to_pylist(), self.sizes().tolist(), strict=True)
        return {(key, tuple(size)) for keys, size in rows for key in keys}

    def unique(self, column: str) -> set[str]:
        """Distinct entries of a list column."""
        found: set[str] = set()
        for chunk in self.table[column].chunks:
            found.update(chunk.flatten().unique().to_pylist())
        return found
