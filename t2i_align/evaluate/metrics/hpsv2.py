r"""HPS v2 benchmark (Wu et al. 2023, arXiv:2306.09341): what the released script prints of a style.

With s_1 .. s_n the scores of the pictures of a style that are there, in the prompts' order, cut
into chunks C_1 .. C_m of 80 (the last one may be shorter),

    (1)  mean      = (1/m) sum_j mean(C_j)          printed with two digits
    (2)  deviation = sqrt((1/m) sum_j (mean(C_j) - mean)^2)                  with four digits
    (3)  Average   = mean of all scores of all styles

Source: tgxs002/HPSv2 hpsv2/evaluation.py, evaluate_benchmark. Equation (2) is the deviation of
means of 80 pictures: about 9 times smaller than the one of single pictures, and dependent on how
the prompts are ordered. If pictures are missing, (1) weighs those of the last chunk more than the
others. ``variant: fixed`` replaces both by

    (4)  mean = (1/n) sum_i s_i
    (5)  deviation = sqrt(1/(n - 1) sum_i (s_i - mean)^2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

STYLES = ("anime", "concept-art", "paintings", "photo")
PER_STYLE, CHUNK = 800, 80

Variant = Literal["official", "fixed"]


@dataclass(frozen=True)
class Style:
    """One line of the table.

    Args:
        mean: Eq. (1) or (4).
        deviation: Eq. (2) or (5); 0 for a single picture.
    """

    mean: float
    deviation: float


def style(scores: Sequence[float], variant: Variant = "official") -> Style:
    """Mean and deviation of a style.

    Args:
        scores: of its pictures in the prompts' order, 100 times the cosine.
        variant: which equations.

    Raises:
        ValueError: there are no scores.
    """
    values = np.asarray(scores, np.float64)
    if values.size == 0:
        raise ValueError("a style without pictures has no mean")
    if variant == "fixed":
        deviation = float(values.std(ddof=1)) if values.size > 1 else 0.0  # Eq. (5)
        return Style(float(values.mean()), deviation)  # Eq. (4)
    chunks = [values[k : k + CHUNK].mean() for k in range(0, values.size, CHUNK)]
    return Style(float(np.mean(chunks)), float(np.std(chunks)))  # Eq. (1), (2)


def average(scores: Mapping[str, Sequence[float]]) -> float:
    """Eq. (3).

    Args:
        scores: by style.
    """
    return float(np.mean(np.concatenate([np.asarray(s, np.float64) for s in scores.values()])))


def printed(scores: Mapping[str, Sequence[float]]) -> list[tuple[str, str, str]]:
    """Name, mean and deviation with the digits of the released script; Average has no deviation.

    Args:
        scores: by style, in the order to print.
    """
    lines = [(name, style(values)) for name, values in scores.items()]
    found = [(name, f"{line.mean:.2f}", f"{line.deviation:.4f}") for name, line in lines]
    return [*found, ("Average", f"{average(scores):.2f}", "")]
