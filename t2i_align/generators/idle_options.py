"""Options of ``model: {type: diffusers}`` that a family has no use for: refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i_align.errors import ModelError
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.layouts import FamilyLayout

REMOVE = "remove the key"


def is_told_guidance(layout: FamilyLayout, config: Mapping[str, Any]) -> bool:
    """Whether a network is told a guidance scale: as its config says, else as its family is."""
    return bool(config.get("guidance_embeds", layout.embedded_guidance is not None))


def check_idle(options: DiffusersOptions, layout: FamilyLayout, config: Mapping[str, Any]) -> None:
    """Refuse what would be read and change nothing, or contradicts the family.

    Args:
        options: the recipe's ``model`` section.
        layout: of the family.
        config: of the denoiser.

    Raises:
        ModelError: names the first such option.
    """
    if options.layout is not None and options.family != "auto":
        raise ModelError(
            f"model.family: got '{options.family}', but model.layout describes the denoiser",
            "keep one of the two",
        )
    if options.embedded_guidance is not None and not is_told_guidance(layout, config):
        fix = REMOVE if options.layout is None else "set model.layout.embedded_guidance instead"
        raise ModelError("model.embedded_guidance: this network is told no guidance scale", fix)
    if options.timestep_shift is not None and layout.process == "vp":
        raise ModelError(
            "model.timestep_shift: got a warp of flow models, and this model is none",
            "remove the key; draw.timestep_sampling chooses the levels",
        )
    own, given = layout.prediction, options.prediction_type
    if own != "scheduler" and given not in ("auto", own):
        raise ModelError(
            f"model.prediction_type: got '{given}', but this family predicts {own}", REMOVE
        )
    if options.time_ids != "image" and not layout.per_image:
        raise ModelError("model.time_ids: this family has no size conditions of SDXL's", REMOVE)
    usual = DiffusersOptions.model_fields["frame_rate"].default
    if layout.media == "image" and options.frame_rate != usual:
        raise ModelError("model.frame_rate: this family makes pictures", REMOVE)
    for key, asked in (
        ("short_clips", options.short_clips != "skip"),
        ("given_frames", options.given_frames > 0),
    ):
        if layout.media == "image" and asked:
            raise ModelError(f"model.{key}: this family makes pictures", REMOVE)
