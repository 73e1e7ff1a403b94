"""How well a judge agrees with people, on published sets of preferences.

Every picture is scored once (twice, the second time in the other order, where the set's evaluation
asks for both orders), then the pairs are counted by every rule of tie_rules.py. A judge that
compares two pictures is asked about each pair instead. The set's own rule gives the headline, with
an interval that draws prompts again. Pairs with a picture the judge could
not score are left out and counted. Where people rated pictures there are correlations too:

    Pearson's r and Kendall's tau-b of numbers and mean ratings over all pictures, and the accuracy
    with ties over every two pictures of the set, prompts mixed, as t2v_metrics computes them for
    GenAI-Bench (Lin et al. 2024, arXiv:2404.01291); of its skills too, and of their union
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from t2i_align.contract import Media
from t2i_align.errors import DataError, UserError
from t2i_align.evaluate.aggregate import bootstrap_mean
from t2i_align.evaluate.human_layouts import SPLITS, Group, layout_of
from t2i_align.evaluate.tie_rules import RULES, Floats, acc_eq, pooled_acc_eq
from t2i_align.judges.base import Judge

BATCH = 64
Asked = tuple[Floats, Floats, list[str]]  # a number a picture, (orders, P) margins, reasons


@runtime_checkable
class PairJudge(Protocol):
    """A judge that compares two pictures, such as judges/vlm_pairwise.py."""

    def prefer(self, a: Sequence[Media], b: Sequence[Media], prompts: Sequence[str]) -> Any:
        """P(a better) as ``values`` ``(B,)``, the mean over orders, and half their gap ``bias``."""
        ...


@dataclass(frozen=True)
class Measured:
    """A judge's numbers on a set.

    Args:
        names: ``(P,)`` the row of each pair.
        prompts: ``(P,)`` its prompt.
        margins: ``(O, P)`` first minus second, one row an order; NaN where it failed.
        human: ``(P,)`` 1, -1 or 0.
        values: ``(n,)`` of every picture, in the order of the set; NaN of a judge of pairs.
        ratings: ``(n,)`` mean ratings, empty where people did not rate.
        reasons: why pictures failed.
        parts: ``(n,)`` the parts of the set each picture belongs to.
    """

    names: list[str]
    prompts: list[str]
    margins: Floats
    human: Floats
    values: Floats
    ratings: Floats
    reasons: list[str]
    parts: list[tuple[str, ...]]

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which pairs have a number in every order, ``(P,)``."""
        return np.asarray(~np.isnan(self.margins).any(0))


def bench(
    name: str,
    judge: Judge,
    data: Path,
    *,
    split: str | None = None,
    width: float = 0.0,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Any], Measured]:
    """A judge on a published set.

    Args:
        name: of a layout, see human_layouts.py.
        judge: of images.
        data: the folder or file as published.
        split: which part; the test set when None.
        width: differences up to this are ties of the judge, in its own unit.
        advance: told how many pictures are done.

    Returns:
        The report (see :func:`report`) and what it is made from.

    Raises:
        UserError: unknown set, or a negative width.
        DataError: nothing there, not as published, or nothing could be scored.
    """
    if not width >= 0:
        raise UserError(f"the width of a tie is >= 0, got {width}")
    layout = layout_of(name)
    split = split or SPLITS.get(name, "test")
    measured = measure(layout.read(data, split), judge, layout.both_orders, advance)
    if not measured.known.any():
        first = f"; first: {measured.reasons[0]}" if measured.reasons else ""
        raise DataError(f"{data}: the judge could score no pair of {len(measured.names)}{first}")
    head = {"benchmark": name, "split": split, "source": layout.source}
    return head | report(measured, layout.rule, layout.averaged, width), measured


def measure(
    groups: Iterable[Group],
    judge: Judge,
    both_orders: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Score every picture of some groups, :data:`BATCH` or a few more at once.

    Args:
        groups: rows of a layout.
        judge: of images; one that can ``prefer`` is asked about pairs instead.
        both_orders: whether to ask in both orders.
        advance: told how many pictures are done.
    """
    names, prompts, human, ratings, reasons, parts = [], [], [], [], [], []
    margins: list[Floats] = []
    values: list[Floats] = []
    for part in _chunks(groups):
        if isinstance(judge, PairJudge):
            own, margin, why = _ask_pairs(judge, part, both_orders)
        else:
            own, margin, why = _ask_each(judge, part, both_orders)
        values.append(own)
        margins.append(margin)
        reasons += why
        for group in part:
            human += [sign for _, _, sign in group.pairs]
            names += [group.name] * len(group.pairs)
            prompts += [group.prompt] * len(group.pairs)
            ratings += group.ratings
            parts += [group.parts] * len(group.media)
        advance(sum(len(g.media) for g in part))
    flat = np.concatenate(values) if values else np.zeros(0)
    rows = np.concatenate(margins, 1) if margins else np.zeros((1, 0))
    signs, rated = np.array(human, float), np.array(ratings)
    return Measured(names, prompts, rows, signs, flat, rated, reasons, parts)


def _chunks(groups: Iterable[Group]) -> Iterator[list[Group]]:
    part: list[Group] = []
    for group in groups:
        if not group.pairs:
            continue
        part.append(group)
        if sum(len(g.media) for g in part) >= BATCH:
            yield part
            part = []
    if part:
        yield part


def _ends(part: Sequence[Group]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the first and second picture of every pair stand among all pictures, ``(P,)`` each."""
    ends, start = [], 0
    for group in part:
        ends += [(start + i, start + j) for i, j, _ in group.pairs]
        start += len(group.media)
    first, second = np.array(ends, np.int64).T
    return first, second


def _ask_each(judge: Judge, part: Sequence[Group], both_orders: bool) -> Asked:
    """Every picture once, and once more with all of them shown in the other order."""
    media = [m for group in part for m in group.media]
    prompts = [group.prompt for group in part for _ in group.media]
    found = judge.score(media, prompts).kept("of the benchmark")
    values = [found.values]
    if both_orders:
        values.append(judge.score(media[::-1], prompts[::-1]).values.flip(0))
    first, second = _ends(part)
    orders = np.stack([v.float().cpu().numpy() for v in values])
    reasons = [r for r in found.reasons if r is not None]
    return orders[0], orders[:, first] - orders[:, second], reasons


def _ask_pairs(judge: PairJudge, part: Sequence[Group], both_orders: bool) -> Asked:
    """Every pair: P(first better) - 1/2, or that of each order; pictures get no number."""
    media = [m for group in part for m in group.media]
    prompts = [group.prompt for group in part for _ in group.pairs]
    first, second = _ends(part)
    found = judge.prefer([media[i] for i in first], [media[j] for j in second], prompts)
    margin = found.values.float().cpu().numpy() - 0.5
    orders = np.stack([margin])
    if both_orders:
        bias = found.bias.float().cpu().numpy()
        orders = np.stack([margin + bias, margin - bias])
    reasons = [r for r in found.reasons if r is not None]
    return np.full(len(media), np.nan, np.float32), orders, reasons


def report(
    measured: Measured, rule: str = "strict", averaged: str = "pairs", width: float = 0.0
) -> dict[str, Any]:
    """Counts, the headline by one rule with its interval, and the accuracy by every rule.

    Args:
        measured: with at least one known pair.
        rule: name of the headline's rule.
        averaged: ``pairs``, or ``prompts`` to average within each prompt's row first.
        width: of the judge's ties.

    Returns:
        ``pairs``, ``failed``, ``human_ties``, ``judge_ties``; ``rule``, ``averaged``, ``width``,
        ``accuracy``, ``low``, ``high``; ``rules`` name -> accuracy (None: no pair counts);
        ``acc_eq`` {accuracy, width}; ``ratings`` where there are any, and ``ratings_by_part``
        where the set has parts.
    """
    known = measured.known
    human = measured.human[known]
    margins = measured.margins[:, known]
    out: dict[str, Any] = {
        "pairs": int(known.sum()),
        "failed": int((~known).sum()),
        "human_ties": int((human == 0).sum()),
        "judge_ties": int((np.abs(margins[0]) <= width).sum()),
        "rule": rule,
        "averaged": averaged,
        "width": width,
    }
    credit = _credits(rule, margins, human, width)
    rows, prompts = (np.array(c)[known] for c in (measured.names, measured.prompts))
    out |= _headline(credit, rows, prompts, averaged)
    out["rules"] = {name: _mean(_credits(name, margins, human, width)) for name in RULES}
    out["acc_eq"] = asdict(acc_eq(margins[0], human))
    if len(measured.ratings) and not np.isnan(measured.values).all():
        out["ratings"] = rating_agreement(measured.values, measured.ratings)
        by_part = agreement_by_part(measured.values, measured.ratings, measured.parts)
        out |= {"ratings_by_part": by_part} if by_part else {}
    return out


def _credits(rule: str, margins: Floats, human: Floats, width: float) -> Floats:
    """Credits ``(P,)``, the mean over orders; NaN where every order leaves the pair out."""
    each = np.stack([RULES[rule](margin, human, width) for margin in margins])
    counted = ~np.isnan(each)
    total = np.where(counted, each, 0).sum(0)
    return np.where(counted.any(0), total / np.maximum(counted.sum(0), 1), np.nan)


def _mean(credit: Floats) -> float | None:
    counted = credit[~np.isnan(credit)]
    return float(counted.mean()) if len(counted) else None


def _headline(credit: Floats, rows: Any, prompts: Any, averaged: str) -> dict[str, float | None]:
    """The mean credit and its interval over prompts; no interval of a single prompt."""
    counted = ~np.isnan(credit)
    credit, rows, prompts = credit[counted], rows[counted], prompts[counted]
    if averaged == "prompts" and len(credit):
        _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
        credit = np.bincount(inverse, credit) / np.bincount(inverse)
        prompts = prompts[first]
    if len(np.unique(prompts)) < 2:
        return {"accuracy": _mean(credit), "low": None, "high": None}
    found = bootstrap_mean(credit, prompts)
    return {"accuracy": found.mean, "low": found.low, "high": found.high}


def rating_agreement(values: Floats, ratings: Floats) -> dict[str, float | None]:
    """Correlations of a judge's numbers with people's ratings, and the pooled accuracy with ties.

    Args:
        values: ``(n,)``, NaN where the judge failed (left out).
        ratings: ``(n,)`` mean ratings.

    Returns:
        ``images``, ``pearson``, ``kendall`` (tau-b), ``acc_eq``, ``width``; a correlation with
        constant numbers is None.

    Raises:
        DataError: fewer than two pictures have a number.
    """
    from scipy import stats

    known = ~np.isnan(values)
    values, ratings = values[known], ratings[known]
    if len(values) < 2:
        raise DataError(f"correlations need two scored pictures, got {len(values)}")
    best = pooled_acc_eq(values, ratings)
    pearson, tau = None, None
    if np.ptp(values) and np.ptp(ratings):
        linear: Any = stats.pearsonr(values.astype(float), ratings)
        ranked: Any = stats.kendalltau(values, ratings)
        pearson, tau = float(linear.statistic), float(ranked.statistic)
    return {
        "images": len(values),
        "pearson": pearson,
        "kendall": tau,
        "acc_eq": best.accuracy,
        "width": best.width,
    }


def agreement_by_part(
    values: Floats, ratings: Floats, parts: Sequence[Sequence[str]]
) -> dict[str, dict[str, float | None]]:
    """:func:`rating_agreement` of each part's pictures, and of ``all`` that belong to any.

    Args:
        values: ``(n,)`` of the judge, NaN where it failed.
        ratings: ``(n,)`` mean ratings.
        parts: ``(n,)`` names of the parts of each picture.

    Returns:
        Parts with two scored pictures or more, in the order they come; nothing without parts.
    """
    names = dict.fromkeys(name for own in parts for name in own)
    inside = {name: np.array([name in own for own in parts]) for name in names}
    inside |= {"all": np.array([bool(own) for own in parts])} if names else {}
    known = ~np.isnan(values)
    return {
        name: rating_agreement(values[chosen], ratings[chosen])
        for name, chosen in inside.items()
        if (chosen & known).sum() > 1
    }
