r"""ORPO (Hong et al. 2024, arXiv:2403.07691): fine-tuning with an odds ratio, no reference.

Symbols: p(y) = exp of the mean log-probability of the tokens of y; w and l winner and loser.

    (1)  odds(y) = p(y) / (1 - p(y))
    (2)  loss    = E[-log p(w)] + lambda E[-log sigmoid(log odds(w) - log odds(l))]

The first term is the paper's supervised loss on the winner, here a mean over tokens of each item
and then over items (public code takes one mean over all tokens of a batch). lambda is .1 in most
of the paper's runs and in public code, which calls it beta. Kept ties take both orders.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch, TensorDict
from t2i_align.objectives.margin import log_odds, pair_metrics, weighted_mean
from t2i_align.objectives.ties import both_orders
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats


class ORPOOptions(Options):
    """Options of ``objective: {type: orpo}``."""

    type: Literal["orpo"] = "orpo"
    odds_weight: float = Field(
        default=0.1, ge=0, description="lambda of Eq. (2), weight of the odds ratio"
    )


class ORPO:
    """Odds ratio preference optimisation on tokens, Eq. (1) and (2) of the module."""

    Options: ClassVar[type[Options]] = ORPOOptions
    needs = Needs(
        kinds=frozenset({"token"}),
        only="it wants exact probabilities of a whole sequence; other kinds know a bound",
        views=frozenset({"policy"}),
        coupling="none",
    )
    citation: ClassVar[str] = """@inproceedings{hong2024orpo,
  title={{ORPO}: Monolithic Preference Optimization without Reference Model},
  author={Hong, Jiwoo and Lee, Noah and Thorne, James},
  booktitle={EMNLP},
  year={2024}
}"""

    def __init__(self, options: ORPOOptions) -> None:
        """Keep the options."""
        self.options = options

    def init_state(self) -> TensorDict:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: TensorDict, stats: Stats) -> LossOutput:
        """Loss and metrics of one micro-batch; ``rewards/*`` are log-odds."""
        logp = batch.scores["policy"].per_item("mean")
        odds = log_odds(logp)  # (1)

        def loss(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
            return -logp[w] - self.options.odds_weight * F.logsigmoid(odds[w] - odds[l])  # (2)

        per_pair = both_orders(loss, batch)
        with torch.no_grad():
            u = odds[batch.chosen] - odds[batch.rejected]
            metrics = pair_metrics(batch, odds, u) | {"nll/chosen": -logp[batch.chosen]}
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)
