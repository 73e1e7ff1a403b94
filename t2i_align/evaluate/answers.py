"""Stored answers: what models said of pictures, as it was said, one line a picture.

    {"answers": 1, "benchmark": "geneval", "options": {...}, "protocol": {...}}     the first line
    {"id": "00012", "number": 0, "picture_sha256": "...", "answer": {...}}

The first line says what answered, so a file that is moved away keeps its origin. A file without it
can be read too; then nothing is known of where its answers come from. Lines are appended as answers
come, so a torn last line is dropped; the finished file is written anew in the benchmark's order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Answer, Picture
from t2i_align.plain_json import loads

FORMAT = 1
Key = tuple[str, int]


@dataclass(frozen=True)
class Stored:
    """One answer.

    Args:
        answer: raw.
        sha256: of the picture's file, None where there was none.
    """

    answer: Answer
    sha256: str | None = None


@dataclass(frozen=True)
class AnswerFile:
    """A file of answers.

    Args:
        header: its first line, empty without one.
        rows: by prompt id and picture number.
    """

    header: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[Key, Stored] = field(default_factory=dict)


def key_of(picture: Picture) -> Key:
    """What a picture's answer is found by."""
    return picture.item.id, picture.number


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def header_line(benchmark: str, options: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """The first line of a file."""
    facts = {"answers": FORMAT, "benchmark": benchmark, "options": options, "protocol": protocol}
    return json.dumps(facts) + "\n"


def answer_line(picture: Picture, stored: Stored) -> str:
    """One answer as a line."""
    row = {"id": picture.item.id, "number": picture.number}
    return json.dumps(row | {"picture_sha256": stored.sha256, "answer": stored.answer}) + "\n"


def read_answers(file: Path) -> AnswerFile:
    """A file of answers; the last line may be torn.

    Raises:
        DataError: there is no such file, a line is no answer, or two answer one picture.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read answers from {file}: {error}") from error
    header: dict[str, Any] = {}
    rows: dict[Key, Stored] = {}
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line's end is torn
        row = _object(file, number, line)
        if number == 1 and "answers" in row:
            header = _header(file, row)
            continue
        key, stored = _answer(file, number, row)
        if key in rows:
            raise DataError(f"{file}:{number}: picture {key[1]} of prompt {key[0]} comes twice")
        rows[key] = stored
    return AnswerFile(header, rows)


def _object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = loads(line)
    except ValueError as error:
        raise DataError(f"{file}:{number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{file}:{number} holds no JSON object")
    return row


def _header(file: Path, row: dict[str, Any]) -> dict[str, Any]:
    if row["answers"] != FORMAT:
        raise DataError(
            f"{file} has format {row['answers']!r}, this version reads {FORMAT}",
            "install the version of t2i-align that wrote it",
        )
    return row


def _answer(file: Path, number: int, row: dict[str, Any]) -> tuple[Key, Stored]:
    name, index, answer = row.get("id"), row.get("number"), row.get("answer")
    whole = isinstance(index, int) and not isinstance(index, bool) and index >= 0
    if not isinstance(name, str) or not whole or not isinstance(answer, dict):
        raise DataError(
            f"{file}:{number}: an answer is {{id: text, number: whole number, answer: object}}"
        )
    return (name, int(index or 0)), Stored(answer, row.get("picture_sha256"))


def write_answers(
    file: Path, header: str, pictures: Sequence[Picture], rows: Mapping[Key, Stored]
) -> None:
    """Put the finished file in its place: the header, then the answers in the pictures' order."""
    lines = (answer_line(p, rows[key_of(p)]) for p in pictures if key_of(p) in rows)
    write_whole(file, (header, *lines))


def write_whole(file: Path, lines: Iterable[str]) -> None:
    """Write a text file that has its name only when it is whole."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(lines)
    temporary.replace(file)
