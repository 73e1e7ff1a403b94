r"""Preference between captions: TDPO and TKTO (arXiv:2509.25771), and DCPO (arXiv:2502.06023).

The losses are those of ``dpo`` and ``kto``; what differs is that the two items of a pair have
captions of their own, which every generator conditions on item by item.

    tdpo  one image, its caption c_w against a perturbed one c_l, the same x_t, noise and time:
          (1)  u = -(beta/2) [(m(x_t, c_w) - m(x_t, c_l)) - (r(x_t, c_w) - r(x_t, c_l))]
          (2)  loss = -E log sigmoid(u)
    tkto  (image, c_w) labelled good and (image, c_l) labelled bad, each with its own noise and
          time; the loss of ``kto``
    dcpo  winner and loser are two images, each under its own caption; (2)

Data: ``data: {type: captions}``. Equal captions under ``tdpo`` make u = 0 for ever: an error.

The papers' code was not compared: that beta is 500 is DCPO's README (SD2.1); for TDPO and TKTO no
value is known, so the defaults are those of Diffusion-DPO on SD1.5 and of ``kto``. The TPO paper
clips gradients for stability, as ``train.max_grad_norm`` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from t2i_align.contract import LossOutput, ScoredBatch
from t2i_align.objectives.anchor import AnchorFields
from t2i_align.objectives.dpo import DPO, DPOOptions
from t2i_align.objectives.kto import KTO, KTOFields
from t2i_align.options import Options
from t2i_align.protocols import ANY_KIND, Needs, Stats

TPO = """@article{xian2025free,
  title={Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image Pairs},
  author={Xian, Jia Jun Cheng and Li, Muchen and Yang, Haotian and Tao, Xin and Wan, Pengfei
          and Sigal, Leonid and Liao, Renjie},
  journal={arXiv preprint arXiv:2509.25771},
  year={2025}
}"""


class TDPOOptions(AnchorFields):
    """Options of ``objective: {type: tdpo}``."""

    type: Literal["tdpo"] = "tdpo"
    beta: float = Field(default=2000.0, gt=0, description="as beta of dpo")


class TKTOOptions(KTOFields):
    """Options of ``objective: {type: tkto}``."""

    type: Literal["tkto"] = "tkto"


class DCPOOptions(AnchorFields):
    """Options of ``objective: {type: dcpo}``."""

    type: Literal["dcpo"] = "dcpo"
    beta: float = Field(default=500.0, gt=0, description="as beta of dpo; 500 in the release")


class TDPO:
    """DPO between two captions of one image."""

    Options: ClassVar[type[Options]] = TDPOOptions
    needs = Needs(kinds=ANY_KIND)
    citation: ClassVar[str] = TPO

    def __init__(self, options: TDPOOptions) -> None:
        """The loss is DPO's."""
        self.options = options
        self.loss = DPO(DPOOptions(beta=options.beta, sft_weight=options.sft_weight))

    def init_state(self) -> dict[str, Tensor]:
        """That of the loss."""
        return self.loss.init_state()

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Eq. (2).

        Raises:
            ValueError: a pair whose captions are the same.
        """
        if batch.prompts is not None:
            same = batch.prompts[batch.chosen] == batch.prompts[batch.rejected]
            if bool(same.any()):
                raise ValueError(
                    f"{int(same.sum())} of {len(same)} pairs have one caption for both items, "
                    "which teaches tdpo nothing; use data.type: captions, or another objective"
                )
        return self.loss(batch, state, stats)


class TKTO:
    """KTO on images under matched (good) and mismatched (bad) captions."""

    Options: ClassVar[type[Options]] = TKTOOptions
    needs = KTO.needs
    citation: ClassVar[str] = TPO

    def __init__(self, options: TKTOOptions) -> None:
        """The loss is KTO's, and so is what it declares."""
        self.options = options
        self.loss = KTO(options)
        self.needs = self.loss.needs

    def init_state(self) -> dict[str, Tensor]:
        """That of the loss."""
        return self.loss.init_state()

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """The loss of ``kto``."""
        return self.loss(batch, state, stats)


class DCPO:
    """DPO between two images, each under its own caption."""

    Options: ClassVar[type[Options]] = DCPOOptions
    needs = Needs(kinds=ANY_KIND)
    citation: ClassVar[str] = """@article{saeidi2025dual,
  title={Dual Caption Preference Optimization for Diffusion Models},
  author={Saeidi, Amir and Luo, Yiran and Chatterjee, Agneet and Hegde, Shamanthak
          and Pathiraja, Bimsara and Yang, Yezhou and Baral, Chitta},
  journal={Transactions on Machine Learning Research},
  year={2025}
}"""

    def __init__(self, options: DCPOOptions) -> None:
        """The loss is DPO's."""
        self.options = options
        self.loss = DPO(DPOOptions(beta=options.beta, sft_weight=options.sft_weight))

    def init_state(self) -> dict[str, Tensor]:
        """That of the loss."""
        return self.loss.init_state()

    def __call__(self, batch: ScoredBatch, state: dict[str, Tensor], stats: Stats) -> LossOutput:
        """Eq. (2), and the share of pairs whose captions differ."""
        out = self.loss(batch, state, stats)
        if batch.prompts is not None:
            differ = batch.prompts[batch.chosen] != batch.prompts[batch.rejected]
            out = replace(out, metrics={**out.metrics, "captions/differ": differ.float()})
        return out
