"""How often a judge orders two pictures of one prompt as a reference does.

    accuracy = share of pairs with s_winner > s_loser; a tie of the judge counts one half

The reference is ``label_0`` of the file (Pick-a-Pic's columns); pairs it calls ties are left out.
The interval draws prompts again (evaluate/aggregate.py).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from t2i_align.contract import Media, MediaError
from t2i_align.data.rows import parquet_file
from t2i_align.errors import DataError
from t2i_align.evaluate.aggregate import bootstrap_mean
from t2i_align.judges.base import Judge
from t2i_align.scenes.parse import parse

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows of a pair file whose reference is no tie.

    Raises:
        DataError: not parquet, a column is missing, or every pair is a tie.
    """
    file = parquet_file(path)
    missing = [c for c in COLUMNS if c not in file.schema_arrow.names]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(missing)}; it has: {', '.join(file.schema_arrow.names)}",
            "pair files have Pick-a-Pic's columns, as `t2i-align scenes pairs` writes",
        )
    rows = [r for r in file.read().to_pylist() if r["label_0"] not in (None, 0.5)]
    if not rows:
        raise DataError(f"{path}: every pair is a tie, so there is no order to compare with")
    return rows


def task_of(prompt: str) -> str:
    """GenEval's task of a prompt of the world, ``other`` for any other text."""
    try:
        return parse(prompt)["tag"]
    except MediaError:
        return "other"


def pair_accuracy(judge: Judge, path: Path, batch_size: int = 64) -> dict[str, Any]:
    """Agreement with a pair file.

    Args:
        judge: any judge of images.
        path: parquet file.
        batch_size: pairs at once.

    Returns:
        ``overall`` and ``tasks``: name -> {mean, low, high, pairs}; ``ties`` (pairs the judge gave
        one score) and ``failed`` (pairs with a NaN, left out). A part with one prompt has no
        interval: low and high are None.
    """
    rows = read_pairs(path)
    wins = np.full(len(rows), np.nan)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        media = [Media("image", r[f"jpg_{k}"]) for r in part for k in (0, 1)]
        found = judge.score(media, [r["caption"] for r in part for _ in (0, 1)])
        found = found.kept("of the benchmark")
        first, second = found.values.view(-1, 2).double().numpy().T
        sign = np.array([1.0 if r["label_0"] > 0.5 else -1.0 for r in part])
        order = np.sign(first - second) * sign
        wins[start : start + len(part)] = (1 + order) / 2
    good = np.flatnonzero(~np.isnan(wins))
    if not len(good):
        raise DataError(f"{path}: the judge could score none of its {len(rows)} pairs")
    prompts = np.array([r["caption"] for r in rows])
    tasks = np.array([task_of(p) for p in prompts])
    parts = {t: good[tasks[good] == t] for t in dict.fromkeys(tasks[good].tolist())}
    return {
        "overall": _line(wins[good], prompts[good]),
        "tasks": {t: _line(wins[index], prompts[index]) for t, index in parts.items()},
        "ties": int((wins[good] == 0.5).sum()),
        "failed": len(rows) - len(good),
    }


def _line(wins: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    if len(np.unique(prompts)) < 2:
        return {"mean": float(wins.mean()), "low": None, "high": None, "pairs": len(wins)}
    return asdict(bootstrap_mean(wins, prompts)) | {"pairs": len(wins)}
