r"""How different the pictures of one prompt are; a policy that games its judge paints one picture.

With unit embeddings e_1 .. e_n of the n pictures of a prompt and S = sum_i e_i,

    (1)  D = 2 / (n (n - 1)) sum_{i<j} (1 - <e_i, e_j>) = (n^2 - |S|^2) / (n (n - 1))

in [0, n / (n - 1)]: 0 for equal pictures, 1 where every two are at right angles. The perceptual
distance needs no network: half of one minus the structural similarity of the grey pictures (Wang et
al., IEEE TIP 2004), in [0, 1],

    (2)  SSIM(x, y) = mean of (2 m_x m_y + C_1)(2 s_xy + C_2)
                              / ((m_x^2 + m_y^2 + C_1)(s_x^2 + s_y^2 + C_2))
    (3)  P = 2 / (n (n - 1)) sum_{i<j} (1 - SSIM(x_i, x_j)) / 2

with means, variances and covariance m, s under a Gaussian window of 11 x 11 (sigma 1.5) that lies
inside the picture, C_1 = (0.01 L)^2, C_2 = (0.03 L)^2, L = 255, grey as in Rec. 601, after f x f
pixels were averaged with f = max(1, round(shorter side / 256)). (3) sees places, not meaning: a
shifted picture is far from itself. Pictures under 11 pixels a side have no (2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SIGMA, RADIUS, LEVELS = 1.5, 5, 255.0
C1, C2 = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2
GREY = np.array([0.299, 0.587, 0.114])
VIEWED_SIDE = 256


def embedding_diversity(embeddings: Floats) -> float:
    """Eq. (1).

    Args:
        embeddings: ``(n, E)`` of the pictures of a prompt, of any length but 0.

    Raises:
        ValueError: under two pictures, or an embedding without a direction.
    """
    values = np.asarray(embeddings, np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"diversity is of two or more embeddings (n, E), got {values.shape}")
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError("an embedding is 0 or not finite and has no direction")
    total = (values / lengths).sum(0)
    n = len(values)
    return float(max(0.0, n**2 - total @ total) / (n * (n - 1)))  # rounding may fall under 0


def pairwise_mean(things: Sequence[Any], distance: Callable[[Any, Any], float]) -> float:
    """Mean of a symmetric distance over all pairs.

    Args:
        things: two or more.
        distance: of two of them.

    Raises:
        ValueError: under two.
    """
    if len(things) < 2:
        raise ValueError(f"diversity is of two or more pictures, got {len(things)}")
    return float(np.mean([distance(a, b) for a, b in itertools.combinations(things, 2)]))


@dataclass(frozen=True)
class Viewed:
    """A grey picture with what Eq. (2) needs of it alone; arrays are ``(h, w)``.

    Args:
        grey: in [0, 255].
        mean: under the window, inside the border.
        variance: the same.
    """

    grey: Floats
    mean: Floats
    variance: Floats


def viewed(pixels: NDArray[Any]) -> Viewed:
    """A picture as Eq. (2) looks at it.

    Args:
        pixels: ``(h, w, 3)`` in [0, 255].

    Raises:
        ValueError: a side is under 11 pixels.
    """
    grey = np.asarray(pixels, np.float64) @ GREY
    factor = max(1, round(min(grey.shape) / VIEWED_SIDE))
    height, width = (side // factor * factor for side in grey.shape)
    cut = grey[:height, :width].reshape(height // factor, factor, width // factor, factor)
    grey = cut.mean((1, 3))
    if min(grey.shape) < 2 * RADIUS + 1:
        raise ValueError(f"SSIM's window is 11 x 11 pixels, got {grey.shape[1]} x {grey.shape[0]}")
    mean = _windowed(grey)
    return Viewed(grey, mean, _windowed(grey * grey) - mean * mean)


def _windowed(values: Floats) -> Floats:
    """Gaussian mean of 11 x 11 pixels wherever the window lies inside the picture."""
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(values, SIGMA, radius=RADIUS)
    return smooth[RADIUS:-RADIUS, RADIUS:-RADIUS]


def ssim(x: Viewed, y: Viewed) -> float:
    """Eq. (2), in [-1, 1].

    Raises:
        ValueError: the pictures are of two sizes.
    """
    if x.grey.shape != y.grey.shape:
        raise ValueError(f"pictures of one size are compared, got {x.grey.shape}, {y.grey.shape}")
    shared = _windowed(x.grey * y.grey) - x.mean * y.mean
    luminance = (2 * x.mean * y.mean + C1) / (x.mean**2 + y.mean**2 + C1)
    structure = (2 * shared + C2) / (x.variance + y.variance + C2)
    return float((luminance * structure).mean())


def ssim_distance(x: Viewed, y: Viewed) -> float:
    """One term of Eq. (3), in [0, 1]."""
    return max(0.0, 1 - ssim(x, y)) / 2


def perceptual_diversity(pictures: Sequence[NDArray[Any]]) -> float:
    """Eq. (3).

    Args:
        pictures: two or more ``(h, w, 3)`` in [0, 255], of one size.
    """
    return pairwise_mean([viewed(p) for p in pictures], ssim_distance)
