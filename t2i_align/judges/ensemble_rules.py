r"""How an ensemble makes one number of several: the rules of judges/ensemble.py, on tensors alone.

With z_k the standardised numbers of K judges and w_k their weights, W their sum:

    (1)  z_score   sum_k w_k z_k / W
    (2)  rank      sum_k w_k r_k / W,  r_k = (others below + half of the equal ones) / (n - 1) among
                   the n samples of a group that have a number; 1/2 where n = 1
    (3)  product   prod_k sigmoid(z_k)^(w_k / W): the weighted geometric mean of numbers in (0, 1)

The fourth, a quantile of the z_k over k, is ``Tensor.quantile``. NaN stays NaN everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def z_score(z: Tensor, weights: Tensor) -> Tensor:
    """Eq. (1) of z ``(K, B)`` and weights ``(K,)``; ``(B,)``."""
    return (weights / weights.sum()) @ z


def product(z: Tensor, weights: Tensor) -> Tensor:
    """Eq. (3) of z ``(K, B)`` and weights ``(K,)``; ``(B,)`` in (0, 1)."""
    return ((weights / weights.sum()) @ F.logsigmoid(z)).exp()


def rank(values: Tensor, weights: Tensor, groups: Sequence[str]) -> Tensor:
    """Eq. (2) of values ``(K, B)``, higher is better, and weights ``(K,)``; ``(B,)`` in [0, 1].

    Args:
        values: on any scale each.
        weights: of the judges.
        groups: B names; samples of one name are ranked against each other.
    """
    return z_score(torch.stack([group_ranks(row, groups) for row in values]), weights)


def group_ranks(values: Tensor, groups: Sequence[str]) -> Tensor:
    """The r of Eq. (2), ``(B,)`` float64; NaN ranks nobody.

    Args:
        values: ``(B,)``, higher is better.
        groups: B names.
    """
    ranks = torch.full((len(values),), math.nan, dtype=torch.float64)
    for name in dict.fromkeys(groups):
        here = torch.tensor([g == name for g in groups]) & ~values.isnan()
        own = values[here]
        gap = own[:, None] - own[None]
        below = (gap > 0).sum(1) + 0.5 * ((gap == 0).sum(1) - 1)
        ranks[here] = below.double() / (len(own) - 1) if len(own) > 1 else 0.5
    return ranks
