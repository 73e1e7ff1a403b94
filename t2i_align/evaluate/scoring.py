"""Scoring files on disk: find pictures and their prompts, ask judges, add up.

Where a prompt comes from, first match wins:

    --prompt TEXT            one for all
    --prompts FILE           one line a picture, in the order of the pictures
    a table                  parquet, jsonl or json with an image and a prompt column
    <folder>/metadata.jsonl  lines with ``file_name`` and ``prompt`` or ``text``
    GenEval's layout         <folder>/metadata.jsonl with ``prompt``, pictures in <folder>/samples
    a sidecar                a.txt beside a.png
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.contract import Media, MediaError
from t2i_align.errors import DataError, UserError

if TYPE_CHECKING:
    from rich.console import Console

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
TABLES = (".parquet", ".jsonl", ".json")
IMAGE_COLUMNS = ("image", "file_name", "filename", "path", "jpg", "png")
PROMPT_COLUMNS = ("prompt", "text", "caption")
DTYPES = ("float32", "bfloat16", "float16")
BATCH = 64


@dataclass(frozen=True)
class Entry:
    """One picture.

    Args:
        name: file, or ``table:row``.
        media: the picture, not read yet where it is a file.
        prompt: None where none is known.
        problem: why there is no usable picture, None otherwise.
    """

    name: str
    media: Media
    prompt: str | None
    problem: str | None = None


def collect(
    paths: Sequence[Path], prompt: str | None = None, prompts: Path | None = None
) -> list[Entry]:
    """Every picture below some paths, with its prompt.

    Raises:
        DataError: a path is missing or holds no picture, prompts and pictures differ in number, or
            a picture has no prompt.
        UserError: both ``prompt`` and ``prompts`` are given.
    """
    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts were both given", "give one of them")
    entries = [entry for path in paths for entry in _below(path)]
    if prompts is not None:
        entries = _numbered(entries, prompts)
    if prompt is not None:
        entries = [replace(e, prompt=prompt) for e in entries]
    unknown = [e.name for e in entries if e.prompt is None]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise DataError(
            f"no prompt is known for {', '.join(unknown[:3])}{more}",
            "give --prompt TEXT for all, --prompts FILE with a line each, a.txt beside a.png, or "
            'a metadata.jsonl with {"file_name": ..., "prompt": ...}',
        )
    return entries


def _numbered(entries: list[Entry], file: Path) -> list[Entry]:
    """One line of a file for each entry."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read the prompts of {file}: {error}") from error
    if len(lines) != len(entries):
        raise DataError(
            f"{file} has {len(lines)} lines and there are {len(entries)} pictures",
            "write one prompt a line, in the order pictures are listed (sorted by path)",
        )
    return [replace(e, prompt=line) for e, line in zip(entries, lines, strict=True)]


def _below(path: Path) -> list[Entry]:
    """Pictures of one path.

    Raises:
        DataError: nothing usable there.
    """
    if not path.exists():
        raise DataError(f"nothing at {path}", "check the path")
    if path.is_dir():
        found = _folder(path)
    elif path.suffix.lower() in TABLES:
        found = list(_table(path))
    elif path.suffix.lower() in PICTURES:
        found = [_picture(path)]
    else:
        raise DataError(
            f"{path}: neither a picture nor a table",
            f"pictures: {', '.join(PICTURES)}; tables: {', '.join(TABLES)}",
        )
    if not found:
        raise DataError(f"no pictures in {path}", f"looked for {', '.join(PICTURES)}")
    return found


def _folder(folder: Path) -> list[Entry]:
    """Pictures below a folder; those a metadata.jsonl names are taken from it, in its order."""
    named: dict[Path, Entry] = {}
    for file in sorted(folder.rglob("metadata.jsonl")):
        if not (file.parent / "samples").is_dir():
            named |= {Path(str(e.media.data)): e for e in _table(file)}
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    return [*named.values(), *(_picture(p) for p in files if p not in named)]


def _picture(path: Path) -> Entry:
    """One file with the prompt of GenEval's layout or of its sidecar."""
    metadata, sidecar = path.parents[1] / "metadata.jsonl", path.with_suffix(".txt")
    prompt = None
    if path.parent.name == "samples" and metadata.is_file():
        try:
            prompt = json.loads(metadata.read_text(encoding="utf-8").splitlines()[0])["prompt"]
        except (ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"{metadata}: its first line has no prompt ({error})",
                'GenEval writes {"prompt": ..., "tag": ..., "include": [...]}',
            ) from error
    elif sidecar.is_file():
        prompt = sidecar.read_text(encoding="utf-8").strip()
    return Entry(str(path), Media("image", path), prompt)


def _table(path: Path) -> Iterator[Entry]:
    """Rows of a table.

    Raises:
        DataError: unreadable, or no image column; names the columns.
    """
    from t2i_align.data.media import cell_media
    from t2i_align.data.options import FileOptions
    from t2i_align.data.rows import Rows

    rows = Rows(
        FileOptions.model_validate({"path": str(path)}), (), PROMPT_COLUMNS, (IMAGE_COLUMNS,)
    )
    for number, row in enumerate(rows):
        name = f"{path}:{number}"
        prompt = next((row.cells[c] for c in PROMPT_COLUMNS if row.cells.get(c)), None)
        cell = next((row.cells[c] for c in IMAGE_COLUMNS if row.cells.get(c) is not None), None)
        try:
            media = cell_media("image", cell, row.folder)
            name = str(media.data) if isinstance(media.data, Path) else name
            yield Entry(name, media, prompt)
        except MediaError as error:
            yield Entry(name, Media("image", b""), prompt, str(error))


@dataclass(frozen=True)
class Column:
    """What one judge said.

    Args:
        judge: its name.
        values: a number an entry, None where it failed.
        reasons: why it failed, None elsewhere.
    """

    judge: str
    values: list[float | None]
    reasons: list[str | None]

    @property
    def mean(self) -> float | None:
        """Mean of what could be scored; None when nothing could."""
        known = [v for v in self.values if v is not None]
        return math.fsum(known) / len(known) if known else None

    @property
    def failed(self) -> int:
        """How many have no number."""
        return sum(v is None for v in self.values)


def ask(
    name: str,
    entries: Sequence[Entry],
    *,
    device: str,
    dtype: str,
    normalized: bool,
    advance: Callable[[int], None],
) -> Column:
    """One judge on all entries.

    Raises:
        UserError: unknown judge, or nothing to normalise with.
    """
    import torch

    from t2i_align.judges.base import judge_card, load, normalizer

    scale = normalizer(judge_card(name)) if normalized else None
    judge = load(name, device, getattr(torch, dtype))
    column = Column(name, [], [])
    for start in range(0, len(entries), BATCH):
        part = entries[start : start + BATCH]
        found = judge.score([e.media for e in part], [e.prompt or "" for e in part])
        values = found.values if scale is None else scale(found.values)
        for entry, value, reason in zip(part, values.tolist(), found.reasons, strict=True):
            why = entry.problem or reason
            column.values.append(None if why else value)
            column.reasons.append(why)
        advance(len(part))
    return column


def device_of(name: str | None) -> str:
    """A device by name; a GPU if there is one when None.

    Raises:
        UserError: not a device of this machine.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device '{name}' cannot be used: {first}", "e.g. cpu, cuda:0") from error
    return name


def score_entries(
    entries: Sequence[Entry],
    judges: Sequence[str],
    console: Console,
    *,
    device: str | None = None,
    dtype: str = "float32",
    normalized: bool = False,
) -> list[Column]:
    """Every judge on every entry, with count, rate and rest on the console."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Rest

    from t2i_align.judges.base import judge_card

    for name in judges:  # a wrong name is reported before any work
        judge_card(name)
    where = device_of(device)
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rest())
    columns = []
    with Progress(*bars, TextColumn("{task.fields[rate]}"), console=console) as progress:
        for name in judges:
            task = progress.add_task(name, total=len(entries), rate="")
            start = time.monotonic()

            def advance(num: int, task: Any = task, start: float = start) -> None:
                progress.advance(task, num)
                done = progress.tasks[task].completed
                rate = f"{done / max(time.monotonic() - start, 1e-6):.1f}/s"
                progress.update(task, rate=rate)

            columns.append(
                ask(
                    name,
                    entries,
                    device=where,
                    dtype=dtype,
                    normalized=normalized,
                    advance=advance,
                )
            )
    return columns


def table(entries: Sequence[Entry], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """A row an entry: file, prompt, a number a judge, reasons of what has none."""
    rows = []
    for i, entry in enumerate(entries):
        whys = {c.judge: why for c in columns if (why := c.reasons[i]) is not None}
        rows.append(
            {"file": entry.name, "prompt": entry.prompt}
            | {c.judge: c.values[i] for c in columns}
            | {"reason": _reason(whys, len(columns))}
        )
    return rows


def _reason(whys: dict[str, str], num_judges: int) -> str:
    """Reasons in a line; once where all judges give the same."""
    if len(set(whys.values())) == 1 and (len(whys) == num_judges or num_judges == 1):
        return next(iter(whys.values()))
    return "; ".join(f"{name}: {why}" for name, why in whys.items())


def totals(columns: Sequence[Column]) -> dict[str, dict[str, Any]]:
    """Mean, scored and failed of each judge."""
    return {
        c.judge: {"mean": c.mean, "scored": len(c.values) - c.failed, "failed": c.failed}
        for c in columns
    }


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows with a header; what failed is an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A row a line; what failed is null."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(lines, encoding="utf-8")
    temporary.rename(path)


def shown(rows: Sequence[dict[str, Any]], limit: int = 50) -> list[dict[str, str]]:
    """The first rows for a terminal; a reason column only where something failed."""
    some = rows[:limit]
    failed = any(row["reason"] for row in some)
    return [{k: number(v) for k, v in row.items() if k != "reason" or failed} for row in some]


def number(value: float | str | None) -> str:
    """Four decimals, text as it is, NaN for what has no number."""
    if value is None:
        return "NaN"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
