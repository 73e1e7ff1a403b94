"""One HTML file that shows a comparison: numbers, pictures with their boxes, curves, provenance.

The file needs nothing else: pictures are data addresses, figures inline SVG, and its own content
policy forbids scripts and every request. Prompts and reasons are untrusted text and are escaped.
Pictures are chosen by position, never by looks: the first of each task, and apart from them those
whose verdict changed. Equal inputs give an equal file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.errors import DataError
from t2i_align.evaluate.aggregate import Interval, macro_mean
from t2i_align.evaluate.compare import bounds, compare, read_rows, table, value_of
from t2i_align.evaluate.figures import CURVES, Bar, bars, curves
from t2i_align.evaluate.gallery import Pair, choose, pairs_of
from t2i_align.evaluate.pages import Section, render, write
from t2i_align.evaluate.provenance import (
    commands,
    facts_of,
    read_object,
    recipe_yaml,
    sides_table,
    versions,
    weights,
)

EXCLUDES_0 = {
    1: "The interval lies above 0: the model after is better than the one before by more than the "
    "choice of prompts explains.",
    -1: "The interval lies below 0: the model after is worse than the one before by more than the "
    "choice of prompts explains.",
    0: "The interval includes 0: these pictures do not show that the two models differ.",
}
NO_INTERVAL = "There is no interval: one prompt does not tell how the models do on others."

MARKS = {
    **{"repaired": "repaired", "broken": "broken", "equal": "equal score"},
    **{"right": "right both times", "wrong": "wrong both times"},
}
Numbers = Mapping[str, list[float]]
PROMPTS = {True: "held-out prompts", False: "training prompts", None: "the benchmark's prompts"}


@dataclass(frozen=True)
class Run:
    """What the report says of a training run.

    Args:
        folder: as it was given.
        facts: its summary, as a table of two columns.
        figure: SVG of the curves, None without metrics.
        label: the curves in words.
        recipe: as YAML, empty without ``run.json``.
    """

    folder: Path
    facts: Section
    figure: str | None
    label: str
    recipe: str


def build_report(
    before: Path,
    after: Path,
    out: Path,
    *,
    runs: Sequence[Path] = (),
    extras: Sequence[Section] = (),
    title: str = "Alignment report",
    result: dict[str, Any] | None = None,
) -> Path:
    """Write the report of two evaluations; an older file is replaced when the new one is whole.

    Args:
        before: evaluation folder of the baseline.
        after: of the other model, same prompts and noise.
        out: the HTML file.
        runs: output folders of the training runs that led from one to the other.
        extras: further sections, shown after the training runs.
        title: heading of the page.
        result: what :func:`~t2i_align.evaluate.compare.compare` says of the two; None: ask it.

    Returns:
        ``out``.

    Raises:
        DataError: the evaluations cannot be compared, a picture is missing, or a folder of
            ``runs`` holds no run.
        StorageError: the file cannot be written.
    """
    result = compare(before, after) if result is None else result
    rows = read_rows(before), read_rows(after)
    facts = facts_of(before), facts_of(after)
    chosen = choose((before, after), *rows)
    pairs = pairs_of((before, after), *rows, chosen.every)
    page = dict(
        title=title,
        headline=headline(result, facts[0]["protocol"], len(rows[0])),
        table=Section("", rows=table(result)),
        bars=bars(bar_rows(*rows, result), "bars"),
        tasks=[_task(t, line, chosen.tasks[t], pairs) for t, line in result["tasks"].items()],
        changed=_changed(result["overall"], chosen.changed, pairs),
        marks=MARKS,
        runs=[read_run(folder, f"run{k}") for k, folder in enumerate(runs)],
        extras=extras,
        sides=Section("", rows=sides_table((before, after), facts)),
        weights=Section("", rows=weights(facts, runs)),
        versions=Section("", rows=versions()),
        commands=commands((before, after), facts, runs, out),
    )
    return write(out, render("report", page))


def headline(result: Mapping[str, Any], protocol: Mapping[str, Any], num: int) -> dict[str, Any]:
    """What the top of the page says."""
    overall, graded = result["overall"], result["graded"]
    d = overall["difference"]
    known = d["low"] is not None
    sign = 0 if not known else 1 if d["low"] > 0 else -1 if d["high"] < 0 else 0
    return {
        "before": f"{overall['before']:.3f}",
        "after": f"{overall['after']:.3f}",
        "difference": f"{d['mean']:+.3f}",
        "interval": bounds(d, result.get("no_interval", ())),
        "win": overall["win"],
        "tie": overall["tie"],
        "lose": overall["lose"],
        "p": None if overall["mcnemar_p"] is None else f"{overall['mcnemar_p']:.2g}",
        "pictures": num,
        "rule": overall.get("rule", "mean of the tasks"),
        "what": "score" if overall["mcnemar_p"] is None else "share of right pictures",
        "held_out": bool(protocol.get("held_out", True)),
        "side": PROMPTS[protocol.get("held_out")],
        "sign": {1: "up", -1: "down", 0: "even"}[sign],
        "conclusion": EXCLUDES_0[sign] if known else NO_INTERVAL,
        "graded": f"{graded['before']:.3f} to {graded['after']:.3f}, difference "
        f"{graded['difference']['mean']:+.3f} {bounds(graded['difference'])}",
    }


def bar_rows(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], result: Mapping[str, Any]
) -> list[Bar]:
    """The chart's rows: every task, then overall."""
    names = list(result["tasks"])
    groups = {t: [r["prompt"] for r in before if r["tag"] == t] for t in names}
    sides = [
        {t: [value_of(r) for r in rows if r["tag"] == t] for t in names} for rows in (before, after)
    ]
    made = [
        Bar(t, *_sides({t: sides[0][t]}, {t: sides[1][t]}, {t: groups[t]}), _gain(line))
        for t, line in result["tasks"].items()
    ]
    if result["overall"].get("rule") == "mean of the pictures":
        sides = [{"": [x for v in side.values() for x in v]} for side in sides]
        groups = {"": [p for prompts in groups.values() for p in prompts]}
    return [*made, Bar("overall", *_sides(sides[0], sides[1], groups), _gain(result["overall"]))]


def _sides(
    before: Numbers, after: Numbers, groups: Mapping[str, list[str]]
) -> tuple[Interval, Interval]:
    """Means of both sides."""
    return _mean(before, groups), _mean(after, groups)


def _mean(values: Numbers, groups: Mapping[str, list[str]]) -> Interval:
    """Mean of the tasks' means with its interval; of no width where a task has a single prompt."""
    if all(len(set(prompts)) > 1 for prompts in groups.values()):
        return macro_mean(values, groups)
    mean = sum(sum(v) / len(v) for v in values.values()) / len(values)
    return Interval(mean, mean, mean)


def _gain(line: Mapping[str, Any]) -> Interval:
    """The difference of a row; of no width where it has no interval."""
    d = line["difference"]
    low, high = (d["mean"] if d[k] is None else d[k] for k in ("low", "high"))
    return Interval(d["mean"], low, high)


def _task(
    name: str, line: Mapping[str, Any], numbers: Sequence[int], pairs: Mapping[int, Pair]
) -> dict[str, Any]:
    """One task's grid."""
    total = line["win"] + line["tie"] + line["lose"]
    return {"name": name, "line": line, "total": total, "pairs": [pairs[k] for k in numbers]}


def _changed(
    overall: Mapping[str, Any], chosen: Mapping[str, Sequence[int]], pairs: Mapping[int, Pair]
) -> list[dict[str, Any]]:
    """The grids of both kinds of change."""
    totals = {"repaired": overall["win"], "broken": overall["lose"]}
    return [
        {"name": name, "total": total, "pairs": [pairs[k] for k in chosen[name]]}
        for name, total in totals.items()
    ]


def read_run(folder: Path, name: str) -> Run:
    """What a training run left behind.

    Args:
        folder: its output folder.
        name: starts the ids of its figure.

    Raises:
        DataError: the folder holds neither a recipe nor metrics.
    """
    metrics_file, run_file = folder / "metrics.jsonl", folder / "run.json"
    if not metrics_file.is_file() and not run_file.is_file():
        raise DataError(
            f"{folder} holds no training run (neither run.json nor metrics.jsonl)",
            "give the output_dir of a recipe that was trained",
        )
    metrics = read_metrics(metrics_file)
    shown = [title for key, title in CURVES.items() if any(key in m for m in metrics)]
    summary = read_object(folder / "summary.json")
    seconds = {f"seconds, {k}": v for k, v in summary.get("seconds", {}).items()}
    plain = {k: v for k, v in summary.items() if isinstance(v, int | float | str) and k != "format"}
    rows = [{"fact": k.replace("_", " "), "value": v} for k, v in (plain | seconds).items()]
    return Run(
        folder,
        Section("", rows=rows),
        curves(metrics, name),
        f"Curves of {folder}, raw and smoothed, by step: {', '.join(shown)}",
        recipe_yaml(read_object(run_file).get("recipe", {})),
    )


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` up to the first that is torn; none without the file."""
    found: list[dict[str, Any]] = []
    if not file.is_file():
        return found
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def read_extras(file: Path) -> list[Section]:
    """Sections out of a summary: its ``sections``, and its ``seconds`` by phase.

    Args:
        file: JSON, ``{"seconds": {phase: number}, "sections": [{"title", "text", "rows"}], ...}``;
            both are optional, other keys belong to others.

    Raises:
        DataError: no such file, or a part of it has another form.
    """
    if not file.is_file():
        raise DataError(f"no summary at {file}", "give the JSON file of a quickstart")
    summary = read_object(file)
    seconds, sections = summary.get("seconds", {}), summary.get("sections", [])
    form = "{'title': text, 'text': text, 'rows': [objects]}"
    for entry in sections:
        known = isinstance(entry, dict) and set(entry) <= {"title", "text", "rows"}
        if not known or "title" not in entry:
            raise DataError(f"{file}: a section is {form}, got {entry!r}")
    if not isinstance(seconds, dict):
        raise DataError(f"{file}: seconds are {{phase: number}}, got {seconds!r}")
    made = [Section(e["title"], e.get("text", ""), e.get("rows", ())) for e in sections]
    if seconds:
        rows = [{"phase": k, "seconds": v} for k, v in seconds.items()]
        made.append(Section("Seconds by phase", rows=rows))
    return made
