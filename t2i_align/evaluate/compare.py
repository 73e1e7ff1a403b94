"""Two evaluations on the same prompts and the same noise, compared pair by pair.

What is compared of a picture is its verdict, or its score where a benchmark gives no verdicts. The
total follows the benchmark's own rule where that is the mean of the tasks or of the pictures (told
by which of the two gives the totals of both summaries); otherwise the mean of the tasks is compared
and the result says so.

Intervals are drawn over prompts, so a task with a single prompt has a difference and no interval,
and neither has a mean over tasks one of which is such; ``no_interval`` names these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from t2i_align.errors import DataError
from t2i_align.evaluate.aggregate import macro_difference, mcnemar, win_tie_lose
from t2i_align.plain_json import loads
from t2i_align.registry import nearest

Values = Mapping[str, np.ndarray]
Prompts = Mapping[str, Sequence[str]]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Result rows of an evaluation folder.

    Raises:
        DataError: there are none.
    """
    file = folder / "results.jsonl"
    if not file.is_file():
        raise DataError(f"no results.jsonl in {folder}", "run `t2i-align eval` into it first")
    try:
        rows = [loads(line) for line in file.read_bytes().splitlines()]
        for row in rows:
            _ = value_of(row), float(row["graded"]), row["prompt"] + row["tag"], int(row["image"])
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(f"{file} holds no results of `t2i-align eval`: {error!r}") from error
    return rows


def value_of(row: dict[str, Any]) -> float:
    """What a picture is worth: right or wrong, else its score."""
    return float(row["score"] if row["correct"] is None else row["correct"])


def read_protocol(folder: Path) -> dict[str, Any]:
    """How an evaluation folder was made.

    Raises:
        DataError: the folder holds no evaluation.
    """
    try:
        found = loads((folder / "protocol.json").read_bytes())["protocol"]
        return dict(found.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} holds no evaluation (protocol.json is missing or unreadable)",
            "run `t2i-align eval` into it first",
        ) from error


def same_protocol(a: Path, b: Path, despite: Sequence[str] = ()) -> list[str]:
    """Refuse to compare runs that differ in more than the model.

    Args:
        a: evaluation folder.
        b: the other.
        despite: protocol fields that differ on purpose.

    Returns:
        ``field: a and b`` of the fields named in ``despite`` that do differ.

    Raises:
        DataError: names the protocol fields that differ, or a field that is none.
    """
    first, second = read_protocol(a), read_protocol(b)
    for side in (first, second):
        if not side.get("replayed_with"):  # judged again by the rules of before
            side.pop("replayed_with", None)
    fields = list(first | second)
    for name in despite:
        if name not in fields:
            fix = nearest(name, fields) or f"fields: {', '.join(fields)}"
            raise DataError(f"--despite: the protocol has no field '{name}'", fix)
    sides = {k: (first.get(k), second.get(k)) for k in fields}
    differ = {k: f"{k}: {x} and {y}" for k, (x, y) in sides.items() if x != y}
    odd = [text for name, text in differ.items() if name not in despite]
    if odd:
        raise DataError(
            f"{a} and {b} were not evaluated alike: {'; '.join(odd)}",
            "evaluate both with the same options, or name a field that differs on purpose with "
            "--despite",
        )
    return list(differ.values())


def compare(a: Path, b: Path, despite: Sequence[str] = ()) -> dict[str, Any]:
    """Differences b - a by task and overall, with paired 95 % intervals, wins and losses.

    Args:
        a: evaluation folder of the baseline.
        b: of the other model.
        despite: protocol fields that differ on purpose; they are named in the result.

    Raises:
        DataError: they were not evaluated alike, or hold different prompts.
    """
    differing = same_protocol(a, b, despite)
    before, after = read_rows(a), read_rows(b)
    keys = [[(r["prompt"], r["image"]) for r in rows] for rows in (before, after)]
    if keys[0] != keys[1] or not before:
        raise DataError(
            f"{a} and {b} hold different prompts", "evaluate both with the same options"
        )
    first, second = ({t: np.array(v) for t, v in values_of(r).items()} for r in (before, after))
    groups: dict[str, list[str]] = {
        t: [r["prompt"] for r in before if r["tag"] == t] for t in first
    }
    tasks = {
        t: line(first[t], second[t], difference({t: first[t]}, {t: second[t]}, {t: groups[t]}))
        for t in first
    }
    graded = [np.array([r["graded"] for r in rows]) for rows in (before, after)]
    soft = [{"": values} for values in graded]
    return {
        "tasks": tasks,
        "overall": overall_line((a, b), (first, second), groups),
        "graded": {"before": float(graded[0].mean()), "after": float(graded[1].mean())}
        | {"difference": difference(soft[0], soft[1], {"": [r["prompt"] for r in before]})},
        "no_interval": [t for t, prompts in groups.items() if len(set(prompts)) < 2],
        "despite": differing,
    }


def values_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Values of the pictures by task, in the order the tasks come."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["tag"], []).append(value_of(row))
    return found


def overall_line(
    folders: tuple[Path, Path], sides: tuple[Values, Values], groups: Prompts
) -> dict[str, Any]:
    """The row of the total, with the rule it follows.

    Args:
        folders: of the evaluations.
        sides: values by task, of each.
        groups: prompts of the values.
    """
    rule = total_rule(folders, sides)
    x, y = (np.concatenate(list(side.values())) for side in sides)
    if rule == "mean of the pictures":
        every = [p for prompts in groups.values() for p in prompts]
        return line(x, y, difference({"": x}, {"": y}, {"": every})) | {"rule": rule}
    means = {"before": mean_of_tasks(sides[0]), "after": mean_of_tasks(sides[1])}
    return line(x, y, difference(*sides, groups)) | means | {"rule": rule}


def difference(before: Values, after: Values, groups: Prompts) -> dict[str, float | None]:
    """Plain mean over tasks of the paired difference, ``{mean, low, high}``.

    One prompt says nothing about others: where a task has no second one, low and high are None.

    Args:
        before: ``(n_t,)`` values of each task.
        after: of the same pictures.
        groups: their prompts.
    """
    if all(len(set(prompts)) > 1 for prompts in groups.values()):
        return asdict(macro_difference(before, after, groups))
    return {"mean": mean_of_tasks(after) - mean_of_tasks(before), "low": None, "high": None}


def line(x: np.ndarray, y: np.ndarray, gain: Mapping[str, float | None]) -> dict[str, Any]:
    """One row of the table.

    Args:
        x: values before.
        y: values after.
        gain: what :func:`difference` says of them.
    """
    counts = win_tie_lose(x, y)
    return {
        "before": float(x.mean()),
        "after": float(y.mean()),
        "difference": dict(gain),
        "win": counts.win,
        "tie": counts.tie,
        "lose": counts.lose,
        "mcnemar_p": mcnemar(x, y) if np.isin(np.concatenate([x, y]), (0, 1)).all() else None,
    }


def mean_of_tasks(values: Mapping[str, np.ndarray]) -> float:
    """Plain mean of the tasks' means."""
    return float(np.mean([v.mean() for v in values.values()]))


def total_rule(folders: tuple[Path, Path], sides: tuple[Any, Any]) -> str:
    """How the compared total is made of the pictures' values.

    Args:
        folders: of the evaluations.
        sides: values by task, of each.
    """
    from t2i_align.evaluate.provenance import read_object

    told = []
    for folder in folders:
        overall = read_object(folder / "summary.json").get("overall")
        mean = overall.get("mean") if isinstance(overall, dict) else None
        told.append(mean if isinstance(mean, int | float) else None)
    if None in told:
        return "mean of the tasks"
    if all(abs(t - mean_of_tasks(s)) < 1e-9 for t, s in zip(told, sides, strict=True)):
        return "mean of the tasks"
    pictures = [float(np.concatenate(list(s.values())).mean()) for s in sides]
    if all(abs(t - m) < 1e-9 for t, m in zip(told, pictures, strict=True)):
        return "mean of the pictures"
    return "mean of the tasks; the benchmark's own total follows another rule"


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for printing."""
    rows = []
    lines = [(name, r, ()) for name, r in result["tasks"].items()]
    for name, r, single in [*lines, ("overall", result["overall"], result.get("no_interval", ()))]:
        d = r["difference"]
        rows.append(
            {
                "task": name,
                "before": f"{r['before']:.3f}",
                "after": f"{r['after']:.3f}",
                "difference": f"{d['mean']:+.3f}",
                "95 % interval": bounds(d, single),
                "win/tie/lose": f"{r['win']}/{r['tie']}/{r['lose']}",
            }
        )
    return rows


def bounds(gain: Mapping[str, Any], single: Sequence[str] = ()) -> str:
    """An interval as text, or why there is none.

    Args:
        gain: ``{mean, low, high}``.
        single: tasks with a single prompt.
    """
    if gain["low"] is None:
        return f"none: one prompt ({', '.join(single)})" if single else "none: one prompt"
    return f"[{gain['low']:+.3f}, {gain['high']:+.3f}]"


def mcnemar_line(result: Mapping[str, Any]) -> str | None:
    """McNemar's test of all pictures in a sentence; None where scores are no verdicts."""
    p = result["overall"]["mcnemar_p"]
    if p is None:
        return None
    return f"McNemar's exact test, which takes pictures as independent: p = {p:.2g}"
