r"""Ranking demonstrations above the policy's own samples (Diffusion-DRO, arXiv:2510.18353).

Inverse reinforcement learning without preferences: experts are real pictures, the others what the
policy makes of the same prompt. With m, r the policy's and the reference's mean squared errors,
(x-bar_t, eps) an expert noised at t, and (x_t, eps_old) a state the policy itself came through at
the same t with the noise it predicted there,

    (1)  d    = [m(x-bar_t, eps) - r(x-bar_t, eps)] - [m(x_t, eps_old) - r(x_t, eps_old)]
    (2)  loss = E max(d + margin, 0)

margin .001 as released (basiclab/DiffusionDRO, train.py); the paper prints max(margin', d) with
margin' = -.001, which has the same gradient and lies .001 lower. Errors are means over elements and
of the model's own prediction (noise in the paper), so the margin is in that unit; a sum would want
D times as much. Bounded below by 0.

The second target is the policy's own prediction. While a state is fresh its error is 0 and so is
the gradient of that error: own states then only open and close the hinge through r(x_t, eps_old),
how far the policy has come from the reference, and what is learned is the demonstrations. So it is
with the released settings (rounding apart): a buffer as large as a batch, refilled before every
batch by a snapshot taken after every update. States of earlier policies do push the policy away
from them: ``rollout.replay_size`` above the batch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch
from t2i_align.objectives.margin import by_time_bin, weighted_mean
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats


class DiffusionDROOptions(Options):
    """Options of ``objective: {type: diffusion_dro}``."""

    type: Literal["diffusion_dro"] = "diffusion_dro"
    margin: float = Field(
        default=0.001,
        ge=0,
        description="experts are wanted this much better than own samples, in units of the mean "
        "squared error (0.001)",
    )


class DiffusionDRO:
    """Demonstrations against a replay of the policy's own samples, Eq. (1) and (2)."""

    Options: ClassVar[type[Options]] = DiffusionDROOptions
    needs = Needs(
        kinds=frozenset({"elbo"}),
        only="its margin is of denoising errors on the policy's own noise",
        layout="winners",
        coupling="none",
        cacheable_reference=False,
        feed="replay",
    )
    citation: ClassVar[str] = """@inproceedings{wu2025diffusion,
  title={Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback},
  author={Wu, Yi-Lun and Ruan, Bo-Kai and Tseng, Chiang and Shuai, Hong-Han},
  booktitle={NeurIPS},
  year={2025}
}"""

    def __init__(self, options: DiffusionDROOptions) -> None:
        """Keep the options."""
        self.options = options

    def init_state(self) -> dict[str, Tensor]:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Hinge of each (expert, own state); see the module for the formula."""
        m = batch.scores["policy"].error_per_item()
        gap = m - batch.scores["reference"].error_per_item().detach()
        expert, own = gap[batch.chosen], gap[batch.rejected]
        d = expert - own  # (1)
        per_pair = (d + self.options.margin).clamp(min=0)  # (2)
        with torch.no_grad():
            metrics = {
                "error_gap/expert": expert,
                "error_gap/own": own,
                "error/expert": m[batch.chosen],
                "error/own": m[batch.rejected],
                "dro/d": d,
                "dro/active": (per_pair > 0).float(),
            }
            if batch.lam is not None:
                metrics |= by_time_bin("dro/d", d, batch.lam[batch.chosen].float().mean(1))
        metrics = {k: v.detach().float() for k, v in metrics.items()}
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)
