r"""MaPO: margin-aware preference optimization without a reference (arXiv:2406.06424).

Symbols: m_w, m_l are the policy's denoising errors of winner and loser (mean over elements).

    (1)  phi(z) = z / (exp(z) - 1)                    decreasing, phi(0) = 1, in (0, 1)
    (2)  loss   = E[m_w] - beta E log sigmoid(T [phi(s m_w) - phi(s m_l)])      form: released
    (3)  loss   = E[m_w] - (1/k) E log sigmoid(phi(m_w)^k - phi(m_l)^k)         form: paper

Eq. (2) is the released code (mapo-t2i/mapo, utils.py) and the default: s = 0.5 (its ``snr_value``,
a constant and no SNR), T = 1000 (the scheduler's training steps, kept for flow models as a plain
constant), beta = 0.1. Eq. (3) is the text of the AAAI version, without s and T; the exponent is a
reading of its flattened Eq. (11). To first order phi(m)^k = exp(-k m / 2), so k does what s T does
in (2). The gradient factor that the paper prints is not the derivative of (1); here it is autograd.

With D = T [phi(s m_w) - phi(s m_l)], dL/dm_w = 1 + beta T s |phi'(s m_w)| sigmoid(-D) and
dL/dm_l = -beta T s |phi'(s m_l)| sigmoid(-D), |phi'| about 1/2: at the start the margin pulls 12
times as hard as the error. Bounded below, but nothing ties the policy to where it started.

Numbers: phi is evaluated as a series below z = 0.1, where exp(z) - 1 loses the digits its
derivative needs, and as -z exp(-z) / expm1(-z) above, which cannot overflow.

Denoising errors only: s and T are made for them; token generators have ``dpo`` and its relatives.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch
from t2i_align.objectives.margin import pair_metrics, weighted_mean
from t2i_align.objectives.ties import both_orders
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats

SERIES_BELOW = 0.1  # next term z^8 / 1209600: 1e-14 there


def phi(z: Tensor) -> Tensor:
    """Eq. (1), any shape, z >= 0."""
    small = z < SERIES_BELOW
    inside = torch.where(small, z, torch.zeros_like(z))  # keeps the unused branch out of gradients
    outside = torch.where(small, torch.ones_like(z), z)
    square = inside.square()
    series = 1 - inside / 2 + square * (1 / 12 + square * (-1 / 720 + square / 30240))
    return torch.where(small, series, -outside * torch.exp(-outside) / torch.expm1(-outside))


class MaPOOptions(Options):
    """Options of ``objective: {type: mapo}``."""

    type: Literal["mapo"] = "mapo"
    form: Literal["released", "paper"] = Field(
        default="released", description="Eq. (2), the released code, or Eq. (3), the paper's text"
    )
    beta: float = Field(
        default=0.1, gt=0, description="form released: weight of the margin; 0.1 in the code"
    )
    error_scale: float = Field(
        default=0.5, gt=0, description="form released: s, called snr_value in the code"
    )
    num_timesteps: float = Field(
        default=1000.0, gt=0, description="form released: T, the factor inside log sigmoid"
    )
    exponent: float = Field(
        default=64.0,
        gt=0,
        description="form paper: k (the paper's beta), the margin weighs 1/k; the value of the "
        "paper's main run is not known",
    )


class MaPO:
    """MaPO, Eq. (2) or (3) of the module; needs no reference."""

    Options: ClassVar[type[Options]] = MaPOOptions
    needs = Needs(
        kinds=frozenset({"elbo"}),
        only="phi of Eq. (2) is a function of denoising errors",
        views=frozenset({"policy"}),
    )
    citation: ClassVar[str] = """@article{hong2024marginaware,
  title={Margin-aware Preference Optimization for Aligning Diffusion Models without Reference},
  author={Hong, Jiwoo and Paul, Sayak and Lee, Noah and Rasul, Kashif and Thorne, James
          and Jeong, Jongheon},
  journal={arXiv preprint arXiv:2406.06424},
  year={2024}
}"""

    def __init__(self, options: MaPOOptions) -> None:
        """Keep the options."""
        self.options = options

    def init_state(self) -> dict[str, Tensor]:
        """Stateless."""
        return {}

    def rewards(self, m: Tensor) -> Tensor:
        """What stands inside log sigmoid for one item, ``(B,)``: T phi(s m) or phi(m)^k."""
        o = self.options
        if o.form == "paper":
            return phi(m) ** o.exponent
        return o.num_timesteps * phi(o.error_scale * m)

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Error of the winner and margin of bounded rewards."""
        o = self.options
        m = batch.scores["policy"].error_per_item()
        rho = self.rewards(m)
        margin_weight = 1 / o.exponent if o.form == "paper" else o.beta

        def loss(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
            return m[w] - margin_weight * F.logsigmoid(rho[w] - rho[l])  # (2), (3)

        per_pair = both_orders(loss, batch)
        with torch.no_grad():
            metrics = pair_metrics(batch, rho, rho[batch.chosen] - rho[batch.rejected])
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)
