"""DPO-Positive (Smaug, Pal et al. 2024, arXiv:2402.13228): a penalty where the winner falls.

DPO may lower the winner's likelihood as long as the loser's falls faster. With rho the implicit
reward, w and l winner and loser,

    (1)  rho  = beta [log p_policy - log p_ref]
    (2)  u    = rho(w) - rho(l) - penalty max(0, -rho(w))
    (3)  loss = -E log sigmoid(u)

The penalty acts only where the winner is less likely than under the reference; there the pull on
the winner is ``1 + penalty`` times DPO's. At the start rho = 0 and (3) is DPO's, value and
gradient (max takes the side of 0). The paper has language models, penalty 50 and beta .3; on elbo
scores take DPO's beta, errors being means and the logit carrying 1/2. Kept ties take both orders.
``sft_weight`` adds :mod:`anchor`, of which the paper has nothing.
Bounded below by 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch, TensorDict
from t2i_align.objectives.anchor import AnchorFields, anchored
from t2i_align.objectives.margin import implicit_rewards, pair_metrics, weighted_mean
from t2i_align.options import Options
from t2i_align.protocols import ANY_KIND, Needs, Stats


class DPOPOptions(AnchorFields):
    """Options of ``objective: {type: dpop}``."""

    type: Literal["dpop"] = "dpop"
    beta: float = Field(default=5000.0, gt=0, description="as beta of dpo; 0.3 on tokens")
    penalty: float = Field(
        default=50.0, ge=0, description="lambda of Eq. (2); 0 is dpo, 50 as published"
    )


class DPOP:
    """DPO that is penalised where the winner becomes less likely."""

    Options: ClassVar[type[Options]] = DPOPOptions
    needs = Needs(kinds=ANY_KIND)
    citation: ClassVar[str] = """@article{pal2024smaug,
  title={Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive},
  author={Pal, Arka and Karkhanis, Deep and Dooley, Samuel and Roberts, Manley
          and Naidu, Siddartha and White, Colin},
  journal={arXiv preprint arXiv:2402.13228},
  year={2024}
}"""

    def __init__(self, options: DPOPOptions) -> None:
        """Keep the options."""
        self.options = options

    def init_state(self) -> TensorDict:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: TensorDict, stats: Stats) -> LossOutput:
        """Loss and metrics of one micro-batch; see the module for the formula."""
        rho = self.options.beta * implicit_rewards(batch)  # (1)
        w, l, p = rho[batch.chosen], rho[batch.rejected], batch.preference  # noqa: E741
        u = self._logit(w, l)
        per_pair = -p * F.logsigmoid(u) - (1 - p) * F.logsigmoid(self._logit(l, w))  # (3)
        per_pair = anchored(per_pair, batch, self.options.sft_weight)
        with torch.no_grad():
            fallen = {"penalty/share": (w < 0).float()}
            metrics = pair_metrics(batch, rho, u) | fallen
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)

    def _logit(self, w: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        """Eq. (2)."""
        return w - l - self.options.penalty * F.relu(-w)
