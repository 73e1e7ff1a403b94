"""Scores as one offline HTML file: numbers, distributions, correlations, best and worst pictures.

Pearson's r looks at values, Spearman's rho at ranks; both are over pictures that both judges could
score. A correlation over all pictures mixes differences between prompts with those within one; only
the latter matter where pictures of one prompt are compared.

Pictures are those with the highest and lowest numbers, made small; equal inputs give an equal file.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2i_align.contract import MediaError
from t2i_align.evaluate.figures import AFTER, STYLE, svg
from t2i_align.evaluate.pages import Section, render, write
from t2i_align.evaluate.provenance import versions
from t2i_align.evaluate.score_compare import table as comparison_table
from t2i_align.evaluate.score_source import Entry, Pictures
from t2i_align.evaluate.score_store import ScoreStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 8  # best and as many worst of each judge
SIDE = 224  # of a picture on the page
SHARP = 96  # pictures up to this size are kept lossless
MAX_REASONS = 12
BINS = 40
QUANTILES = {0.0: "min", 0.25: "25 %", 0.5: "median", 0.75: "75 %", 1.0: "max"}


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery.

    Args:
        uri: data address.
        size: width and height in pixels.
        name: of the entry.
        prompt: its prompt.
        value: the judge's number.
    """

    uri: str
    size: tuple[int, int]
    name: str
    prompt: str
    value: str


def build_score_report(
    store: ScoreStore, pictures: Pictures, out: Path, title: str = "Scores"
) -> Path:
    """Write the report of a finished store.

    Args:
        store: all rows.
        pictures: the stream they came from; a second pass fetches those that are shown.
        out: the HTML file, replaced when the new one is whole.
        title: heading of the page.

    Returns:
        ``out``.

    Raises:
        StorageError: the file cannot be written.
    """
    names = store.identity.names
    values = {name: store.numbers(name) for name in names}
    page = {
        "title": title,
        "count": len(store),
        "judges": Section("", rows=judge_rows(store, values)),
        "figure": distributions(values),
        "correlations": [
            {"name": kind, "names": names, "rows": cells_of(matrix)}
            for kind, matrix in correlations(values).items()
        ],
        "galleries": galleries(values, pictures, store.identity.settings["normalized"]),
        "failures": Section("", rows=failures(store)),
        "comparison": None,
        "settings": Section("", rows=settings_rows(store)),
        "versions": Section("", rows=versions()),
    }
    return write(out, render("scores", page))


def build_comparison_report(
    sides: tuple[str, str],
    result: Mapping[str, Mapping[str, Any]],
    out: Path,
    title: str = "Comparison of scores",
) -> Path:
    """Write the win rates of two scored sets.

    Args:
        sides: their names.
        result: of :func:`~t2i_align.evaluate.score_compare.compare_sides`.
        out: the HTML file.
        title: heading of the page.
    """
    empty = Section("")
    page = {
        "title": title,
        "count": max(r["pairs"] for r in result.values()),
        "judges": empty,
        "figure": None,
        "correlations": [],
        "galleries": [],
        "failures": empty,
        "comparison": Section("", rows=comparison_table({k: dict(v) for k, v in result.items()})),
        "settings": Section(
            "",
            rows=[{"side": k, "set": v} for k, v in zip(("before", "after"), sides, strict=True)],
        ),
        "versions": Section("", rows=versions()),
    }
    return write(out, render("scores", page))


def judge_rows(store: ScoreStore, values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """One line a judge: how its numbers lie, how many failed, what they come from."""
    rows = []
    for facts in store.identity.judges:
        known = values[facts.name][~np.isnan(values[facts.name])]
        some = len(known) > 0
        quartiles = (
            np.quantile(known, list(QUANTILES)).tolist() if some else [None] * len(QUANTILES)
        )
        rows.append(
            {
                "judge": facts.name,
                "mean": float(known.mean()) if some else None,
                "std": float(known.std()) if some else None,
                **dict(zip(QUANTILES.values(), quartiles, strict=True)),
                "scored": len(known),
                "failed": len(values[facts.name]) - len(known),
                "card version": facts.version,
                "weights sha256": facts.weights_sha256 or "no weights",
            }
        )
    return rows


def failures(store: ScoreStore) -> list[dict[str, Any]]:
    """Why pictures have no number, the most frequent reasons of each judge."""
    return [
        {"judge": name, "reason": why, "pictures": count}
        for name in store.identity.names
        for why, count in itertools.islice(store.reasons(name).items(), MAX_REASONS)
    ]


def settings_rows(store: ScoreStore) -> list[dict[str, Any]]:
    """What the numbers depend on besides judges and pictures."""
    found = dict(store.identity.settings) | {"identity": store.identity.digest()}
    return [{"setting": k, "value": str(v)} for k, v in found.items()]


def correlations(values: Mapping[str, np.ndarray]) -> dict[str, list[list[float | None]]]:
    """Pearson's r and Spearman's rho of every two judges; None where one of them is constant.

    Args:
        values: ``(n,)`` numbers of each judge, NaN where it failed.
    """
    from scipy.stats import rankdata

    def plain(x: np.ndarray) -> np.ndarray:
        return x

    kinds = {"Pearson's r": plain, "Spearman's rho": rankdata}
    columns = list(values.values())
    return {
        kind: [[_correlation(x, y, through) for y in columns] for x in columns]
        for kind, through in kinds.items()
    }


def _correlation(x: np.ndarray, y: np.ndarray, through: Any) -> float | None:
    known = ~np.isnan(x) & ~np.isnan(y)
    if known.sum() < 2:
        return None
    a, b = (np.asarray(through(side[known]), dtype=np.float64) for side in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip((a @ b) / scale, -1, 1)) if scale > 0 else None


def cells_of(matrix: Iterable[Iterable[float | None]]) -> list[list[dict[str, Any]]]:
    """A matrix as cells: text, and the share of colour behind it in percent."""
    return [
        [
            {
                "text": "" if value is None else f"{value:+.2f}",
                "share": 0 if value is None else round(60 * abs(value)),
                "color": "--bad" if value is not None and value < 0 else "--after",
            }
            for value in row
        ]
        for row in matrix
    ]


def distributions(values: Mapping[str, np.ndarray]) -> str | None:
    """Histograms of all judges side by side as SVG; None when nothing was scored."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    known = {name: v[~np.isnan(v)] for name, v in values.items()}
    known = {name: v for name, v in known.items() if len(v)}
    if not known:
        return None
    columns = min(len(known), 3)
    lines = -(-len(known) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.1 * max(columns, 2), 2.1 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for axes, shown in itertools.zip_longest(panels, known.items()):
            _histogram(axes, shown)
        return svg(figure, "dist")


def _histogram(axes: Axes, shown: tuple[str, np.ndarray] | None) -> None:
    if shown is None:
        axes.set_axis_off()
        return
    name, numbers = shown
    axes.hist(numbers, bins=min(BINS, max(1, len(np.unique(numbers)))), color=AFTER)
    axes.set_title(name)
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def extremes(values: np.ndarray, sign: float, num: int = SHOWN) -> tuple[list[int], list[int]]:
    """Positions of the best and of the worst numbers, the most extreme first, none in both.

    Args:
        values: ``(n,)``, NaN where a judge failed; those are in neither.
        sign: -1 where less is better.
        num: of each at most.
    """
    order = np.argsort(-sign * values, kind="stable")
    order = order[~np.isnan(values[order])].tolist()
    half = min(num, -(-len(order) // 2))
    worst = order[half:][::-1][:num]
    return order[:half], worst


def galleries(
    values: Mapping[str, np.ndarray], pictures: Pictures, normalized: bool
) -> list[dict[str, Any]]:
    """Best and worst pictures of each judge; normalised numbers are the better the higher."""
    from t2i_align.judges.base import judge_card

    chosen = {}
    for name, column in values.items():
        lower = judge_card(name).direction == "lower is better" and not normalized
        sign = -1.0 if lower else 1.0
        chosen[name] = extremes(column, sign)
    found = pictures.pick(k for pair in chosen.values() for part in pair for k in part)
    made = []
    for name, pair in chosen.items():
        for kind, positions in zip(("best", "worst"), pair, strict=True):
            shown = [shown_of(found[k], float(values[name][k])) for k in positions]
            made.append({"judge": name, "kind": kind, "shown": [s for s in shown if s]})
    return made


def shown_of(entry: Entry, value: float) -> Shown | None:
    """A picture made small; None where it cannot be read any more."""
    from t2i_align.judges.base import rgb

    try:
        image = rgb(entry.media)
    except MediaError:
        return None
    image.thumbnail((SIDE, SIDE))
    small = max(image.size) <= SHARP
    file = io.BytesIO()
    image.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 82}))
    kind = "png" if small else "jpeg"
    uri = f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()
    return Shown(uri, image.size, entry.name, entry.prompt or "", f"{value:.4g}")
