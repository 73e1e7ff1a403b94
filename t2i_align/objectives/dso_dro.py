r"""DSO's direct reward optimization (arXiv:2503.22677), for 3D generators that meet a simulator.

Symbols: m are the policy's denoising errors, o(x) is 1 for a stable (good) sample and 0 otherwise.

    (1)  loss = E[m_w - m_l]                    form: pairs, the released code (RuiningLi/dso)
    (2)  loss = E[(2 o(x) - 1) m(x)]            form: signed, the paper, which prints
                                                -E[(1 - 2 o) m] times T and a weight w(t)

No reference network and no saturation: gradients are +1 on every winner's error and -1 on every
loser's. With as many good items as bad ones, (2) is half of (1); the code draws balanced pairs.
T w(t) is 1 here as in the code, so it belongs to the learning rate. The released training draws
t = sigmoid(1 + n) for standard normal n, the same for both (``timestep_sampling: logit_normal,
logit_mean: 1``), and independent noise, hence the coupling.

Unbounded below: the loss falls for ever as losers' errors grow. The loop stops a run whose losers'
errors run away; use few steps (4,000 of 48 pairs in the release), or ``dpo`` to bound the drift.
``sft_weight`` adds :mod:`anchor` to (1), of which the paper has nothing; losers stay unbounded.
This is neither ``diffusion_dro`` nor the ``llm_dro`` of the same initials.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch
from t2i_align.objectives.anchor import AnchorFields, anchored
from t2i_align.objectives.labelled import item_metrics, labels_of
from t2i_align.objectives.margin import pair_metrics, weighted_mean
from t2i_align.objectives.ties import both_orders
from t2i_align.options import Options
from t2i_align.protocols import Needs, Stats


class DSODROOptions(AnchorFields):
    """Options of ``objective: {type: dso_dro}``."""

    type: Literal["dso_dro"] = "dso_dro"
    form: Literal["pairs", "signed"] = Field(
        default="pairs",
        description="pairs: Eq. (1), needs pairs; signed: Eq. (2), needs labelled items",
    )

    @model_validator(mode="after")
    def _of_pairs(self) -> DSODROOptions:
        if self.sft_weight > 0 and self.form != "pairs":
            raise ValueError("sft_weight is an anchor on pairs; with form signed leave it out")
        return self


class DSODRO:
    """Error of good samples minus error of bad ones; unbounded below."""

    Options: ClassVar[type[Options]] = DSODROOptions
    needs = Needs(
        kinds=frozenset({"elbo"}),
        only="Eq. (1) is of denoising errors; log-probabilities would fall without a bound",
        views=frozenset({"policy"}),
        coupling="time",
        bounded_below=False,
    )
    citation: ClassVar[str] = """@inproceedings{li2025dso,
  title={{DSO}: Aligning 3D Generators with Simulation Feedback for Physical Soundness},
  author={Li, Ruining and Zheng, Chuanxia and Rupprecht, Christian and Vedaldi, Andrea},
  booktitle={ICCV},
  year={2025}
}"""

    def __init__(self, options: DSODROOptions) -> None:
        """Keep the options; the signed form asks for labelled items."""
        self.options = options
        if options.form == "signed":
            self.needs = replace(self.needs, layout="items", coupling="none", labels=True)

    def init_state(self) -> dict[str, Tensor]:
        """Stateless."""
        return {}

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Eq. (1) or (2); the reward shown in the metrics is the negative error."""
        m = batch.scores["policy"].error_per_item()
        if self.options.form == "signed":
            y = labels_of(batch).to(m.dtype)  # 2 o - 1
            per_example = y * m  # (2)
            metrics = item_metrics(batch, -m, -y * m)
        else:
            per_example = both_orders(lambda w, l: m[w] - m[l], batch)  # (1)  # noqa: E741
            per_example = anchored(per_example, batch, self.options.sft_weight)
            metrics = pair_metrics(batch, -m, m[batch.rejected] - m[batch.chosen])
        return LossOutput(weighted_mean(per_example, batch.weight), per_example, metrics, state)
