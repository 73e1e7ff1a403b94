"""Sums of adapters, exact, and the best adapter of a smaller rank.

For adapters i of the same layers with updates dW_i = s_i B_i A_i and weights w_i

    (1)  sum_i w_i dW_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

so a weighted sum is an adapter whose rank is the sum of the ranks; no factor is averaged. With
thin QR factors B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of R_B R_A^T, a
matrix of the rank's size, and by Eckart and Young the best update of rank r and its error are

    (2)  dW_r = sum_{k <= r} sigma_k u_k v_k^T,      |dW - dW_r|_F^2 = sum_{k > r} sigma_k^2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from t2i_align.errors import ModelError
from t2i_align.export.adapter import Adapter, LowRank


def scale(adapter: Adapter, weight: float) -> Adapter:
    """The adapter times a number: B is, so that alpha stays the positive number it was."""
    refuse_dora([adapter])
    layers = adapter.layers.items()
    return Adapter({name: replace(x, up=weight * x.up) for name, x in layers})


def add(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Eq. (1).

    Raises:
        ModelError: they change different layers, or layers of different sizes, or are DoRA.
    """
    if len(adapters) != len(weights):
        raise ModelError(
            f"{len(adapters)} adapters and {len(weights)} weights", "give one --weight an adapter"
        )
    refuse_dora(adapters)
    for number, other in enumerate(adapters[1:], 2):
        refuse_mismatch(adapters[0], other, number)
    return Adapter(
        {n: _stack([a.layers[n] for a in adapters], weights) for n in adapters[0].layers}
    )


def interpolate(a: Adapter, b: Adapter, t: float) -> Adapter:
    """``(1 - t) a + t b``."""
    return add([a, b], [1 - t, t])


def _stack(layers: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    ups = [w * x.scale * x.up.double() for w, x in zip(weights, layers, strict=True)]
    dtype = reduce(torch.promote_types, [x.up.dtype for x in layers])
    down = torch.cat([x.down.to(dtype) for x in layers], 0)
    return LowRank(down, torch.cat(ups, 1).to(dtype), 1.0)


@dataclass(frozen=True)
class Truncation:
    """What a smaller rank lost.

    Args:
        adapter: the truncated one.
        error: relative Frobenius error over all layers together, in [0, 1].
        worst: the layer with the largest relative error.
        worst_error: that error.
    """

    adapter: Adapter
    error: float
    worst: str
    worst_error: float


def truncate(adapter: Adapter, rank: int) -> Truncation:
    """Eq. (2) for every layer; one whose rank is not above ``rank`` stays as it is."""
    refuse_dora([adapter])
    layers, lost, whole = {}, {}, {}
    for name, layer in adapter.layers.items():
        layers[name], lost[name], whole[name] = _truncate(layer, rank)
    relative = {n: (lost[n] / max(whole[n], 1e-300)) ** 0.5 for n in layers}
    worst = max(relative, key=lambda n: relative[n])
    error = (sum(lost.values()) / max(sum(whole.values()), 1e-300)) ** 0.5
    return Truncation(Adapter(layers), error, worst, relative[worst])


def _truncate(layer: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """The layer, the squared norm it lost and the squared norm it had."""
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    q_b, r_b = torch.linalg.qr(up)
    q_a, r_a = torch.linalg.qr(down.T)
    u, sigma, vt = torch.linalg.svd(layer.scale * r_b @ r_a.T, full_matrices=False)
    whole = float(sigma.square().sum())
    if layer.rank <= rank:
        return layer, 0.0, whole
    root = sigma[:rank].sqrt()
    new_up, new_down = q_b @ u[:, :rank] * root, root[:, None] * (vt[:rank] @ q_a.T)
    shape = layer.up.shape[2:], layer.down.shape[1:]
    made = LowRank(
        new_down.reshape(-1, *shape[1]).to(layer.down.dtype),
        new_up.reshape(*new_up.shape, *shape[0]).to(layer.up.dtype),
        1.0,
    )
    return made, float(sigma[rank:].square().sum()), whole


def refuse_dora(adapters: Sequence[Adapter]) -> None:
    """DoRA's update is not linear in its factors.

    Raises:
        ModelError: one of them is DoRA.
    """
    if any(a.is_dora for a in adapters):
        raise ModelError(
            "a DoRA adapter cannot be scaled or added: its update divides by a norm of the "
            "base weight",
            "merge it with t2i-align export --format merged",
        )


def refuse_mismatch(a: Adapter, b: Adapter, number: int) -> None:
    """Adapters are added layer by layer.

    Raises:
        ModelError: they have different layers, or sizes; names examples of each.
    """
    sides = [("the first", a, b), (f"number {number}", b, a)]
    only = [(who, sorted(x.layers.keys() - y.layers.keys())) for who, x, y in sides]
    parts = [f"only {who} has {', '.join(n[:3])} ({len(n)} layers)" for who, n in only if n]
    if parts:
        raise ModelError(
            f"the adapters change different layers: {'; '.join(parts)}",
            "add adapters of the same model and target_modules",
        )
    for name, layer in a.layers.items():
        sizes = [_size(layer), _size(b.layers[name])]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"layer {name} is {sizes[0]} in the first adapter and {sizes[1]} in number "
                f"{number}",
                "add adapters of the same model",
            )


def _size(layer: LowRank) -> tuple[int, ...]:
    return layer.up.shape[0], *layer.down.shape[1:]
