r"""SmPO-Diffusion (Lu et al. 2025, arXiv:2506.02698): inverted noise, a margin as sure as a judge.

Symbols: s a judge's value of a picture, w and l winner and loser; m, r policy and reference
denoising errors of one event.

    (1)  s' = (s - value_min) / (value_max - value_min)
    (2)  p  = exp(s'_w) / (exp(s'_w) + exp(s'_l))
    (3)  g  = gamma (2p - 1) = gamma tanh((s'_w - s'_l) / 2)
    (4)  u  = -(beta/2) g [(m_w - m_l) - (r_w - r_l)]        loss = -E log sigmoid(u)

Noise comes from DDIM inversion with ReNoise (``process/inversion.py``), no guidance. The paper
smooths both densities, p~(x_w) ~ p(x_w)^a p(x_l)^(gamma - a) with a / gamma = p, which multiplies
DPO's logit by 2a - gamma = g. Errors are means over elements and the logit carries 1/2, so the
released code's beta is ours; what compares with DPO's is beta g, with g up to 4.621 at gamma 10.

Choices of the released code (JaydenLyh/SmPO, train.py), options here at its values unless said:

    winner            ``value``: the picture the judge prefers, whatever the label says (kept ties
                      are decided too); ``label``: the label's winner, weighed by |g|
    values            fixed: minimum and maximum of PickScore's raw cosine, no logit scale, over
                      Pick-a-Pic. Another judge or unit needs its own, or ``from_data``: those of
                      the values seen so far, which in the first steps depends on the batch. A
                      value more than a whole range outside is refused: its unit is another
    ReNoise           at every step; a summary of the paper says once, at the end
    inversion_steps   10 for SDXL (here), 5 for SD1.5; that summary says 9. Their grid: ``inpo``
    batch             the code weighs every pair by the first one's p; here each has its own
    sft_weight        adds :mod:`anchor`; neither paper nor code has it
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from t2i_align.contract import Inversion, LossOutput, ScoredBatch
from t2i_align.errors import DataError
from t2i_align.objectives.anchor import InvertedFields, anchored
from t2i_align.objectives.inpo import InPO
from t2i_align.objectives.margin import (
    accuracy,
    implicit_rewards,
    in_range,
    pair_metrics,
    weighted_mean,
)
from t2i_align.options import Options
from t2i_align.protocols import Stats


class SmPOOptions(InvertedFields):
    """Options of ``objective: {type: smpo}``."""

    type: Literal["smpo"] = "smpo"
    beta: float = Field(default=5000.0, gt=0, description="tie; 2000 SD1.5, 5000 SDXL")
    gamma: float = Field(default=10.0, gt=0, description="Eq. (3); 10 as published")
    values: Literal["fixed", "from_data"] = Field(
        default="fixed", description="range of Eq. (1): the two numbers below, or all values so far"
    )
    value_min: float = Field(default=0.11543526500463486, description="fixed: judge's minimum")
    value_max: float = Field(default=0.28201571106910706, description="fixed: judge's maximum")
    winner: Literal["value", "label"] = Field(
        default="value", description="who wins: the picture the judge prefers, or the label's"
    )
    inversion_steps: int = Field(default=10, ge=1, le=100, description="10 SDXL, 5 SD1.5")
    inversion_renoise: bool = Field(default=True, description="average two predictions a step")
    inversion_grid: Literal["exact", "released"] = Field(default="exact", description="as inpo's")

    @model_validator(mode="after")
    def _range(self) -> SmPOOptions:
        if self.value_max <= self.value_min:
            raise ValueError(f"value_max {self.value_max} is not above value_min {self.value_min}")
        return self


class SmPO:
    """SmPO-Diffusion, Eq. (1) to (4) of the module on inverted events."""

    Options: ClassVar[type[Options]] = SmPOOptions
    needs = replace(InPO.needs, values=True)
    citation: ClassVar[str] = """@inproceedings{lu2025smpo,
  title={Smoothed Preference Optimization via {ReNoise} Inversion for Aligning Diffusion Models
         with Varied Human Preferences},
  author={Lu, Yunhong and Wang, Qichao and Cao, Hengyuan and Xu, Xiaoyin and Zhang, Min},
  booktitle={ICML},
  year={2025}
}"""

    def __init__(self, options: SmPOOptions) -> None:
        """Keep the options."""
        self.options = options
        self.inversion = Inversion(
            num_steps=options.inversion_steps,
            renoise=options.inversion_renoise,
            view=options.inversion_view,
            grid=options.inversion_grid,
        )

    def init_state(self) -> dict[str, Tensor]:
        """The range of values seen, for ``from_data``: nothing yet."""
        if self.options.values == "fixed":
            return {}
        inf = torch.tensor(float("inf"))
        return {"value_min": inf, "value_max": -inf}

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Loss and metrics of one micro-batch of inverted events with judge values."""
        normal, state = self._normalised(batch.values, state, stats)
        gap = normal[batch.chosen] - normal[batch.rejected]
        g = self.options.gamma * torch.tanh(gap / 2).abs()  # (2), (3)
        if self.options.winner == "value":
            batch = _by_value(batch, gap)
        rho = self.options.beta * implicit_rewards(batch)
        u = g * (rho[batch.chosen] - rho[batch.rejected])
        p = batch.preference
        per_pair = -p * F.logsigmoid(u) - (1 - p) * F.logsigmoid(-u)  # (4)
        per_pair = anchored(per_pair, batch, self.options.sft_weight)
        with torch.no_grad():
            metrics = pair_metrics(batch, rho, u)
            metrics |= {"smpo/weight": g.float(), "smpo/agreement": accuracy(gap)}
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)

    def _normalised(
        self, values: Tensor | None, state: dict[str, Tensor], stats: Stats
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. (1) of every item, and the range it leaves behind."""
        if values is None or not bool(values.isfinite().all()):
            raise DataError("smpo: items without a judge's value", "set data.label_by.judges")
        if self.options.values == "fixed":
            low, high = self.options.value_min, self.options.value_max
            in_range(values, low, high)
            return (values - low) / (high - low), state
        seen = stats.gather(values)
        low, high = state["value_min"].minimum(seen.min()), state["value_max"].maximum(seen.max())
        span = {"value_min": low, "value_max": high}
        return torch.where(high > low, (values - low) / (high - low), 0.0), span


def _by_value(batch: ScoredBatch, gap: Tensor) -> ScoredBatch:
    """The batch with the judge's winners for the labels'; ``gap (P,)`` of chosen over rejected."""
    pair = torch.stack([batch.chosen, batch.rejected])
    won, lost = torch.where(gap >= 0, pair, pair.flip(0))
    return replace(batch, chosen=won, rejected=lost, preference=torch.ones_like(batch.preference))
