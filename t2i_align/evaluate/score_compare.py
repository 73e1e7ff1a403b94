"""Two sets of scores, pair by pair: which side wins how often.

Pictures are paired by prompt, the k-th of a prompt with the k-th of the same prompt on the other
side; what finds no partner, or has no number, is counted and left out. With s and s' the numbers of
a pair, oriented so that more is better, and a band b,

    (1)  win rate = mean of 1 [s' - s > b] + 1/2 [|s' - s| <= b]

Its interval draws prompts again (evaluate/aggregate.py); one prompt has none.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2i_align.errors import DataError
from t2i_align.evaluate.aggregate import bootstrap_mean, paired_difference, win_tie_lose
from t2i_align.plain_json import loads

READABLE = (".jsonl", ".csv", ".parquet")
Facts = tuple[str, ...]  # version, weights and the rest of what a judge depends on, as text
FACTS = ("version", "weights_sha256", "depends_on")


@dataclass(frozen=True)
class Side:
    """One scored set.

    Args:
        name: as it was given.
        prompts: one a picture.
        values: ``(n,)`` numbers of each judge, NaN where it failed.
        facts: what each judge's numbers come from.
        normalized: whether numbers are on the common scale.
    """

    name: str
    prompts: Sequence[str]
    values: dict[str, np.ndarray]
    facts: dict[str, Facts]
    normalized: bool


def is_scored(path: Path) -> bool:
    """Whether a file was written by ``score``."""
    if not path.is_file() or path.suffix not in READABLE:
        return False
    try:
        first = next(iter(_rows(path)), {})
    except (OSError, ValueError):
        return False
    if not isinstance(first, dict):
        return False
    return {"file", "prompt"} <= set(first) and any(k.endswith(".version") for k in first)


def read_side(path: Path) -> Side:
    """A scored file.

    Raises:
        DataError: as for :func:`side_of`, or it is no file of scores.
    """
    try:
        return side_of(str(path), _rows(path))
    except (ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        raise DataError(f"{path} holds no scores of `t2i-align score`: {error!r}") from error


def side_of(name: str, rows: Iterable[dict[str, Any]]) -> Side:
    """Public rows of scores as a side.

    Raises:
        DataError: numbers of different judges' versions are mixed.
    """
    prompts: list[str] = []
    values: dict[str, list[float]] = defaultdict(list)
    facts: dict[str, Facts] = {}
    normalized = False
    for row in rows:
        prompts.append(row["prompt"] or "")
        normalized = str(row.get("normalized")).lower() == "true"
        for judge in [key.removesuffix(".version") for key in row if key.endswith(".version")]:
            given = row.get(judge)
            values[judge].append(np.nan if given in (None, "") else float(given))
            own = tuple(str(row.get(f"{judge}.{fact}") or "") for fact in FACTS)
            if facts.setdefault(judge, own) != own:
                raise DataError(f"{name} mixes numbers of two versions of {judge}", "score it anew")
    arrays = {judge: np.array(column) for judge, column in values.items()}
    return Side(name, prompts, arrays, facts, normalized)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            yield from map(loads, file)
    else:
        from t2i_align.data.rows import parquet_file

        for batch in parquet_file(path).iter_batches():
            yield from batch.to_pylist()


def partners(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of pictures with one prompt, the k-th with the k-th, in the order of ``before``."""
    waiting: dict[str, list[int]] = defaultdict(list)
    for position, prompt in enumerate(after):
        waiting[prompt].append(position)
    taken: dict[str, int] = defaultdict(int)
    pairs = []
    for position, prompt in enumerate(before):
        k = taken[prompt]
        if k < len(waiting[prompt]):
            pairs.append((position, waiting[prompt][k]))
            taken[prompt] = k + 1
    return pairs


def compare_sides(
    before: Side, after: Side, judges: Sequence[str] = (), band: float = 0.0
) -> dict[str, dict[str, Any]]:
    """What each judge says of two sides.

    Args:
        before: the baseline.
        after: the other side.
        judges: which; those both sides have when empty.
        band: half-width b of a tie, in the judge's unit.

    Returns:
        By judge: means of the pairs, paired ``difference`` and ``win_rate`` (Eq. 1) with 95 %
        intervals, ``win``, ``tie``, ``lose``, ``pairs``, ``unpaired`` and ``failed``. The
        difference keeps the judge's own sign, wins are oriented.

    Raises:
        DataError: no common prompt or judge, or numbers that cannot be compared.
    """
    names = list(judges) or [name for name in before.values if name in after.values]
    _comparable(before, after, names)
    pairs = partners(before.prompts, after.prompts)
    if not pairs:
        raise DataError(f"{before.name} and {after.name} have no prompt in common", "check both")
    first, second = np.array(pairs).T
    prompts = np.array(before.prompts, dtype=object)[first].astype(str)
    unpaired = len(before.prompts) + len(after.prompts) - 2 * len(pairs)
    found = {}
    for name in names:
        x, y = before.values[name][first], after.values[name][second]
        known = ~np.isnan(x) & ~np.isnan(y)
        counts = {"unpaired": unpaired, "failed": int((~known).sum())}
        if not known.any():
            raise DataError(f"{name} could score no pair of {before.name} and {after.name}")
        sign = 1.0 if before.normalized else _sign(name)
        found[name] = _line(x[known], y[known], prompts[known], band, sign) | counts
    return found


def _comparable(before: Side, after: Side, names: Sequence[str]) -> None:
    if not names:
        raise DataError(
            f"{before.name} and {after.name} were scored by different judges: "
            f"{', '.join(before.values) or 'none'} and {', '.join(after.values) or 'none'}",
            "score both with the same --judge",
        )
    if before.normalized != after.normalized:
        raise DataError("one side is normalized and the other is not", "score both alike")
    for name in names:
        for side in (before, after):
            if name not in side.values:
                raise DataError(
                    f"{side.name} has no numbers of {name}; it has: {', '.join(side.values)}",
                    "score it with that judge",
                )
        if before.facts[name] != after.facts[name]:
            raise DataError(
                f"{name} scored {before.name} and {after.name} in different versions or with "
                f"different weights: {before.facts[name]} and {after.facts[name]}",
                "score both anew",
            )


def _sign(judge: str) -> float:
    """-1 where less is better."""
    from t2i_align.judges.base import judge_card

    return -1.0 if judge_card(judge).direction == "lower is better" else 1.0


def _line(x: np.ndarray, y: np.ndarray, prompts: np.ndarray, band: float, sign: float) -> dict:
    """One judge's numbers of its pairs."""
    counts = win_tie_lose(sign * x, sign * y, band)
    gain = sign * (y - x)
    wins = np.where(np.abs(gain) <= band, 0.5, (gain > 0).astype(float))
    rate: dict[str, Any] = {"mean": counts.win_rate, "low": None, "high": None}
    difference: dict[str, Any] = {"mean": float((y - x).mean()), "low": None, "high": None}
    if len(np.unique(prompts)) > 1:
        rate = asdict(bootstrap_mean(wins, prompts))
        difference = asdict(paired_difference(x, y, prompts))
    return {
        "before": float(x.mean()),
        "after": float(y.mean()),
        "difference": difference,
        "win_rate": rate,
        "win": counts.win,
        "tie": counts.tie,
        "lose": counts.lose,
        "pairs": len(x),
    }


def table(result: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Rows for printing."""
    rows = []
    for judge, r in result.items():
        rows.append(
            {
                "judge": judge,
                "before": f"{r['before']:.4f}",
                "after": f"{r['after']:.4f}",
                "difference": _with_interval(r["difference"], "+.4f"),
                "win rate": _with_interval(r["win_rate"], ".3f"),
                "win/tie/lose": f"{r['win']}/{r['tie']}/{r['lose']}",
                "unpaired": str(r["unpaired"]),
                "failed": str(r["failed"]),
            }
        )
    return rows


def _with_interval(value: dict[str, Any], form: str) -> str:
    if value["low"] is None:
        return format(value["mean"], form)
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"
