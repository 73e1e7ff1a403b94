"""How often one model's picture beats another's, for the judge that counts and those held out.

Two evaluation folders of one protocol hold the same prompts and noise. With x_i and y_i a judge's
numbers of pair i (negated where less is better),

    (1)  win rate = mean of w_i,    w_i = 1 if y_i > x_i, 1/2 if y_i = x_i, else 0

and an interval over prompts. A model that was trained on one judge and gained nothing else beats
the base with that judge and not with the held-out ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2i_align.errors import DataError, UserError
from t2i_align.evaluate.aggregate import Interval, paired_difference
from t2i_align.evaluate.benchmarks.judged import JUDGE
from t2i_align.evaluate.compare import read_protocol, read_rows, same_protocol
from t2i_align.evaluate.results import interval

Rows = Sequence[Mapping[str, Any]]


def columns(rows: Rows) -> dict[str, list[float]]:
    """The score of every row, and the number of every held-out judge that all rows have.

    Args:
        rows: of ``results.jsonl``.
    """
    names = [k for k in rows[0].get("parts", {}) if k.startswith(JUDGE)] if rows else []
    held = [name for name in names if all(name in r.get("parts", {}) for r in rows)]
    found = {"score": [float(r["score"]) for r in rows]}
    return found | {n.removeprefix(JUDGE): [float(r["parts"][n]) for r in rows] for n in held}


def sign_of(judge: str) -> int:
    """1 where more is better, -1 where less is, 0 for a judge that is only a monitor."""
    from t2i_align.judges.base import judge_card

    try:
        direction = judge_card(judge).direction
    except UserError:  # stored by a suite that had the judge
        return 0
    return {"higher is better": 1, "lower is better": -1}.get(str(direction), 0)


def win_rate(before: Sequence[float], after: Sequence[float], prompts: Sequence[Any]) -> Interval:
    """Eq. (1) with its interval over prompts.

    Args:
        before: numbers of the baseline.
        after: of the other model.
        prompts: of each.
    """
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    won = (np.sign(difference) + 1) / 2
    return interval({"": won.tolist()}, {"": list(prompts)})


def win_rates(a: Path, b: Path, despite: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row a judge: means of both, their difference, and the share of pairs that b wins.

    Args:
        a: evaluation folder of the baseline.
        b: of the other model.
        despite: protocol fields that differ on purpose.

    Returns:
        ``{judge, role, base, model, difference, low, high, win_rate, win_low, win_high}``; the win
        rate is None for a monitor, the interval of the difference for a single prompt.

    Raises:
        DataError: they were not evaluated alike, or hold different prompts.
    """
    same_protocol(a, b, despite)
    before, after = read_rows(a), read_rows(b)
    keys = [[(r["prompt"], r["image"]) for r in rows] for rows in (before, after)]
    if keys[0] != keys[1] or not before:
        raise DataError(
            f"{a} and {b} hold different prompts", "evaluate both with the same options"
        )
    prompts = [r["prompt"] for r in before]
    first, second = columns(before), columns(after)
    counted = read_protocol(a).get("judge") or "score"
    return [
        {"judge": counted if name == "score" else name}
        | {"role": "counts" if name == "score" else "held out"}
        | _row(first[name], second[name], prompts, 1 if name == "score" else sign_of(name))
        for name in first
        if name in second
    ]


def _row(
    before: Sequence[float], after: Sequence[float], prompts: Sequence[str], sign: int
) -> dict[str, Any]:
    several = len(set(prompts)) > 1
    gain = paired_difference(before, after, prompts) if several else None
    x, y = ([sign * value for value in side] for side in (before, after))
    won = win_rate(x, y, prompts) if sign else None
    return {
        "base": float(np.mean(before)),
        "model": float(np.mean(after)),
        "difference": float(np.mean(after) - np.mean(before)),
        "low": None if gain is None else gain.low,
        "high": None if gain is None else gain.high,
        "win_rate": None if won is None else won.mean,
        "win_low": None if won is None else won.low,
        "win_high": None if won is None else won.high,
    }
