r"""Prediction types, all linear in (x_0, eps) given ``x_t = a x_0 + s eps``.

    epsilon        eps
    sample         x_0
    v_prediction   v = a eps - s x_0                (Salimans & Ho 2022)
    velocity       v = eps - x_0                    (rectified flow)

Errors convert with the same coefficients: for VP ``|eps - eps^|^2 = a^2 |v - v^|^2``, for rectified
``|eps - eps^|^2 = (1 - t)^2 |v - v^|^2``: equal weights on different predictions are different
objectives.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from t2i_align.process.schedule import broadcast

Prediction = Literal["epsilon", "sample", "v_prediction", "velocity"]


def target(kind: Prediction, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a perfect network predicts; ``alpha`` and ``sigma`` are per row and broadcast."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x_0
    if kind == "v_prediction":
        return broadcast(alpha, x_0) * eps - broadcast(sigma, x_0) * x_0
    return eps - x_0


def to_x0_eps(
    kind: Prediction, pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """``(x_0, eps)`` implied by a prediction. ``epsilon`` divides by alpha, ``sample`` by sigma."""
    a, s = broadcast(alpha, x_t), broadcast(sigma, x_t)
    if kind == "epsilon":
        return (x_t - s * pred) / a, pred
    if kind == "sample":
        return pred, (x_t - a * pred) / s
    if kind == "v_prediction":
        norm = a.square() + s.square()
        return (a * x_t - s * pred) / norm, (s * x_t + a * pred) / norm
    x_0 = (x_t - s * pred) / (a + s)
    return x_0, x_0 + pred


def convert(
    source: Prediction, to: Prediction, pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Re-express a prediction in another type."""
    x_0, eps = to_x0_eps(source, pred, x_t, alpha, sigma)
    return target(to, x_0, eps, alpha, sigma)
