"""Judges that are one CLIP cosine: CLIPScore, CLIP similarity, PickScore, HPSv2 and v2.1.

    (1)  cos = <f(x), g(prefix + c)> / (|f(x)| |g(prefix + c)|)
    (2)  s = scale cos            (3)  s = scale max(cos, 0)  with ``clamp``

| judge      | network          | prefix             | scale    | clamp | picture                 |
|------------|------------------|--------------------|----------|-------|-------------------------|
| clip_score | OpenAI ViT-B/32  | "A photo depicts " | 2.5      | yes   | shorter side, crop      |
| clip_sim   | OpenAI ViT-L/14  |                    | 100      | no    | shorter side, crop      |
| pickscore  | ViT-H/14, tuned  |                    | exp(a)   | no    | shorter side, crop      |
| hpsv2(_1)  | ViT-H/14, tuned  |                    | 1        | no    | longer side, black bars |

exp(a) is the model's own learned scale, near 100. HPSv2 uses none; numbers of v2.0 and v2.1 are not
on one scale. A published checkpoint of this kind is a judge by a card alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.judges.preprocess import PRESETS, Preprocess
from t2i_align.judges.published import PictureJudge, Published
from t2i_align.judges.trunks import Cleaning, ClipTrunk, clip_trunk
from t2i_align.judges.weights import WeightsOptions, hub_id
from t2i_align.options import Options


class ClipOptions(WeightsOptions):
    """Which weights, how pictures and prompts are prepared, what comes out."""

    architecture: str | None = Field(
        None,
        description="open_clip's name of the network, e.g. ViT-H-14; OpenAI's weights need a name "
        "ending in -quickgelu; null: config.json beside the weights",
    )
    preprocess: Literal["clip", "clip_transformers", "hpsv2"] = Field(
        "clip", description="a preset of t2i_align/judges/preprocess.py"
    )
    cleaning: Cleaning = Field("ftfy", description="of prompts: as OpenAI's code, or plain")
    prefix: str = Field("", description="text before every prompt")
    scale: float | Literal["learned"] = Field(1.0, description="Eq. (2); learned: exp(a)")
    clamp: bool = Field(False, description="Eq. (3): no score under 0")
    batch_size: int = Field(32, ge=1, description="pictures at once")


class ClipJudge(PictureJudge, Published):
    """Scaled cosine of a CLIP model; see the module."""

    Options: ClassVar[type[Options]] = ClipOptions

    @cached_property
    def trunk(self) -> ClipTrunk:
        """The network, shared with other judges of the same weights."""
        options = self.options
        return clip_trunk(
            self.file,
            options.architecture,
            self.device,
            self.dtype,
            options.sha256,
            hub_id(options, self.folder),
        )

    @cached_property
    def prepare(self) -> Preprocess:
        """From a picture to the network's input."""
        return PRESETS[self.options.preprocess].sized(self.trunk.size)

    def value(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        """Eq. (2) or (3) ``(B,)`` of prepared pictures."""
        options, trunk = self.options, self.trunk
        said = trunk.texts([options.prefix + p for p in prompts], options.cleaning)
        cosine = F.cosine_similarity(trunk.images(inputs), said, dim=-1)
        if options.clamp:
            cosine = cosine.clamp(min=0)
        return (trunk.scale if options.scale == "learned" else options.scale) * cosine
