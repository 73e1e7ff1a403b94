r"""Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908) on any likelihood kind.

Symbols: m, r are policy and reference denoising errors of one event, w and l winner and loser.

    (1)  rho(x) = beta [log p_policy(x) - log p_ref(x)]            implicit reward
    (2)  u      = rho(w) - rho(l)
    (3)  loss   = -E log sigmoid(u)

On ``elbo`` scores, log p = -error/2 with the mean over elements, so
``u = -(beta/2) [(m_w - m_l) - (r_w - r_l)]``, which is the released code
(SalesforceAIResearch/DiffusionDPO, train.py). The paper's own equations sum over elements (Eq. 14
and 46 with different factors); the suite follows the code. A sum convention with factor 1 is
reached with ``beta_sum = 0.5 beta / num_elements``.

    (4)  loss  += sft_weight E[-log p_policy(w)] on tokens, sft_weight E[m_w] on elbo

Eq. (4) is the anchor of :mod:`anchor`, off by default.

    (5)  rho(x) <- [rho(x) - (1 - a) v(x)] / a                     a = modpo_weight, v judge values

Eq. (5) is MODPO (Zhou et al. 2023, arXiv:2310.03708; off at a = 1): labels speak for one objective
of weight a, a judge for another of weight 1 - a. v is in units of the logit: scale the judge.

Other links in place of (3) are in :mod:`links`; weights of pairs in :mod:`margin_weights`.
Kept ties: with probability ``preference`` that the first is better, loss = -p log s(u) - (1-p) log
    s(-u).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch, TensorDict
from t2i_align.objectives.anchor import AnchorFields, anchored
from t2i_align.objectives.links import LINKS, Link, pair_losses
from t2i_align.objectives.margin import implicit_rewards, pair_metrics, weighted_mean
from t2i_align.objectives.margin_weights import WEIGHTS, Weight
from t2i_align.objectives.pairs import pair_margins
from t2i_align.objectives.picks import Picked
from t2i_align.options import Options
from t2i_align.protocols import ANY_KIND, Needs, Stats


class DPOOptions(AnchorFields):
    """Options of ``objective: {type: dpo}``."""

    type: Literal["dpo"] = "dpo"
    beta: float = Field(
        default=5000.0,
        gt=0,
        description="strength of the tie to the reference; elbo: 2000 (SD1.5) to 5000 (SDXL) "
        "in the paper, 100 to 2000 on flow models, 0.1 on tokens",
    )
    link: Link = Field(
        default="sigmoid",
        description="loss of the margin: a name, or a section with type and parameters",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="probability that a label is flipped (conservative DPO); 0 in the paper",
    )
    weight: Weight = Field(default=None, description="how much each pair counts; null for alike")
    modpo_weight: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the labels' objective, Eq. (5); the rest is the judge values'",
    )

    @field_validator("label_smoothing")
    @classmethod
    def _of_sigmoid(cls, value: float, info: ValidationInfo) -> float:
        link = info.data.get("link", {"type": "sigmoid"})["type"]
        if value > 0 and link != "sigmoid":
            raise ValueError(f"belongs to link sigmoid, got link '{link}'; leave one of them out")
        return value


class DPO:
    """Diffusion-DPO, Eq. (1) to (3) of the module."""

    Options: ClassVar[type[Options]] = DPOOptions
    needs = Needs(kinds=ANY_KIND)
    citation: ClassVar[str] = """@inproceedings{wallace2024diffusion,
  title={Diffusion Model Alignment Using Direct Preference Optimization},
  author={Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and Lou, Aaron
          and Purushwalkam, Senthil and Ermon, Stefano and Xiong, Caiming and Joty, Shafiq
          and Naik, Nikhil},
  booktitle={CVPR},
  year={2024}
}"""

    def __init__(self, options: DPOOptions) -> None:
        """Keep the options; ``needs`` follows from them."""
        self.options = options
        self.link = Picked(LINKS, "link", options.link)
        self.weight = Picked(WEIGHTS, "weight", options.weight) if options.weight else None
        values = options.modpo_weight < 1 or bool(self.weight and self.weight.row.needs_values)
        self.needs = replace(DPO.needs, values=values, bounded_below=self.link.row.bounded_below)

    def init_state(self) -> TensorDict:
        """What link and weight keep; empty for most."""
        return self.link.init_state() | (self.weight.init_state() if self.weight else {})

    def __call__(self, batch: ScoredBatch, state: TensorDict, stats: Stats) -> LossOutput:
        """Loss and TRL-style metrics of one micro-batch; see the module for the formula."""
        o, extra = self.options, {}
        rho = o.beta * implicit_rewards(batch)  # (1)
        m = pair_margins(batch, self._modpo(rho, batch), o.beta, stats)  # (2)
        p = batch.preference
        m = replace(m, preference=p * (1 - o.label_smoothing) + (1 - p) * o.label_smoothing)
        if self.weight is not None:
            (m, extra["weights/pair"]), state = self.weight(m, state)
        per_pair, state = pair_losses(self.link, m, state)  # (3)
        per_pair = per_pair * extra.get("weights/pair", 1.0)
        per_pair = anchored(per_pair, batch, o.sft_weight)  # (4)
        with torch.no_grad():
            extra |= {key: value.expand_as(p) for key, value in state.items()}
            metrics = pair_metrics(batch, rho, m.u) | {k: v.float() for k, v in extra.items()}
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)

    def _modpo(self, rho: Tensor, batch: ScoredBatch) -> Tensor:
        """Eq. (5)."""
        a = self.options.modpo_weight
        if a == 1:
            return rho
        if batch.values is None:
            raise ValueError("modpo_weight needs a judge's value of every item")
        return (rho - (1 - a) * batch.values) / a
