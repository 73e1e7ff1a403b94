r"""SimPO (Meng et al. 2024, arXiv:2405.14734): a margin of mean log-probabilities, no reference.

Symbols: |y| number of tokens of y; w and l winner and loser.

    (1)  rho(y) = (beta / |y|) log p(y)
    (2)  loss   = -E log sigmoid(rho(w) - rho(l) - gamma)

The mean over tokens takes the advantage from long answers; gamma is the lead a winner must have.
The paper's beta is 2 to 2.5 (in nats a token, not DPO's scale) and gamma .3 to 1.6; the defaults
are those of its Llama-3-Base run. Kept ties take both orders, and accuracy is that of rho alone.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch, TensorDict
from t2i_align.objectives.margin import pair_metrics, weighted_mean
from t2i_align.objectives.ties import both_orders
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats


class SimPOOptions(Options):
    """Options of ``objective: {type: simpo}``."""

    type: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0, description="scale of the mean log-probability")
    gamma: float = Field(default=1.0, ge=0, description="lead in rewards a winner must have")


class SimPO:
    """Simple preference optimisation on tokens, Eq. (1) and (2) of the module."""

    Options: ClassVar[type[Options]] = SimPOOptions
    needs = Needs(
        kinds=frozenset({"token"}),
        only="it wants exact probabilities of a whole sequence; other kinds know a bound",
        views=frozenset({"policy"}),
        coupling="none",
    )
    citation: ClassVar[str] = """@inproceedings{meng2024simpo,
  title={{SimPO}: Simple Preference Optimization with a Reference-Free Reward},
  author={Meng, Yu and Xia, Mengzhou and Chen, Danqi},
  booktitle={NeurIPS},
  year={2024}
}"""

    def __init__(self, options: SimPOOptions) -> None:
        """Keep the options."""
        self.options = options

    def init_state(self) -> TensorDict:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: TensorDict, stats: Stats) -> LossOutput:
        """Loss and TRL-style metrics of one micro-batch."""
        rho = self.options.beta * batch.scores["policy"].per_item("mean")  # (1)

        def loss(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
            return -F.logsigmoid(rho[w] - rho[l] - self.options.gamma)  # (2)

        per_pair = both_orders(loss, batch)
        with torch.no_grad():
            metrics = pair_metrics(batch, rho, rho[batch.chosen] - rho[batch.rejected])
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)
