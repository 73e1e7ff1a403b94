r"""Reward-weighted likelihood (arXiv:2302.12192; reward-weighted regression).

Symbols: v_i is a judge's number of an item, nll_i what ``sft`` minimises: the mean denoising error
(elbo) or -log p per token.

    (1)  w_i  = exp(v_i / tau) / mean_j exp(v_j / tau)      weighting: exp, over batch and all ranks
         w_i  = v_i                                         weighting: raw
    (2)  loss = E[w_i nll_i]

``exp`` is the solution of expected reward under a KL penalty of strength tau, projected back onto
the model; the normaliser makes the weights average 1, so the learning rate keeps its meaning, and a
constant added to all values changes nothing. As tau grows it becomes ``sft`` on all items. ``raw``
is what the paper trains with values in [0, 1] and what Flow-GRPO's code calls RWR; items of
negative value are pushed away without bound, so the loop watches their errors. The paper adds a
second term, the likelihood of pre-training data; mix such records into the source with a value.

Items of a pair or of the two ends of a ranking are the default data; ``layout: groups`` takes every
item of a ranking and averages over the list first, so that long lists do not count more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch
from t2i_align.errors import DataError
from t2i_align.objectives.labelled import only, values_of
from t2i_align.objectives.lists import group_mean, group_of
from t2i_align.objectives.margin import by_time_bin, negative_likelihood
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats


class RWLOptions(Options):
    """Options of ``objective: {type: rwl}``."""

    type: Literal["rwl"] = "rwl"
    weighting: Literal["exp", "raw"] = Field(
        default="exp",
        description="exp(value / tau) over its mean in the micro-batch of all ranks (take large "
        "ones), or the raw value",
    )
    tau: float = Field(
        default=1.0, gt=0, description="temperature of exp, in the unit of the judge's numbers"
    )
    layout: Literal["items", "groups"] = Field(
        default="items", description="items: labelled items, pairs; groups: all of a ranking"
    )


class RWL:
    """Likelihood weighted by a judge's numbers; needs no reference."""

    Options: ClassVar[type[Options]] = RWLOptions
    needs = Needs(
        kinds=frozenset({"elbo", "token", "masked"}),
        only="stored media have no trajectories",
        views=frozenset({"policy"}),
        layout="items",
        coupling="none",
        values=True,
    )
    citation: ClassVar[str] = """@article{lee2023aligning,
  title={Aligning Text-to-Image Models using Human Feedback},
  author={Lee, Kimin and Liu, Hao and Ryu, Moonkyung and Watkins, Olivia and Du, Yuqing
          and Boutilier, Craig and Abbeel, Pieter and Ghavamzadeh, Mohammad
          and Gu, Shixiang Shane},
  journal={arXiv preprint arXiv:2302.12192},
  year={2023}
}"""

    def __init__(self, options: RWLOptions) -> None:
        """Keep the options; raw weights may be negative, so the loss may have no lower bound."""
        self.options = options
        self.needs = replace(
            self.needs, layout=options.layout, bounded_below=options.weighting == "exp"
        )

    def init_state(self) -> dict[str, Tensor]:
        """Stateless."""
        return {}

    def weights(self, values: Tensor, stats: Stats) -> Tensor:
        """Eq. (1), ``(B,) -> (B,)``."""
        if self.options.weighting == "raw":
            return values
        peak = stats.gather(values.max().reshape(1)).max()  # exp never overflows
        raised = torch.exp((values - peak) / self.options.tau)
        if len(stats.gather(raised)) < 2:
            raise DataError(
                "rwl: one item alone always weighs 1, whatever its value",
                "raise train.train_batch_size, or set objective.weighting: raw",
            )
        return raised / stats.mean(raised).to(raised.dtype)

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Weighted mean error or negative log-likelihood."""
        nll = negative_likelihood(batch)
        weight = self.weights(values_of(batch).to(nll.dtype), stats)
        per_example = weight * nll  # (2)
        if batch.weight is not None:
            per_example = per_example * batch.weight
        if batch.groups is not None:
            per_example = group_mean(per_example, group_of(batch))
        metrics = {
            "rwl/nll": nll,
            "rwl/weight/std": weight,
            "error/rejected": only(nll, weight < 0),
        }
        if batch.lam is not None:
            metrics |= by_time_bin("rwl/nll", nll, batch.lam.to(nll.dtype).mean(1))
        metrics = {k: v.detach().float() for k, v in metrics.items()}
        return LossOutput(per_example.mean(), per_example, metrics, state)
