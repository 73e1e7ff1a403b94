"""Rows of parquet, jsonl and json files, or of a hub data set, streamed in file order.

Parquet is read in small batches through a buffered stream: by default Arrow reads a whole row group
(often hundreds of MB of JPEG bytes) at once. Resident growth on 1.5 GB in row groups of 380 MB with
pages of 100 MB: 840 MB by default, 570 buffered, 240 when unused memory is also handed back after
each batch (its high-water mark, inside Arrow, 410). Mapping the file instead counts all of it as
resident. tests/unit/test_sources_memory.py holds the limit of 500.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.catalog import find_root
from t2i_align.data.options import FileOptions
from t2i_align.errors import DataError
from t2i_align.plain_json import loads
from t2i_align.registry import nearest

PARQUET_BATCH_ROWS = 16
PARQUET_BUFFER_BYTES = 2**20
MAX_BATCH_BYTES = 128 * 2**20
MAX_COUNTED = 64
MAX_LINES_BYTES = 64 * 2**20
MAX_LINE = 64 * 2**20
MAX_JSON_BYTES = 2**30
MAX_UNPACKED = 2**30  # of a column in a row group, where it is packed more than MAX_PACKED-fold
MAX_PACKED = 200
SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class DataFile:
    """A file of rows and the name its rows go by, stable across machines."""

    path: Path
    name: str


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        name: ``file:number``, or ``hub_id/split:number``.
        folder: what relative paths in its cells start from; None for hub rows.
        cells: by our column names; absent columns are missing keys.
    """

    name: str
    folder: Path | None
    cells: dict[str, Any]


def find_files(options: FileOptions) -> list[DataFile]:
    """Files behind ``data.path``, sorted within each entry.

    Raises:
        DataError: nothing there.
    """
    entries = [options.path] if isinstance(options.path, str) else list(options.path or [])
    found: list[DataFile] = []
    for entry in entries:
        try:
            found += _expand(entry, options.split)
        except (OSError, RuntimeError) as error:  # RuntimeError: ~name of an unknown user
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"data.path: cannot look at '{entry[:80]}': {reason}") from error
    names = [file.name for file in found]
    if len(set(names)) < len(names):
        found = [DataFile(file.path, f"{i}/{file.name}") for i, file in enumerate(found)]
    return found


def local_path(entry: str) -> Path:
    """An entry as a path; ``bundled/NAME/FILE`` belongs to a data set that ships with the suite."""
    if entry.startswith("bundled/"):
        return find_root() / "datasets" / entry.removeprefix("bundled/")
    return Path(entry).expanduser()


def _expand(entry: str, split: str) -> list[DataFile]:
    path = local_path(entry)
    if path.is_dir():
        return _in_folder(path, split)
    if path.exists():
        return [DataFile(path, path.name)]
    hits = [Path(hit) for hit in sorted(glob.glob(str(path), recursive=True))]
    if not hits:
        raise DataError(f"data.path: nothing at '{entry}'", _neighbours(path))
    return [DataFile(hit, hit.name) for hit in hits if hit.is_file()]


def _neighbours(path: Path) -> str:
    """What to do about a missing path: the nearest existing name, or the first missing folder."""
    if not path.parent.is_dir():
        return f"folder {path.parent} does not exist"
    hint = nearest(path.name, [p.name for p in path.parent.iterdir()])
    return hint or f"{path.parent} exists; is the file name right?"


def _in_folder(folder: Path, split: str) -> list[DataFile]:
    for suffix in SUFFIXES:
        paths = sorted(p for p in folder.rglob(f"*{suffix}") if not p.name.startswith("."))
        if paths:
            ours = [p for p in paths if _is_split(p.relative_to(folder), split)]
            return [DataFile(p, p.relative_to(folder).as_posix()) for p in ours or paths]
    raise DataError(
        f"data.path: no {', '.join(SUFFIXES)} files in {folder}",
        "point data.path at the folder that holds them; a folder of images is `type: folder`",
    )


def _is_split(path: Path, split: str) -> bool:
    """Whether a file is named after a split, as in ``train-00000-of-00002.parquet``."""
    stem = path.name.split(".")[0]
    return split in path.parts[:-1] or stem == split or stem.startswith((f"{split}-", f"{split}_"))


def parquet_file(path: Path) -> Any:
    """An open ``pyarrow.parquet.ParquetFile`` that streams.

    Raises:
        DataError: not parquet, truncated, or no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "parquet", error) from error
    if file.metadata.num_rows == 0:
        raise DataError(f"{path}: no rows", "remove it from data.path, or write it again")
    _refuse_bomb(file.metadata, path)
    return file


def _refuse_bomb(about: Any, path: Path) -> None:
    """Refuse columns that unpack to far more than their bytes, as the file itself declares.

    Raises:
        DataError: names the column.
    """
    for group in range(about.num_row_groups):
        if about.row_group(group).total_byte_size <= MAX_UNPACKED:
            continue
        for number in range(about.num_columns):
            column = about.row_group(group).column(number)
            unpacked = column.total_uncompressed_size
            if unpacked > max(MAX_UNPACKED, MAX_PACKED * column.total_compressed_size):
                raise DataError(
                    f"{path}: {column.total_compressed_size >> 10} KiB of column "
                    f"'{column.path_in_schema}' unpack to {unpacked >> 20} MiB",
                    "media are hardly packed; this is no data set",
                )


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"{path}: not a readable {kind} file ({reason})",
        "download or write it again, or remove it from data.path",
    )


def _parquet_columns(path: Path) -> list[str]:
    return parquet_file(path).schema_arrow.names


def _parquet_rows(path: Path, wanted: list[str]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    file = parquet_file(path)
    columns = [name for name in file.schema_arrow.names if name in wanted]
    try:
        for batch in file.iter_batches(batch_size=_batch_rows(file.metadata), columns=columns):
            yield from batch.to_pylist()
            pa.default_memory_pool().release_unused()  # else the allocator keeps old pages
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "parquet", error) from error


def _batch_rows(about: Any) -> int:
    """Rows of a batch: fewer where rows are large."""
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    largest = max((g.total_byte_size // max(1, g.num_rows) for g in groups), default=0)
    return max(1, min(PARQUET_BATCH_ROWS, MAX_BATCH_BYTES // max(1, largest)))


def _jsonl_rows(path: Path, wanted: list[str]) -> Iterator[dict[str, Any]]:
    number, any_row = 0, False
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), ""), 1):
                if len(line) > MAX_LINE:
                    raise ValueError(f"a line of more than {MAX_LINE >> 20} MiB")
                if line.strip():
                    any_row = True
                    yield _object(loads(line), path, f"line {number}")
    except (ValueError, OSError) as error:
        raise _unreadable(path, f"jsonl (line {number})", error) from error
    if not any_row:
        raise DataError(f"{path}: no rows", "remove it from data.path, or write it again")


def _json_rows(path: Path, wanted: list[str]) -> Iterator[dict[str, Any]]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES >> 20} MiB in one value; write jsonl")
        rows = loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _unreadable(path, "json", error) from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: no rows", "a json file holds one non-empty list of objects")
    for number, row in enumerate(rows):
        yield _object(row, path, f"element {number}")


def _object(row: Any, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}, {where}: got {type(row).__name__}", "each row is a JSON object")
    return row


def _first_keys(rows: Callable[[Path, list[str]], Iterator[dict[str, Any]]]) -> Callable:
    return lambda path: list(next(rows(path, [])))


_READERS: dict[str, tuple[Callable[[Path], list[str]], Callable]] = {
    ".parquet": (_parquet_columns, _parquet_rows),
    ".jsonl": (_first_keys(_jsonl_rows), _jsonl_rows),
    ".json": (_first_keys(_json_rows), _json_rows),
}


def _reader(path: Path) -> tuple[Callable[[Path], list[str]], Callable]:
    if path.suffix not in _READERS:
        raise DataError(
            f"{path}: unknown kind of file '{path.suffix}'", f"allowed: {', '.join(SUFFIXES)}"
        )
    return _READERS[path.suffix]


def _count(path: Path) -> int | None:
    """Rows by a parquet footer, lines of a small jsonl file; None elsewhere."""
    if path.suffix == ".parquet":
        return parquet_file(path).metadata.num_rows
    if path.suffix == ".jsonl" and path.stat().st_size < MAX_LINES_BYTES:
        return sum(1 for line in path.read_bytes().splitlines() if line.strip())
    return None


@dataclass(frozen=True)
class Rows:
    """The rows of a source.

    Args:
        options: where they are.
        required: our names of columns that must exist.
        optional: our names of columns that are read when they exist.
        either: groups of columns of which one must exist.
    """

    options: FileOptions
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    either: tuple[tuple[str, ...], ...] = ()

    def __iter__(self) -> Iterator[Row]:
        """Stream rows; columns are verified before a file's first row."""
        if self.options.hub_id is not None:
            yield from self._hub()
            return
        image_dir = self.options.image_dir
        folder = None if image_dir is None else local_path(image_dir)
        for file in find_files(self.options):
            columns, rows = _reader(file.path)
            self._raise_missing(columns(file.path), str(file.path))
            wanted = [self._theirs(name) for name in self._ours()]
            for number, cells in enumerate(rows(file.path, wanted)):
                yield Row(f"{file.name}:{number}", folder or file.path.parent, self._rename(cells))

    def _hub(self) -> Iterator[Row]:
        from t2i_align.data.hub import hub_rows

        origin = f"{self.options.hub_id}/{self.options.split}"
        for number, cells in enumerate(hub_rows(self.options)):
            if number == 0:
                self._raise_missing(list(cells), origin)
            yield Row(f"{origin}:{number}", None, self._rename(cells))

    def _ours(self) -> list[str]:
        return [*self.required, *self.optional, *(name for group in self.either for name in group)]

    def _theirs(self, name: str) -> str:
        return self.options.columns.get(name, name)

    def _rename(self, cells: dict[str, Any]) -> dict[str, Any]:
        names = [(ours, self._theirs(ours)) for ours in self._ours()]
        return {ours: cells[theirs] for ours, theirs in names if theirs in cells}

    def missing(self, columns: list[str], origin: str) -> list[DataError]:
        """One error for each column that ``columns`` lacks."""
        errors = []
        for group in [(name,) for name in self.required] + list(self.either):
            if not any(self._theirs(name) in columns for name in group):
                name = group[0]
                near = nearest(self._theirs(name), columns)
                fix = "rename it with data.columns: {" + name + ": <name in the file>}"
                message = f"{origin}: no column '{self._theirs(name)}'"
                if group[1:]:
                    message += f" (nor {', '.join(group[1:])})"
                message += f"; it has: {', '.join(columns)}"
                errors.append(DataError(message, f"{near} {fix}".strip()))
        return errors

    def _raise_missing(self, columns: list[str], origin: str) -> None:
        errors = self.missing(columns, origin)
        if errors:
            raise errors[0]

    def check(self, max_files: int = 8) -> list[str]:
        """Missing or unreadable files, wrong columns; reads no rows and asks no hub."""
        if self.options.hub_id is not None:
            return []
        try:
            files = find_files(self.options)
            problems = []
            for file in files[:max_files]:
                columns = _reader(file.path)[0](file.path)
                problems += [str(error) for error in self.missing(columns, str(file.path))]
            return problems
        except DataError as error:
            return [str(error)]

    def count(self) -> int | None:
        """Records to expect at most, where that is cheap to know; None elsewhere."""
        if self.options.hub_id is not None:
            return None
        try:
            counts = [_count(file.path) for file in find_files(self.options)[:MAX_COUNTED]]
        except DataError:
            return None
        if None in counts or len(counts) == MAX_COUNTED:
            return None
        total = sum(count for count in counts if count is not None)
        return min(total, self.options.max_records or total)

    def fingerprint(self) -> dict[str, Any]:
        """What the rows depend on: paths, sizes and times of files, or hub id and revision."""
        if self.options.hub_id is not None:
            return {k: getattr(self.options, k) for k in ("hub_id", "revision", "split")}
        files = {"files": [stat_of(file) for file in find_files(self.options)]}
        image_dir = self.options.image_dir
        return files if image_dir is None else files | {"image_dir": image_dir}


def stat_of(file: DataFile) -> list[Any]:
    """Path, size and modification time: a changed file has another fingerprint."""
    stat = file.path.stat()
    return [str(file.path.resolve()), stat.st_size, stat.st_mtime_ns]
