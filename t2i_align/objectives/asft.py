r"""ASFT (Wang et al. 2024, arXiv:2409.10571): absolute likelihoods instead of a comparison.

Symbols: p(y) = exp of the mean log-probability of the tokens of y, odds(y) = p(y) / (1 - p(y)).

    (1)  loss = E[-log p(w)] + lambda E[-log sigmoid(log odds(w)) - log sigmoid(-log odds(l))]

As sigmoid(log odds(y)) = p(y), that is

    (2)  loss = -(1 + lambda) log p(w) - lambda log(1 - p(l))

winner and loser each for itself: there is no margin in it, and the loser's gradient, lambda times
p(l) / (1 - p(l)), is small wherever tokens are many and none is likely. lambda is .1, as in ORPO,
whose other half (1) replaces; the authors' own value was not at hand. Kept ties take both orders.
The second term is taken up to p(l) = exp(-1e-6), beyond which it has no gradient.
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


class ASFTOptions(Options):
    """Options of ``objective: {type: asft}``."""

    type: Literal["asft"] = "asft"
    align_weight: float = Field(
        default=0.1, ge=0, description="lambda of Eq. (1), weight of the two likelihoods"
    )


class ASFT:
    """Aligned supervised fine-tuning on tokens, Eq. (1) of the module."""

    Options: ClassVar[type[Options]] = ASFTOptions
    needs = Needs(
        kinds=frozenset({"token"}),
        only="it wants exact probabilities of a whole sequence; other kinds know a bound",
        views=frozenset({"policy"}),
        coupling="none",
    )
    citation: ClassVar[str] = """@article{wang2024asft,
  title={{ASFT}: Aligned Supervised Fine-Tuning through Absolute Likelihood},
  author={Wang, Ruoyu and Sun, Jiachen and Hua, Shaowei and Fang, Quan},
  journal={arXiv preprint arXiv:2409.10571},
  year={2024}
}"""

    def __init__(self, options: ASFTOptions) -> None:
        """Keep the options."""
        self.options = options

    def init_state(self) -> TensorDict:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: TensorDict, stats: Stats) -> LossOutput:
        """Loss and metrics of one micro-batch; ``rewards/*`` are log-odds."""
        logp = batch.scores["policy"].per_item("mean")
        odds = log_odds(logp)

        def loss(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
            align = -F.logsigmoid(odds[w]) - F.logsigmoid(-odds[l])
            return -logp[w] + self.options.align_weight * align  # (1)

        per_pair = both_orders(loss, batch)
        with torch.no_grad():
            u = odds[batch.chosen] - odds[batch.rejected]
            metrics = pair_metrics(batch, odds, u) | {"nll/chosen": -logp[batch.chosen]}
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)
