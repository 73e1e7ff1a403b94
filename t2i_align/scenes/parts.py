"""Rows of a long job kept in parts beside the file they become, so that a stopped job goes on.

    OUT.parts-<key>/00000.parquet, 00016.parquet, ...     one a batch of prompts, whole or absent

The key is a hash of everything the rows depend on, so parts of another model or of other settings
are never taken; when the file is written, the folder goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2i_align.data.cache import atomic
from t2i_align.data.manifest import digest

Row = dict[str, Any]


class Parts:
    """The parts of one file.

    Args:
        out: parquet file to be written in the end.
        identity: JSON-able facts the rows depend on.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        """Look for nothing yet."""
        self.out = out
        self.folder = out.with_name(f"{out.name}.parts-{digest(dict(identity))[:12]}")

    def read(self, start: int) -> list[Row] | None:
        """Rows of the part that begins at ``start``; None where it is not done."""
        import pyarrow.parquet as pq

        file = self._file(start)
        return pq.read_table(file).to_pylist() if file.exists() else None

    def write(self, start: int, rows: Sequence[Row]) -> None:
        """Keep the rows of a part; the disk holds them when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write(self._file(start), rows)

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the file and remove the parts."""
        self._write(self.out, rows)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, start: int) -> Path:
        return self.folder / f"{start:05d}.parquet"

    @staticmethod
    def _write(file: Path, rows: Sequence[Row]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic(file) as temporary:
            pq.write_table(pa.Table.from_pylist(list(rows)), temporary, compression="zstd")
