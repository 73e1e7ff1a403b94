r"""What a pair is worth when the human, the judge, or both see no difference.

Published accuracies of one judge on one test set differ by ten points because papers count ties
differently, so a report names its rule. For a pair let D be the judge's number of the first picture
minus that of the second, H = +1, -1 or 0 the human's choice (0: a tie), e >= 0 a width; the judge
ties where |D| <= e. A rule gives each pair a credit, NaN where it is left out, and the accuracy is
the mean of the others:

    strict      1 if D H > 0 and the judge does not tie; every tie, of either side, is wrong
                (MJ-Bench's "with tie" on its pairs, which have no human ties)
    drop        strict without the pairs the human ties: ImageReward's test, HPDv3's, and HPSv2's on
                ImageReward
    decided     strict without the pairs either side ties: MJ-Bench's "without tie"
    half        strict, but a tie of either side is worth 1/2
    pickapic    strict, but a human tie is worth 1/2 unless the judge ties: PickScore's evaluation
    inversions  1 - inversions: a human tie is worth 1, a judge's 1/2 (HPSv2 lets the order of files
                decide there, which is 1/2 on average); HPDv2's test averages it over prompts
    three_way   right if the judge ties where the human does and else agrees

:func:`acc_eq` is ``three_way`` at the best e (Deutsch et al. 2023, arXiv:2305.14324); tuned on the
pairs it is measured on, it flatters, so e and another rule belong beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Rule = Callable[[Floats, Floats, float], Floats]


def strict(margin: Floats, human: Floats, width: float = 0.0) -> Floats:
    """Credits ``(P,)``: the judge decides, and as the human did.

    Args:
        margin: ``(P,)`` D, first minus second.
        human: ``(P,)`` H in {-1, 0, 1}.
        width: e, in the judge's unit.
    """
    return ((margin * human > 0) & (np.abs(margin) > width)).astype(np.float64)


def drop(margin: Floats, human: Floats, width: float = 0.0) -> Floats:
    """Credits ``(P,)``: strict, human ties left out."""
    return np.where(human == 0, np.nan, strict(margin, human, width))


def decided(margin: Floats, human: Floats, width: float = 0.0) -> Floats:
    """Credits ``(P,)``: strict, ties of either side left out."""
    return np.where(np.abs(margin) <= width, np.nan, drop(margin, human, width))


def half(margin: Floats, human: Floats, width: float = 0.0) -> Floats:
    """Credits ``(P,)``: strict, ties of either side worth one half."""
    tied = (human == 0) | (np.abs(margin) <= width)
    return np.where(tied, 0.5, strict(margin, human, width))


def pickapic(margin: Floats, human: Floats, width: float = 0.0) -> Floats:
    """Credits ``(P,)``: strict, human ties worth one half where the judge decides."""
    halved = (human == 0) & (np.abs(margin) > width)
    return np.where(halved, 0.5, strict(margin, human, width))


def inversions(margin: Floats, human: Floats, width: float = 0.0) -> Floats:
    """Credits ``(P,)``: whatever is no inversion."""
    return np.where(human == 0, 1.0, half(margin, human, width))


def three_way(margin: Floats, human: Floats, width: float = 0.0) -> Floats:
    """Credits ``(P,)``: first, second or tie, as the human said."""
    tied = np.abs(margin) <= width
    return np.where(human == 0, tied, strict(margin, human, width)).astype(np.float64)


RULES: dict[str, Rule] = {
    "strict": strict,
    "drop": drop,
    "decided": decided,
    "half": half,
    "pickapic": pickapic,
    "inversions": inversions,
    "three_way": three_way,
}


@dataclass(frozen=True)
class BestWidth:
    """The accuracy of :func:`three_way` at its best width, and that width."""

    accuracy: float
    width: float


def acc_eq(margin: Floats, human: Floats) -> BestWidth:
    """The best width for ``three_way``, the smallest of equally good ones.

    Args:
        margin: ``(P,)`` D, finite.
        human: ``(P,)`` H.

    Raises:
        ValueError: no pairs.
    """
    size = np.abs(margin)
    return _best(size[margin * human > 0], size[human == 0], len(size))


def pooled_acc_eq(values: Floats, ratings: Floats) -> BestWidth:
    """:func:`acc_eq` over every two of n items, of different prompts too, in O(n) memory a row.

    t2v_metrics reports this number for GenAI-Bench ("no grouping").

    Args:
        values: ``(n,)`` the judge's, finite.
        ratings: ``(n,)`` people's.

    Raises:
        ValueError: fewer than two items.
    """
    right, ties = [], []
    for i in range(len(values) - 1):
        margin, human = values[i] - values[i + 1 :], ratings[i] - ratings[i + 1 :]
        right.append(np.abs(margin[margin * human > 0]))
        ties.append(np.abs(margin[human == 0]))
    if not right:
        raise ValueError(f"pairs need at least two items, got {len(values)}")
    return _best(np.concatenate(right), np.concatenate(ties), len(values) * (len(values) - 1) // 2)


def _best(right: Floats, ties: Floats, num_pairs: int) -> BestWidth:
    """The best width from |D| of rightly ordered pairs and of pairs the human ties.

    A wider e only gains where it reaches a human tie, so 0 and their |D| are all there is to try.
    """
    if not num_pairs:
        raise ValueError("acc_eq needs at least one pair")
    right, ties = np.sort(right), np.sort(ties)
    widths = np.concatenate([np.zeros(1, ties.dtype), ties])
    kept = len(right) - np.searchsorted(right, widths, side="right")
    found = np.searchsorted(ties, widths, side="right")
    best = int((kept + found).argmax())
    return BestWidth(float(kept[best] + found[best]) / num_pairs, float(widths[best]))
