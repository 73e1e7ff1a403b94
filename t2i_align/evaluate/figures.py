"""Figures as inline SVG whose colours are the page's own.

Matplotlib draws with placeholder colours, which become CSS variables in the text of the SVG, so one
drawing serves the light and the dark page. Text stays text: it can be searched, and an untrusted
name in it is escaped. Equal values give equal bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from t2i_align.evaluate.aggregate import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE, BEFORE, AFTER = (f"#0{k}0{k}0{k}" for k in range(1, 6))
VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", BEFORE: "before", AFTER: "after"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "t2i-align",
    "text.parse_math": False,  # a name with two dollar signs is a name
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": LINE,
    "legend.frameon": False,
}
MAX_POINTS = 1500  # of a curve; more cannot be seen and only make the file heavy
CURVES = {
    "loss": "loss",
    "rewards/accuracies": "share of pairs ranked right",
    "rewards/margins": "reward margin",
}


@dataclass(frozen=True)
class Bar:
    """One row of the chart: a task's means with their intervals, and the paired difference."""

    name: str
    before: Interval
    after: Interval
    difference: Interval


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred running mean; the window shrinks evenly at the ends, so a straight line stays itself.

    Args:
        values: ``(n,)`` numbers.
        window: full width, in values; 1 changes nothing.
    """
    out = []
    for i in range(len(values)):
        half = min(window // 2, i, len(values) - 1 - i)
        part = values[i - half : i + half + 1]
        out.append(math.fsum(part) / len(part))
    return out


def bars(rows: Sequence[Bar], name: str) -> str:
    """Means before and after beside the paired difference, each with its 95 % interval.

    Args:
        rows: the tasks, top to bottom; the last is set apart.
        name: starts every id of the SVG, unique in the page.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 0.52 * len(rows) + 1.0), layout="constrained")
        means, paired = figure.subplots(1, 2, sharey=True, width_ratios=(5, 4))
        for k, row in enumerate(rows):
            _bar(means, k - 0.19, row.before, BEFORE)
            _bar(means, k + 0.19, row.after, AFTER)
            d = row.difference
            paired.plot([d.low, d.high], [k, k], color=AFTER, linewidth=2.2)
            paired.plot([d.mean], [k], "o", color=AFTER, markersize=6)
        for axes in (means, paired):
            axes.axhline(len(rows) - 1.5, color=LINE, linewidth=1)
            axes.grid(axis="x", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
            axes.spines["left"].set_visible(False)
        means.set_yticks(range(len(rows)), [r.name for r in rows])
        means.set_ylim(len(rows) - 0.4, -0.6)
        means.set_xlim(0, 1)
        means.set_title("share of right pictures: before (upper), after (lower)")
        paired.axvline(0, color=INK, linewidth=1)
        paired.locator_params(axis="x", nbins=6)
        paired.set_title("difference, paired")
        return svg(figure, name)


def _bar(axes: Any, y: float, value: Interval, color: str) -> None:
    """One bar with its interval."""
    axes.barh(y, value.mean, 0.34, color=color)
    axes.plot([value.low, value.high], [y, y], color=INK, linewidth=1.1)


def curves(metrics: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """The curves of :data:`CURVES` a run has, raw and smoothed; None when it has none of them.

    Args:
        metrics: lines of ``metrics.jsonl``; a null value is left out.
        name: starts every id of the SVG, unique in the page.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    found = {key: points(metrics, key) for key in CURVES}
    found = {key: xy for key, xy in found.items() if len(xy) > 1}
    if not found:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * max(len(found), 2), 2.5), layout="constrained")
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (key, xy) in zip(panels, found.items(), strict=True):
            steps, raw = [s for s, _ in xy], [v for _, v in xy]
            window = max(3, len(raw) // 12)
            soft, half = smooth(raw, window), window // 2
            full = slice(half, len(raw) - half)  # at the ends few values are a mean of noise
            every = math.ceil(len(raw) / MAX_POINTS)
            axes.plot(steps[::every], raw[::every], color=BEFORE, linewidth=0.8, alpha=0.55)
            axes.plot(steps[full][::every], soft[full][::every], color=AFTER, linewidth=2)
            axes.set_title(CURVES[key])
            axes.set_xlabel("step")
            axes.grid(axis="y", linewidth=0.6)
            axes.tick_params(length=0)
        return svg(figure, name)


def points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric where it is known."""
    return [(m["step"], m[key]) for m in metrics if m.get(key) is not None]


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element for an HTML page: own ids, the page's colours, no address in it.

    Args:
        figure: drawn with the colours of :data:`VARIABLES`.
        name: starts every id.
    """
    file = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=empty)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2)
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
