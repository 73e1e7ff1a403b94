r"""Step-by-step preference optimization (SPO, Liang et al. 2024, arXiv:2406.04314).

At a step of the policy's own trajectory two next states w and l, usually drawn from one state x_t,
are compared by a judge that looks at what they lead to. With p(x'|x_t) the Gaussian of the step
(process/transition.py),

    (1)  r(x') = p_policy(x'|x_t, c) / p_ref(x'|x_t, c)
    (2)  loss  = -E log sigmoid( beta ln clip(r(w)) - beta ln clip(r(l)) ),
         clip(r) = min(max(r, 1 - eps), 1 + eps)

beta 10 and eps .1 as in the released code (RockeyCoss/SPO, train_spo.py). Its densities are means
over elements, and so are a transition's here: beta carries over as it is. Per the density itself
(their sum) it would be 10 / D and the ratio far outside the clip. Both networks are guided as the
sampler was. The released line writes -log(sigmoid(.)); logsigmoid here, safe where eps is large.

The clip looks at neither the sign nor the winner: once |ln r| leaves about .1 the gradient is zero
even where it would correct, unlike PPO's. Metric ``ratio/clipped`` says how often. Since ratios are
near 1 the loss stays near ln 2 = .693 for a whole run; watch ``judge/mean`` instead, the score of
the pairs that the policy samples.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch, reduce_units
from t2i_align.objectives.margin import pair_metrics, weighted_mean
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats


class SPOOptions(Options):
    """Options of ``objective: {type: spo}``."""

    type: Literal["spo"] = "spo"
    beta: float = Field(
        default=10.0, gt=0, description="strength, on log-densities averaged over elements (10)"
    )
    eps: float = Field(
        default=0.1, gt=0, lt=1, description="ratios are clipped to 1 - eps and 1 + eps (0.1)"
    )


def step_log_ratio(batch: ScoredBatch) -> Tensor:
    """``ln r`` of every transition, ``(B, S)``; Eq. (1)."""
    return batch.scores["policy"].logp - batch.scores["reference"].logp.detach()


def clipped_pairs(batch: ScoredBatch, beta: float, eps: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (2) of each pair, averaged over its steps, ``(P,)``, and metrics."""
    w, l = batch.chosen, batch.rejected  # noqa: E741
    ratio = step_log_ratio(batch)
    clipped = ratio.clamp(math.log1p(-eps), math.log1p(eps))  # ln clip(r), without exp
    u = beta * (clipped[w] - clipped[l])
    mask = batch.scores["policy"].mask
    mask = mask[w] & mask[l]
    per_pair = reduce_units(-F.logsigmoid(u), mask, "mean")
    with torch.no_grad():
        metrics = pair_metrics(
            batch, beta * reduce_units(ratio, batch.scores["policy"].mask, "mean"),
            reduce_units(u, mask, "mean"),
        )  # fmt: skip
        metrics["ratio/clipped"] = (clipped != ratio).float().mean(1)
        metrics["ratio/log"] = ratio.abs().mean(1)
        if batch.values is not None:
            metrics |= {
                "judge/chosen": batch.values[w].float(),
                "judge/rejected": batch.values[l].float(),
                "judge/mean": batch.values.float(),
            }
    return per_pair, metrics


class SPO:
    """Step-by-step preferences on the policy's own trajectories, Eq. (1) and (2)."""

    Options: ClassVar[type[Options]] = SPOOptions
    needs = Needs(
        kinds=frozenset({"transition"}),
        only="its ratios are of steps of the policy's own trajectories",
        coupling="none",
        cacheable_reference=False,
        feed="trajectory",
    )
    compares: ClassVar[Literal["steps", "trajectories"]] = "steps"
    citation: ClassVar[str] = """@inproceedings{liang2025aesthetic,
  title={Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step
         Preference Optimization},
  author={Liang, Zhanhao and Yuan, Yuhui and Gu, Shuyang and Chen, Bohan and Hang, Tiankai
          and Cheng, Mingxi and Li, Ji and Zheng, Liang},
  booktitle={CVPR},
  year={2025}
}"""

    def __init__(self, options: SPOOptions) -> None:
        """Keep the options."""
        self.options = options

    def init_state(self) -> dict[str, Tensor]:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Loss and metrics of one micro-batch of pairs of transitions."""
        per_pair, metrics = clipped_pairs(batch, self.options.beta, self.options.eps)
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)
