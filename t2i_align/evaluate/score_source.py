"""Pictures and their prompts as a stream: folders, globs, single files, tables, WebDataset shards.

Where a prompt comes from, first match wins:

    --prompt TEXT            one for all
    --prompts FILE           one line a picture, in the order of the pictures
    a table                  parquet, jsonl or json with an image and a prompt column; a row may
                             hold two pictures (jpg_0 and jpg_1, chosen and rejected, path1 and
                             path2) or a list (images)
    a shard (.tar)           files that share a name up to the first dot: a picture and .txt or
                             .json (``prompt``, ``text`` or ``caption``)
    <folder>/metadata.jsonl  lines with ``file_name`` and ``prompt`` or ``text``
    GenEval's layout         <folder>/metadata.jsonl with ``prompt``, pictures in <folder>/samples
    a sidecar                a.txt beside a.png

Nothing is held but what is being read, so a table may be larger than memory. A first pass without
pictures (:meth:`Pictures.survey`) counts them and finds missing prompts before any work is done.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2i_align.contract import Media, MediaError
from t2i_align.errors import DataError, UserError
from t2i_align.plain_json import loads

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
TABLES = (".parquet", ".jsonl", ".json")
SHARDS = (".tar",)
IMAGE_COLUMNS = ("image", "file_name", "filename", "path", "jpg", "png")
PAIR_COLUMNS = (("jpg_0", "jpg_1"), ("chosen", "rejected"), ("path1", "path2"))
PROMPT_COLUMNS = ("prompt", "text", "caption")
METADATA = "metadata.jsonl"
MAX_NAMED = 3


@dataclass(frozen=True)
class Entry:
    """One picture.

    Args:
        name: file, ``table:row`` or ``shard:key.suffix``; ``#k`` follows where a row holds several.
        media: the picture, not read yet where it is a file.
        prompt: None where none is known.
        problem: why there is no usable picture, None otherwise.
        group: what it is compared within, for labels.
        stamp: size and time of its file, for labels that are kept.
    """

    name: str
    media: Media
    prompt: str | None
    problem: str | None = None
    group: str | None = None
    stamp: str | None = None


class Pictures:
    """The pictures of some paths, in a fixed order; may be iterated again and again.

    Args:
        paths: folders, pictures, tables, shards, globs of them, or files of ``bundled/``.
        prompt: one prompt for all.
        prompts: file with one prompt a line.

    Raises:
        DataError: a path is missing or of no known kind.
        UserError: both ``prompt`` and ``prompts`` are given.
    """

    def __init__(
        self, paths: Sequence[Path], prompt: str | None = None, prompts: Path | None = None
    ) -> None:
        """Find the places; read none of them."""
        if prompt is not None and prompts is not None:
            raise UserError("--prompt and --prompts were both given", "give one of them")
        self.places = [place for path in paths for place in _places(path)]
        self.prompt = prompt
        self.lines = None if prompts is None else _lines(prompts)
        self.prompts = prompts

    def __iter__(self) -> Iterator[Entry]:
        """Stream them with their prompts."""
        return self._prompted(e for place in self.places for e in _entries(place, bare=False))

    def _prompted(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        if self.prompt is not None:
            return (replace(e, prompt=self.prompt) for e in entries)
        if self.lines is not None:
            pairs = zip(entries, self.lines, strict=True)
            return (replace(e, prompt=line) for e, line in pairs)
        return map(_checked, entries)

    def survey(self) -> int:
        """How many pictures there are; pictures themselves are not read where that can be avoided.

        Raises:
            DataError: a place holds none, prompts and pictures differ in number, or a picture has
                no prompt.
        """
        total, named, unknown = 0, [], 0
        for place in self.places:
            before = total
            for entry in _entries(place, bare=True):
                total += 1
                if self.prompt is None and self.lines is None:
                    _checked(entry)
                if entry.prompt is None:
                    unknown += 1
                    named += [entry.name] if unknown <= MAX_NAMED else []
            if total == before:
                raise DataError(f"no pictures in {place}", f"looked for {', '.join(PICTURES)}")
        if self.lines is not None and len(self.lines) != total:
            raise DataError(
                f"{self.prompts} has {len(self.lines)} lines and there are {total} pictures",
                "write one prompt a line, in the order pictures are listed (sorted by path)",
            )
        if unknown and self.prompt is None and self.lines is None:
            raise _no_prompt(named, unknown - len(named))
        return total

    def fingerprint(self) -> dict[str, Any]:
        """What the stream depends on: paths, sizes and times of files, and prompts given.

        Pictures that a table names by a path are not looked at.
        """
        digest = hashlib.sha256()
        for place in self.places:
            for file in _files(place):
                stat = file.stat()
                digest.update(json.dumps([str(file), stat.st_size, stat.st_mtime_ns]).encode())
        for line in self.lines or ():
            digest.update(json.dumps(line).encode())
        return {"files": digest.hexdigest(), "prompt": self.prompt}

    def pick(self, positions: Iterable[int]) -> dict[int, Entry]:
        """Entries by position; one pass up to the last of them."""
        wanted = set(positions)
        until = max(wanted, default=-1) + 1
        stream = enumerate(itertools.islice(self, until))
        return {k: entry for k, entry in stream if k in wanted}


def _no_prompt(names: Sequence[str], more: int) -> DataError:
    others = f" and {more} more" if more else ""
    return DataError(
        f"no prompt is known for {', '.join(names)}{others}",
        "give --prompt TEXT for all, --prompts FILE with a line each, a.txt beside a.png, or "
        'a metadata.jsonl with {"file_name": ..., "prompt": ...}',
    )


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read the prompts of {file}: {error}") from error


def _places(path: Path) -> list[Path]:
    """A path as the files or folders it stands for.

    Raises:
        DataError: nothing there, or of no known kind.
    """
    from t2i_align.data.rows import local_path

    path = local_path(str(path))
    if path.is_dir():
        return _tables_of(path) if _first_picture(path) is None else [path]
    if path.exists():
        _kind(path)
        return [path]
    hits = [Path(hit) for hit in sorted(glob.glob(str(path), recursive=True))]
    known = [hit for hit in hits if hit.is_dir() or hit.suffix.lower() in _READERS]
    if not known:
        raise DataError(f"nothing at {path}", "check the path; quote a glob")
    return [place for hit in known for place in _places(hit)]


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise DataError(
            f"{path}: neither a picture nor a table",
            f"pictures: {', '.join(PICTURES)}; tables: {', '.join(TABLES)}; "
            f"shards: {', '.join(SHARDS)}",
        )
    return suffix


def _first_picture(folder: Path) -> Path | None:
    return next((p for p in _walk(folder) if p.suffix.lower() in PICTURES), None)


def _tables_of(folder: Path) -> list[Path]:
    """Tables and shards below a folder that holds no picture.

    Raises:
        DataError: none of those either.
    """
    found = [p for p in _walk(folder) if p.suffix.lower() in (*TABLES, *SHARDS)]
    if not found:
        looked = (*PICTURES, *TABLES, *SHARDS)
        raise DataError(f"no pictures in {folder}", f"looked for {', '.join(looked)}")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder in the order of sorted paths, a directory in memory at a time.

    Names that begin with a dot are left out: parts of a call that was stopped lie under such a one.
    """
    with os.scandir(folder) as listing:
        entries = sorted((e for e in listing if e.name[0] != "."), key=lambda e: e.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name)
        elif entry.is_file():
            yield folder / entry.name


def _files(place: Path) -> Iterator[Path]:
    """Files a place's entries depend on."""
    if place.is_file():
        sidecars = (place.with_suffix(".txt"), place.absolute().parents[1] / METADATA)
        yield place
        yield from (f for f in sidecars if place.suffix.lower() in PICTURES and f.is_file())
        return
    for file in _walk(place):
        if file.suffix.lower() in (*PICTURES, ".txt") or file.name == METADATA:
            yield file


def _entries(place: Path, bare: bool) -> Iterator[Entry]:
    """Entries of a place; ``bare`` ones may hold empty bytes instead of a picture."""
    if place.is_dir():
        return _folder(place)
    return _READERS[_kind(place)](place, bare)


def _folder(folder: Path) -> Iterator[Entry]:
    """Pictures below a folder; those a metadata.jsonl names are taken from it, in its order."""
    named: set[Path] = set()
    for file in (f for f in _walk(folder) if f.name == METADATA):
        if not (file.parent / "samples").is_dir():
            for entry in _table(file, bare=False):
                path = entry.media.data
                if not isinstance(path, Path) or path not in named:
                    yield entry
                if isinstance(path, Path):
                    named.add(path)
    for path in _walk(folder):
        if path.suffix.lower() in PICTURES and path not in named and not _is_grid(path):
            yield from _picture(path, bare=False)


def _is_grid(path: Path) -> bool:
    """Whether a picture shows all samples of a GenEval folder."""
    layout = (path.parent / "samples").is_dir() and (path.parent / METADATA).is_file()
    return path.name == "grid.png" and layout


def _picture(path: Path, bare: bool) -> Iterator[Entry]:
    """One file with the prompt of GenEval's layout or of its sidecar."""
    metadata, sidecar = path.absolute().parents[1] / METADATA, path.with_suffix(".txt")
    prompt = None
    if path.parent.name == "samples" and metadata.is_file():
        try:
            prompt = loads(metadata.read_text(encoding="utf-8").splitlines()[0])["prompt"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"{metadata}: its first line has no prompt ({error})",
                'GenEval writes {"prompt": ..., "tag": ..., "include": [...]}',
            ) from error
    elif sidecar.is_file():
        try:
            prompt = sidecar.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError) as error:
            raise DataError(
                f"cannot read the prompt in {sidecar}: {error}", "save it as UTF-8"
            ) from error
    yield Entry(str(path), Media("image", path), prompt)


def _table(path: Path, bare: bool) -> Iterator[Entry]:
    """Rows of a table.

    Raises:
        DataError: unreadable, or no image column; names the columns.
    """
    from t2i_align.data.options import FileOptions
    from t2i_align.data.rows import Rows

    options = FileOptions.model_validate({"path": str(path)})
    either = ((*IMAGE_COLUMNS, *(pair[0] for pair in PAIR_COLUMNS), "images"),)
    more = (*PROMPT_COLUMNS, "reference", *(pair[1] for pair in PAIR_COLUMNS))
    rows = Rows(options, (), more, either)
    if bare and path.suffix == ".parquet":
        first = next(iter(rows)).cells
        if "images" not in first:  # else only reading says how many pictures a row has
            yield from _bare_parquet(path, first)
            return
    for number, row in enumerate(rows):
        for suffix, cell in _cells(row.cells):
            yield _from_cell(f"{path}:{number}", suffix, cell, row.cells, row.folder)


def _bare_parquet(path: Path, first: dict[str, Any]) -> Iterator[Entry]:
    """Names and prompts of a parquet file, its pictures unread."""
    from t2i_align.data.options import FileOptions
    from t2i_align.data.rows import Rows, parquet_file

    suffixes = [suffix for suffix, _ in _cells(first)]
    present = tuple(c for c in PROMPT_COLUMNS if c in first)
    cells: Iterable[dict[str, Any]]
    if present:
        rows = Rows(FileOptions.model_validate({"path": str(path)}), (), present)
        cells = (row.cells for row in rows)
    else:
        cells = itertools.repeat({}, parquet_file(path).metadata.num_rows)
    for number, row in enumerate(cells):
        said = _prompt(row)
        for suffix in suffixes:
            yield Entry(f"{path}:{number}{suffix}", Media("image", b""), said)


def _prompt(cells: dict[str, Any]) -> Any:
    return next((cells[c] for c in PROMPT_COLUMNS if cells.get(c)), None)


def _checked(entry: Entry) -> Entry:
    """An entry whose own prompt is used.

    Raises:
        DataError: it is no text, or one that no file can hold.
    """
    value: Any = entry.prompt
    if not isinstance(value, str | None):
        told = f"{entry.name}: the prompt is no text but {value!r}"
        raise DataError(told, "give --prompt or --prompts, or a column of strings")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{entry.name}: the prompt is no valid Unicode: {error.reason}") from error
    return entry


def _cells(cells: dict[str, Any]) -> list[tuple[str, Any]]:
    """(suffix of the name, cell) of every picture of a row."""
    for pair in PAIR_COLUMNS:
        if pair[0] in cells:
            return [(f"#{k}", cells.get(column)) for k, column in enumerate(pair)]
    if isinstance(cells.get("images"), list):
        return [(f"#{k}", cell) for k, cell in enumerate(cells["images"])]
    return [("", next((cells[c] for c in IMAGE_COLUMNS if cells.get(c) is not None), None))]


def _from_cell(
    place: str, suffix: str, cell: Any, cells: dict[str, Any], folder: Path | None
) -> Entry:
    """An entry of a table's cell; a ``reference`` column goes into the medium's meta."""
    from t2i_align.data.media import cell_media

    name, prompt = place + suffix, _prompt(cells)
    try:
        media = cell_media("image", cell, folder)
        if cells.get("reference") is not None:
            reference = cell_media("image", cells["reference"], folder)
            media = replace(media, meta={"reference": reference})
    except MediaError as error:
        return Entry(name, Media("image", b""), prompt, str(error))
    return Entry(str(media.data) if isinstance(media.data, Path) else name, media, prompt)


def _shard(path: Path, bare: bool) -> Iterator[Entry]:
    """Pictures of a WebDataset shard."""
    from t2i_align.evaluate.score_shards import samples

    for sample in samples(path, PICTURES, PROMPT_COLUMNS, bare=bare):
        for suffix, found in sample.pictures.items():
            problem = found if isinstance(found, str) else None
            media = Media("image", found if isinstance(found, bytes) else b"")
            yield Entry(f"{path}:{sample.key}{suffix}", media, sample.prompt, problem)


_READERS = {
    **dict.fromkeys(PICTURES, _picture),
    **dict.fromkeys(TABLES, _table),
    **dict.fromkeys(SHARDS, _shard),
}
