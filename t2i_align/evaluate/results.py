"""What an evaluation writes when it is done: a row a picture, and a summary that says of what.

``results.jsonl`` has a line for each picture: verdict, reason, the raw answer's detections;
``summary.json`` the tasks, the total with its interval, protocol, model, hashes, versions, counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from t2i_align import __version__
from t2i_align.errors import DataError
from t2i_align.evaluate.aggregate import Interval, macro_mean
from t2i_align.evaluate.answers import write_whole
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.pictures import draws
from t2i_align.optional import version_of

FORMAT = 1
GRADED = "graded"  # the part of a verdict that orders near misses, where a benchmark has one
PACKAGES = (
    *("torch", "diffusers", "transformers", "torchvision"),
    *("open_clip_torch", "onnxruntime", "rapidocr-onnxruntime", "numpy", "pillow"),
)
Row = dict[str, Any]


def items_sha256(items: Sequence[Item]) -> str:
    """SHA-256 of prompts, tasks and metadata in order, for benchmarks without a prompt file."""
    rows = ({"prompt": i.prompt, "task": i.task, "metadata": dict(i.metadata)} for i in items)
    text = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def rows_of(
    pictures: Sequence[Picture],
    answers: Sequence[Answer],
    verdicts: Sequence[Verdict],
    root: Path,
) -> list[Row]:
    """A row a picture.

    Args:
        pictures: that were judged.
        answers: about each.
        verdicts: on each.
        root: what file names are relative to.

    Raises:
        DataError: a score is no finite number, or there is not one verdict a picture.
    """
    if not len(pictures) == len(answers) == len(verdicts):
        counts = f"{len(answers)} answers and {len(verdicts)} verdicts"
        raise DataError(f"{len(pictures)} pictures have {counts}")
    return [
        _row(p, k, a, v, root)
        for p, k, a, v in zip(pictures, draws(pictures), answers, verdicts, strict=True)
    ]


def _row(picture: Picture, draw: int, answer: Answer, verdict: Verdict, root: Path) -> Row:
    item = picture.item
    if not math.isfinite(verdict.score):
        raise DataError(f"the score of picture {picture.number} of {item.id} is {verdict.score}")
    row: Row = {
        "filename": str(picture.file.relative_to(root)),
        "id": item.id,
        "tag": item.task,
        "prompt": item.prompt,
        "number": picture.number,
        "image": draw,
        "correct": verdict.correct,
        "score": verdict.score,
        "reason": verdict.reason,
        GRADED: round(verdict.parts.get(GRADED, verdict.score), 6),
        "metadata": dict(item.metadata),
    }
    parts = {k: v for k, v in verdict.parts.items() if k != GRADED}
    row |= {"parts": parts} if parts else {}
    return row | ({"detections": answer["detections"]} if "detections" in answer else {})


def by_task(rows: Sequence[Row], key: str) -> tuple[dict[str, list], dict[str, list]]:
    """Values and prompts by task."""
    values, groups = defaultdict(list), defaultdict(list)
    for row in rows:
        values[row["tag"]].append(float(row[key]))
        groups[row["tag"]].append(row["prompt"])
    return dict(values), dict(groups)


def write_rows(rows: Sequence[Row], out: Path) -> None:
    """``results.jsonl``, whole or not at all."""
    write_whole(out / "results.jsonl", (json.dumps(row) + "\n" for row in rows))


def summary_of(
    found: Summary, rows: Sequence[Row], facts: Mapping[str, Any], expected: int
) -> dict[str, Any]:
    """Everything a number means.

    Args:
        found: the benchmark's own numbers.
        rows: of the pictures they are made of.
        facts: protocol, model and hashes.
        expected: pictures the protocol asks for; where more than there are, the total is partial.
    """
    result: dict[str, Any] = {"format": FORMAT, "t2i_align": __version__, **facts}
    result["tasks"] = {name: float(mean) for name, mean in found.tasks.items()}
    result["overall"] = asdict(found.overall)
    graded = _graded(rows)
    result |= {} if graded is None else {"graded": asdict(graded)}
    result |= {"tables": {k: dict(v) for k, v in found.tables.items()}} if found.tables else {}
    return result | {
        "images": len(rows),
        "images_expected": expected,
        "images_found": len(rows),
        "partial": len(rows) < expected,
        "versions": versions(),
    }


def _graded(rows: Sequence[Row]) -> Interval | None:
    """Mean of the tasks' graded means; None where it is the score itself."""
    if all(row[GRADED] == round(row["score"], 6) for row in rows):
        return None
    values, groups = by_task(rows, GRADED)
    return interval(values, groups)


def interval(
    values: Mapping[str, Sequence[float]], groups: Mapping[str, Sequence[Any]]
) -> Interval:
    """Mean of the tasks' means; where a task has a single prompt, from least to greatest value."""
    try:
        return macro_mean({k: list(v) for k, v in values.items()}, dict(groups))
    except ValueError:
        means = [sum(v) / len(v) for v in values.values()]
        every = [x for v in values.values() for x in v]
        return Interval(sum(means) / len(means), min(every), max(every))


def versions() -> dict[str, str]:
    """Of Python and what the numbers depend on."""
    found = {name: version_of(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {k: v for k, v in found.items() if v}
