"""An anchor on an objective of pairs: the winner's own loss, so that its likelihood is held.

    loss += sft_weight E[-log p_policy(w)] on tokens, sft_weight E[m_w] on elbo

m is the policy's denoising error, w the winner; a kept tie has two, by their probabilities. From
Regularized Preference Optimization (Liu et al. 2024, arXiv:2405.16436), whose bound it is for dpo;
on the other objectives that take it, it is the same term by the same reason: a margin alone lets
both likelihoods fall. No paper of theirs has it, so it is off by default.

On inverted events (inpo, smpo) m is the error of the inverted noise, the one their margins are made
of. It must be inverted by the reference then: a policy that makes the noise it is asked to predict
lowers m without learning the picture (measured in docs/methods.md), so the two are refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from t2i_align.contract import ScoredBatch
from t2i_align.objectives.margin import negative_likelihood
from t2i_align.options import Options


class AnchorFields(Options):
    """The option of an objective that takes the anchor."""

    sft_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the winner's own loss, added to keep it likely; dpo's margin pulls "
        "with beta / 4 times the error's gradient at the start, so compare with that",
    )


class InvertedFields(AnchorFields):
    """The same on inverted events, and whose inversion they are."""

    inversion_view: Literal["policy", "reference"] = Field(
        default="policy", description="whose predictions invert; policy in the released code"
    )

    @model_validator(mode="after")
    def _fixed_noise(self) -> InvertedFields:
        if self.sft_weight > 0 and self.inversion_view == "policy":
            raise ValueError(
                "sft_weight beside inversion_view policy: the policy would lower the anchor by "
                "making noise that is easy to predict; set inversion_view: reference"
            )
        return self


def anchored(per_pair: Tensor, batch: ScoredBatch, weight: float) -> Tensor:
    """``per_pair (P,)`` with the winners' loss added ``weight`` times."""
    if weight == 0:
        return per_pair
    nll, p = negative_likelihood(batch), batch.preference
    return per_pair + weight * (p * nll[batch.chosen] + (1 - p) * nll[batch.rejected])
