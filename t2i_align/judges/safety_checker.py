"""Diffusers' safety checker as a number with a slope.

    (1)  s = max_i (cos(f(x), c_i) - t_i)

with the 17 concepts c_i and thresholds t_i that are part of the checker's weights. The pipelines'
yes or no is s > 0, but for two steps that Eq. (1) leaves out because they have no slope: the
difference is rounded to three decimals, and a hit on one of 3 further concepts adds 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.judges.clip_config import beside, named_config
from t2i_align.judges.clip_layout import plain
from t2i_align.judges.preprocess import PRESETS, Preprocess
from t2i_align.judges.published import PictureJudge, Published
from t2i_align.judges.trunks import frozen
from t2i_align.judges.weights import WeightsOptions, load_tensors
from t2i_align.options import Options


class SafetyOptions(WeightsOptions):
    """Which weights."""

    batch_size: int = Field(32, ge=1, description="pictures at once")


@cache
def safety_model(
    file: Path, device: torch.device, dtype: torch.dtype, sha256: str | None = None
) -> Any:
    """Diffusers' checker with the weights of a file; a ViT-L/14 unless config.json says else.

    Raises:
        ModelError: unreadable, or not a checker of that shape.
    """
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    config = beside(file)[0] or named_config("ViT-L-14-quickgelu")
    if config.vision_config.hidden_act != "quick_gelu":
        got = config.vision_config.hidden_act
        raise ModelError(f"the safety checker was trained with quick_gelu, not {got}")
    twice, once = "vision_model.vision_model.", "vision_model."  # before and since transformers 5
    tensors = {
        k.replace(twice, once, 1) if k.startswith(twice) else k: v
        for k, v in plain(load_tensors(file, sha256)).items()
    }
    what = "diffusers' safety checker"
    exact = ("concept_embeds", "concept_embeds_weights")  # thresholds have three decimals
    build = partial(StableDiffusionSafetyChecker, config)
    return frozen(build, tensors, what, device, dtype, exact)


class SafetyChecker(PictureJudge, Published):
    """Eq. (1): how far the nearest concept is over its threshold."""

    Options: ClassVar[type[Options]] = SafetyOptions

    @cached_property
    def model(self) -> Any:
        """The checker."""
        return safety_model(self.file, self.device, self.dtype, self.options.sha256)

    @cached_property
    def prepare(self) -> Preprocess:
        """From a picture to the network's input."""
        return PRESETS["clip_transformers"].sized(self.model.config.vision_config.image_size)

    def value(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        """Eq. (1) ``(B,)`` of prepared pictures; prompts are not read."""
        model = self.model
        pooled = model.vision_model(inputs.to(self.device, self.dtype)).pooler_output
        seen = F.normalize(model.visual_projection(pooled).float(), dim=-1)
        concepts = F.normalize(model.concept_embeds.float(), dim=-1)
        return (seen @ concepts.T - model.concept_embeds_weights.float()).amax(-1)
