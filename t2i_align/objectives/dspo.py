r"""DSPO: direct score preference optimization (Zhu et al., ICLR 2025, openreview DomBynQsqt).

Symbols: per pair, a = pred_w - target, d = pred_w - ref_w (tensors of the winner), u the logit of
Diffusion-DPO with this beta, ||.||^2 the mean over elements.

    (1)  u    = -(beta/2) [(m_w - m_l) - (r_w - r_l)]
    (2)  loss = || a - beta (1 - sigmoid(u)) d ||^2                     form: sd15 (default)
    (3)  loss = || (1 - sigmoid(u)) d ||^2      where E||d||^2 >= 0.1   form: sdxl
                (1 - sigmoid(u))^2              elsewhere

These are the two branches of the released code (huaishengzhu/DSPO, train.py), which are different
losses. In (2) the winner is regressed onto a target tilted away from the reference; with the
launcher's beta 0.001 (searched: 0.001, 0.01, 0.05) sigmoid(u) stays at 1/2 and the loss is nearly
``sft`` on winners. Above 2, 1 - beta / 2 < 0 turns the prediction's own gradient at the start
around: winners are unlearnt. (3) has no term of the likelihood and takes beta 1000 to 5000. The
loser enters through u only, and u is not cut from the gradient.

The test of (3) is on the mean over all pairs and ranks; the code takes a process's own. Several
draws of an item share one u, and the square is averaged over them. Bounded below by 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, Score, ScoredBatch, reduce_units
from t2i_align.objectives.margin import implicit_rewards, pair_metrics, weighted_mean
from t2i_align.objectives.ties import both_orders
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats

SWITCH = 0.1  # of Eq. (3), in the code


class DSPOOptions(Options):
    """Options of ``objective: {type: dspo}``."""

    type: Literal["dspo"] = "dspo"
    form: Literal["sd15", "sdxl"] = Field(
        default="sd15", description="Eq. (2) or Eq. (3): the branches of the released code"
    )
    beta: float = Field(
        default=0.001,
        gt=0,
        description="sd15: 0.001 to 0.05; sdxl: 1000 to 5000 (the release's values)",
    )


def tensors(score: Score) -> tuple[Tensor, Tensor]:
    """Prediction and target, ``(B, S, *L)`` each.

    Raises:
        ValueError: the score holds none.
    """
    if score.pred is None or score.target is None:
        raise ValueError("dspo needs the tensors pred and target of every score")
    return score.pred, score.target


class DSPO:
    """Score matching of the winner towards a preferred score; Eq. (2) or (3)."""

    Options: ClassVar[type[Options]] = DSPOOptions
    needs = Needs(
        kinds=frozenset({"elbo"}),
        only="it matches the scores that a denoiser predicts",
        want=frozenset({"pred", "target"}),
        cacheable_reference=False,
    )
    citation: ClassVar[str] = """@inproceedings{zhu2025dspo,
  title={{DSPO}: Direct Score Preference Optimization for Diffusion Model Alignment},
  author={Zhu, Huaisheng and Xiao, Teng and Honavar, Vasant G.},
  booktitle={ICLR},
  year={2025}
}"""

    def __init__(self, options: DSPOOptions) -> None:
        """Keep the options."""
        self.options = options

    def init_state(self) -> dict[str, Tensor]:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """The chosen branch, averaged over elements, draws and pairs."""
        o = self.options
        mask = batch.scores["policy"].mask
        pred, target = tensors(batch.scores["policy"])
        d = pred - tensors(batch.scores["reference"])[0].detach()
        rho = o.beta * implicit_rewards(batch)

        def square(x: Tensor, index: Tensor) -> Tensor:
            """Mean square over elements and draws, ``(P, S, *L) -> (P,)``."""
            return reduce_units(x.square().flatten(2).mean(2), mask[index], "mean")

        far = stats.mean(square(d[batch.chosen], batch.chosen)) >= SWITCH

        def loss(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
            pull = torch.sigmoid(rho[l] - rho[w])  # 1 - sigmoid(u), Eq. (1)
            c = pull.reshape(-1, *[1] * (pred.dim() - 1))
            if o.form == "sd15":
                return square(pred[w] - target[w] - o.beta * c * d[w], w)  # (2)
            return torch.where(far, square(c * d[w], w), pull.square())  # (3)

        per_pair = both_orders(loss, batch)
        with torch.no_grad():
            u = rho[batch.chosen] - rho[batch.rejected]
            metrics = pair_metrics(batch, rho, u)
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)
