"""One evaluation as a page: its numbers, published ones made alike, right and wrong verdicts.

Pictures are chosen by position, never by looks: of each task the first that are right and the first
that are wrong, with their boxes and the reason. A picture without a verdict is shown with its score
among the better or the worse half of its task. Equal inputs give an equal file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from t2i_align.errors import DataError
from t2i_align.evaluate.compare import read_rows, value_of
from t2i_align.evaluate.gallery import MAX_BYTES, picture, picture_root, shown_bytes
from t2i_align.evaluate.pages import Section, render, write
from t2i_align.evaluate.provenance import eval_command, read_object, sha256
from t2i_align.evaluate.published import beside

PER_KIND = 12  # of a task, right and wrong ones each
Rows = Sequence[Mapping[str, Any]]


def lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A summary for the terminal: tasks, total, and what limits it."""
    found = [(task, f"{mean:.3f}") for task, mean in result["tasks"].items()]
    overall = result["overall"]
    bounds = f"[{overall['low']:.3f}, {overall['high']:.3f}]"
    found.append(("overall", f"{overall['mean']:.3f}  {bounds}"))
    if result.get("layout"):
        found.append(("pictures read as", result["layout"]))
    if result["partial"]:
        counts = f"{result['images_found']} of {result['images_expected']} pictures"
        found.append(("PARTIAL", f"{counts}; not a score of this benchmark"))
    return found


def halves(rows: Rows) -> dict[str, tuple[list[int], list[int]]]:
    """Positions of good and bad rows by task.

    Right and wrong where there are verdicts; else above the task's median score, or not.
    """
    tasks: dict[str, list[int]] = defaultdict(list)
    for k, row in enumerate(rows):
        tasks[row["tag"]].append(k)
    found = {}
    for task, positions in tasks.items():
        values = {k: value_of(dict(rows[k])) for k in positions}
        bar = 0.5 if rows[positions[0]]["correct"] is not None else median(values.values())
        good = [k for k in positions if values[k] > bar]
        found[task] = (good, [k for k in positions if values[k] <= bar])
    return found


def build_run_report(folder: Path, out: Path, *, title: str | None = None) -> Path:
    """Write the page of an evaluation folder; an older file is replaced when the new one is whole.

    Args:
        folder: of the evaluation.
        out: the HTML file.
        title: heading; the benchmark and what was evaluated when left out.

    Returns:
        ``out``.

    Raises:
        DataError: the folder holds no finished evaluation.
        StorageError: the file cannot be written.
    """
    summary = read_object(folder / "summary.json")
    if "overall" not in summary:
        raise DataError(f"{folder} holds no finished evaluation", "run `t2i-align eval` into it")
    rows = read_rows(folder)
    protocol = summary["protocol"]
    page = {
        "title": title or f"{protocol['benchmark']}: {_subject(summary)}",
        "summary": summary,
        "numbers": Section("", rows=numbers(summary, rows)),
        "tables": [Section(name, rows=_pairs(t)) for name, t in summary.get("tables", {}).items()],
        "besides": besides(folder),
        "published": [published_section(found) for found in beside(summary)],
        "tasks": galleries(folder, rows),
        "boxed": any(row.get("detections") for row in rows),
        "facts": Section("", rows=facts(folder, summary)),
        "command": " ".join(["t2i-align", *eval_command(folder, summary)]),
    }
    return write(out, render("run", page))


def besides(folder: Path) -> list[Section]:
    """Sections of ``beside.json``: diversity, drift, held-out judges; none without it."""
    found = read_object(folder / "beside.json").get("sections", [])
    return [Section(s["title"], s.get("text", ""), s.get("rows", ())) for s in found]


def _subject(summary: Mapping[str, Any]) -> str:
    named = [summary[k] for k in ("model", "lora", "denoiser") if summary.get(k)]
    return " + ".join(map(str, named)) or "pictures made elsewhere"


def _pairs(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"": k, "value": v} for k, v in table.items()]


def numbers(summary: Mapping[str, Any], rows: Rows) -> list[dict[str, Any]]:
    """The table of tasks: mean, pictures, prompts."""
    found = []
    for task, mean in summary["tasks"].items():
        own = [r for r in rows if r["tag"] == task]
        counts = {"pictures": len(own), "prompts": len({r["prompt"] for r in own})}
        if not own:  # the benchmark's tasks are no parts of its pictures, e.g. kinds of questions
            counts = dict.fromkeys(counts)
        found.append({"task": task, "score": mean, **counts})
    overall = summary["overall"]
    prompts = len({r["prompt"] for r in rows})
    total = {"score": overall["mean"], "pictures": len(rows), "prompts": prompts}
    return [*found, {"task": "overall", **total}]


def published_section(found: Mapping[str, Any]) -> Section:
    """A published table beside ours, or why it does not stand there."""
    origin = f"{found['source']}; {found['read']}."
    if found["differ"]:
        why = f"Not set beside ours, made otherwise: {'; '.join(found['differ'])}."
        return Section(found["title"], f"{origin}\n\n{why}")
    open_ends = ", ".join(found["unstated"])
    known = f"Not stated on one side: {open_ends}." if open_ends else "Every field agrees."
    return Section(found["title"], f"{origin}\n\n{known}", found["rows"])


def galleries(folder: Path, rows: Rows) -> list[dict[str, Any]]:
    """Of each task the first good and the first bad pictures that fit; none without pictures."""
    root = picture_root(folder)
    there = {k for k, r in enumerate(rows) if (root / r["filename"]).is_file()}
    if not there:
        return []
    sides = {t: [[k for k in s if k in there] for s in two] for t, two in halves(rows).items()}
    limit = PER_KIND
    while True:
        chosen = [k for two in sides.values() for side in two for k in side[:limit]]
        size = sum(shown_bytes(root / rows[k]["filename"]) for k in chosen) * 4 / 3
        if size <= MAX_BYTES or limit == 1:
            break
        limit //= 2
    return [
        {
            "name": task,
            "kinds": [
                {
                    "name": name,
                    "total": len(side),
                    "cards": [_card(folder, rows[k]) for k in side[:limit]],
                }
                for name, side in zip(_names(rows, task), two, strict=True)
            ],
        }
        for task, two in sides.items()
    ]


def _names(rows: Rows, task: str) -> tuple[str, str]:
    first = next(r for r in rows if r["tag"] == task)
    verdicts = first["correct"] is not None
    return ("right", "wrong") if verdicts else ("above the median", "not above the median")


def _card(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    about = f"{row.get('id', '')}, picture {row.get('number', row['image'])}"
    return {"prompt": row["prompt"], "about": about, "picture": picture(folder, dict(row), "")}


def facts(folder: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything a number depends on, a line each."""
    skip = {"protocol", "options", "tasks", "overall", "graded", "tables", "versions"}
    found = {"folder": str(folder)} | {k: v for k, v in summary.items() if k not in skip}
    found |= {"sha256 of results.jsonl": sha256(folder / "results.jsonl")}
    found |= {
        k: v if isinstance(v, bool | int | float) else _text(v)
        for k, v in summary["protocol"].items()
    }
    found |= {f"version of {k}": v for k, v in summary.get("versions", {}).items()}
    return [{"": k, "value": v} for k, v in found.items()]


def _text(value: Any) -> str | None:
    import json

    return value if value is None or isinstance(value, str) else json.dumps(value)
