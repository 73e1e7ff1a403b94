r"""DDIM-InPO (Lu et al. 2025, arXiv:2503.18454): DPO on noise found by inverting the sample.

Symbols: alpha_t, sigma_t coefficients of the process at the drawn time t; m, r policy and reference
denoising errors of one event, w and l winner and loser.

    (1)  x_t = DDIM inversion of x_0 up to t, the network's own predictions, no guidance
    (2)  eps = (x_t - alpha_t x_0) / sigma_t                       the target, each sample its own
    (3)  u   = -(beta/2) [(m_w - m_l) - (r_w - r_l)]
    (4)  loss = -E log sigmoid(u)

Winner and loser share t but not the noise, which (2) makes of each picture. (1) and (2) happen when
the event is drawn (``process/inversion.py``); (3) and (4) are Diffusion-DPO, so beta is that of the
suite: errors are means over elements, the logit carries 1/2, and the released code's beta is ours.

The paper derives (3) with a weight depending on t; its released code (JaydenLyh/InPO, train.py) has
none, nor has this file. Choices of the code that are options here, at its values unless said:

    inversion_view    the policy as it is trained; a summary of the paper says the reference
    inversion_eta     0.1 of DDIM's noise after every step, winner and loser apart
    inversion_grid    exact here. The code's grid ends beside t (by up to 99 of 1000 levels), on
                      which side depends on the version of diffusers; ``released`` is that of the
                      one it pins, 0.20
    batch             the code inverts to the first pair's t and so wants one pair a device; here
                      every item has its own

``sft_weight`` adds :mod:`anchor`, of which the paper has nothing.
Kept ties: with probability ``preference`` that the first is better, loss = -p log s(u) - (1-p) log
s(-u).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.contract import Inversion, LossOutput, ScoredBatch
from t2i_align.objectives.anchor import InvertedFields, anchored
from t2i_align.objectives.margin import implicit_rewards, pair_metrics, weighted_mean
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats


class InPOOptions(InvertedFields):
    """Options of ``objective: {type: inpo}``."""

    type: Literal["inpo"] = "inpo"
    beta: float = Field(
        default=5000.0,
        gt=0,
        description="strength of the tie to the reference; 2000 (SD1.5) and 5000 (SDXL) as "
        "published",
    )
    inversion_steps: int = Field(
        default=10,
        ge=1,
        le=100,
        description="steps of the whole grid, 10 as published; a pair pays half of them on average",
    )
    inversion_eta: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="fresh noise after each step, in DDIM's standard deviations; 0.1 as published",
    )
    inversion_grid: Literal["exact", "released"] = Field(
        default="exact",
        description="exact ends at the drawn level; released: the authors' code under diffusers "
        "0.20, which ends beside it (not for flow models)",
    )


class InPO:
    """DDIM-InPO, Eq. (3) and (4) of the module on inverted events."""

    Options: ClassVar[type[Options]] = InPOOptions
    needs = Needs(
        kinds=frozenset({"elbo"}),
        only="its events come from inverting a denoiser's sampler",
        coupling="time",
        cacheable_reference=False,
    )
    citation: ClassVar[str] = """@inproceedings{lu2025inpo,
  title={{InPO}: Inversion Preference Optimization with Reparametrized {DDIM} for Efficient
         Diffusion Model Alignment},
  author={Lu, Yunhong and Wang, Qichao and Cao, Hengyuan and Wang, Xierui and Xu, Xiaoyin
          and Zhang, Min},
  booktitle={CVPR},
  year={2025}
}"""

    def __init__(self, options: InPOOptions) -> None:
        """Keep the options; (1) is done as ``inversion`` says."""
        self.options = options
        self.inversion = Inversion(
            num_steps=options.inversion_steps,
            eta=options.inversion_eta,
            view=options.inversion_view,
            grid=options.inversion_grid,
        )

    def init_state(self) -> dict[str, Tensor]:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Loss and metrics of one micro-batch of inverted events."""
        rho = self.options.beta * implicit_rewards(batch)
        u = rho[batch.chosen] - rho[batch.rejected]  # (3)
        p = batch.preference
        per_pair = -p * F.logsigmoid(u) - (1 - p) * F.logsigmoid(-u)  # (4)
        per_pair = anchored(per_pair, batch, self.options.sft_weight)
        with torch.no_grad():
            metrics = pair_metrics(batch, rho, u)
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)
