r"""Diffusion-SDPO (Fu et al. 2025, arXiv:2511.03317): DPO that does not worsen the winner.

DPO can raise its margin while both errors grow. A step that lowers the winner's error m_w and
raises the loser's m_l keeps m_w falling, to first order, if the loser's gradient is scaled by

    (1)  lambda = min(1, (1 - mu) |g_w|^2 / <g_l, g_w>)  where <g_l, g_w> > 0, else 1
    (2)  g_w, g_l = gradients of m_w, m_l with respect to the predictions, 2 (pred - target) / N
    (3)  m_l <- sg(m_l) + lambda (m_l - sg(m_l))                 sg stops gradients

so that <-g_w + lambda g_l, g_w> <= -mu |g_w|^2. The value of the loss is DPO's; only its gradient
through losers changes. Predictions stand in for weights: the bound is exact where winner and loser
move the network alike.

The released code (AIDC-AI/Diffusion-SDPO, train.py) takes the products of (1) over the whole batch
of one process, here ``scope: batch`` and the default; ``pair`` has a lambda for each pair, which
does not depend on the batch. The code adds 1e-9 to the denominator; here there is none. mu is .9
for SD1.5, .6 for SDXL. Links and beta are those of :mod:`dpo` (its authors also use dmpo). Elements
outside an event's element mask are not known here and enter (1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, Score, ScoredBatch, TensorDict
from t2i_align.objectives.anchor import AnchorFields
from t2i_align.objectives.dpo import DPO, DPOOptions
from t2i_align.objectives.links import Link
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats

SHARED = {"beta", "link", "sft_weight"}  # DPO's own


class DPOSafeguardOptions(AnchorFields):
    """Options of ``objective: {type: dpo_safeguard}``."""

    type: Literal["dpo_safeguard"] = "dpo_safeguard"
    beta: float = Field(default=5000.0, gt=0, description="as in dpo")
    link: Link = Field(default="sigmoid", description="as in dpo")
    mu: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="share of the winner's own descent that is kept; 0.9 SD1.5, 0.6 SDXL",
    )
    scope: Literal["batch", "pair"] = Field(
        default="batch", description="over what Eq. (1) takes its products; batch as released"
    )


class DPOSafeguard:
    """Diffusion-SDPO: DPO with the loser's gradient scaled by Eq. (1)."""

    Options: ClassVar[type[Options]] = DPOSafeguardOptions
    needs = Needs(
        kinds=frozenset({"elbo"}),
        only="it scales gradients at the denoiser's prediction",
        want=frozenset({"pred", "target"}),
    )
    citation: ClassVar[str] = """@article{fu2025diffusionsdpo,
  title={Diffusion-{SDPO}: Safeguarded Direct Preference Optimization for Diffusion Models},
  author={Fu, Minghao and Wang, Guo-Hua and Cui, Tianyu and Chen, Qing-Guo and Xu, Zhao
          and Luo, Weihua and Zhang, Kaifu},
  journal={arXiv preprint arXiv:2511.03317},
  year={2025}
}"""

    def __init__(self, options: DPOSafeguardOptions) -> None:
        """Keep the options; ``needs`` follows from the link."""
        self.options = options
        self.dpo = DPO(DPOOptions(**options.model_dump(include=SHARED)))
        bounded = self.dpo.needs.bounded_below
        self.needs = replace(DPOSafeguard.needs, bounded_below=bounded)

    def init_state(self) -> TensorDict:
        """The link's."""
        return self.dpo.init_state()

    def __call__(self, batch: ScoredBatch, state: TensorDict, stats: Stats) -> LossOutput:
        """DPO's loss with another gradient; one item must not be in two pairs."""
        policy = batch.scores["policy"]
        scale = self.scales(policy, batch.chosen, batch.rejected)  # (1)
        logp = _scale_gradient(policy.logp, batch.rejected, scale)  # (3)
        scores = {**batch.scores, "policy": replace(policy, logp=logp)}
        out = self.dpo(replace(batch, scores=scores), state, stats)
        return replace(out, metrics=out.metrics | {"safeguard/lambda": scale.float()})

    @torch.no_grad()
    def scales(self, policy: Score, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Lambda of each pair, ``(P,)``; Eq. (1) and (2), where the factor of (2) cancels."""
        if policy.pred is None or policy.target is None:
            raise ValueError("dpo_safeguard needs scores with pred and target")
        gradient = (policy.pred - policy.target).flatten(2) * policy.mask[..., None]
        winner, loser = gradient[chosen].flatten(1), gradient[rejected].flatten(1)
        squares, products = winner.square().sum(1), (winner * loser).sum(1)
        if self.options.scope == "batch":
            squares, products = (x.sum().expand_as(x) for x in (squares, products))
        opposed = products > 0
        cap = (1 - self.options.mu) * squares / torch.where(opposed, products, 1.0)
        return torch.where(opposed, cap.clamp(max=1.0), 1.0)


def _scale_gradient(x: Tensor, items: Tensor, scale: Tensor) -> Tensor:
    """Eq. (3): ``x (B, U)`` unchanged, its gradient times ``scale (P,)`` at ``items (P,)``."""
    factor = torch.ones_like(x[:, :1]).index_copy(0, items, scale[:, None].to(x.dtype))
    return x.detach() + factor * (x - x.detach())
