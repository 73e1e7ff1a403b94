r"""Direct preference for denoising diffusion policy optimization (D3PO, arXiv:2311.13231).

Two trajectories of one prompt and a label for the whole of them: h_0 = 1, h_1 = -1 where the first
is better, the opposite where the second is, both 0 where neither. At every step t

    (1)  loss_t = -log sigmoid( beta h_0 ln clip(r_0) + beta h_1 ln clip(r_1) )

with r and clip as in spo.py, where states are shared and the judge speaks of the step; here each
trajectory has its own. beta .1 and a clip of .1 as released (yk7333/d3po, scripts/train.py),
densities averaged over elements. The released code skips pairs with h = 0; here they weigh nothing
(``preference`` .5) and count in the mean. Its labels are people's, ours a judge's.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch
from t2i_align.objectives.margin import weighted_mean
from t2i_align.objectives.spo import clipped_pairs
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats


class D3POOptions(Options):
    """Options of ``objective: {type: d3po}``."""

    type: Literal["d3po"] = "d3po"
    beta: float = Field(
        default=0.1, gt=0, description="strength, on log-densities averaged over elements (0.1)"
    )
    eps: float = Field(
        default=0.1, gt=0, lt=1, description="ratios are clipped to 1 - eps and 1 + eps (0.1)"
    )


class D3PO:
    """Preferences between whole trajectories of the policy, Eq. (1)."""

    Options: ClassVar[type[Options]] = D3POOptions
    needs = Needs(
        kinds=frozenset({"transition"}),
        only="its ratios are of steps of the policy's own trajectories",
        coupling="none",
        cacheable_reference=False,
        feed="trajectory",
    )
    compares: ClassVar[Literal["steps", "trajectories"]] = "trajectories"
    citation: ClassVar[str] = """@inproceedings{yang2024using,
  title={Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model},
  author={Yang, Kai and Tao, Jian and Lyu, Jiafei and Ge, Chunjiang and Chen, Jiaxin
          and Shen, Weihan and Zhu, Xiaolong and Li, Xiu},
  booktitle={CVPR},
  year={2024}
}"""

    def __init__(self, options: D3POOptions) -> None:
        """Keep the options."""
        self.options = options

    def init_state(self) -> dict[str, Tensor]:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Loss and metrics of one micro-batch of pairs of transitions."""
        per_pair, metrics = clipped_pairs(batch, self.options.beta, self.options.eps)
        per_pair = per_pair * (batch.preference != 0.5)
        return LossOutput(weighted_mean(per_pair, batch.weight), per_pair, metrics, state)
