r"""Supervised fine-tuning on winners (or on all desirable items): the plain likelihood.

    loss = mean over items of the denoising error (elbo), or of -log p per token (token).

The ``--sft`` mode of the released Diffusion-DPO code: winner only, noise and time drawn per image,
the mean squared error over everything. For tokens it is the cross-entropy, averaged over the tokens
of the batch's items.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch
from t2i_align.objectives.margin import by_time_bin, negative_likelihood, weighted_mean
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats


class SFTOptions(Options):
    """Options of ``objective: {type: sft}``."""

    type: Literal["sft"] = "sft"


class SFT:
    """Maximum likelihood.

    Uses every item a record calls good (a pair's winner, a binary record labelled +1).
    """

    Options: ClassVar[type[Options]] = SFTOptions
    needs = Needs(
        kinds=frozenset({"elbo", "token", "masked"}),
        only="stored media have no trajectories",
        views=frozenset({"policy"}),
        layout="winners",
        coupling="none",
    )
    citation: ClassVar[str] = ""

    def __init__(self, options: SFTOptions) -> None:
        """Keep the options."""
        self.options = options

    def init_state(self) -> dict[str, Tensor]:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Mean error or mean negative log-likelihood."""
        per_item = negative_likelihood(batch)
        metrics = {"sft/nll": per_item.detach()}
        if batch.lam is not None:
            metrics |= by_time_bin("sft/nll", per_item.detach(), batch.lam.float().mean(1))
        return LossOutput(weighted_mean(per_item, batch.weight), per_item, metrics, state)
