"""The process a denoiser was trained on, from its family, its scheduler and the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i_align.errors import ModelError
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.layouts import FamilyLayout
from t2i_align.process.convert import Prediction
from t2i_align.process.schedule import Process, Rectified, vp_from_scheduler


def prediction_of(
    layout: FamilyLayout, options: DiffusersOptions, scheduler: Mapping[str, Any]
) -> Prediction:
    """What the network predicts: as the recipe says, else the family, else the scheduler."""
    kind: Any = options.prediction_type
    if kind == "auto":
        kind = layout.prediction
    return scheduler.get("prediction_type", "epsilon") if kind == "scheduler" else kind


def process_of(
    layout: FamilyLayout, options: DiffusersOptions, scheduler: dict[str, Any], num_tokens: int
) -> Process:
    """How samples are noised.

    Args:
        layout: the family.
        options: the recipe's ``model`` section.
        scheduler: config of the pipeline's scheduler.
        num_tokens: of a square picture of ``options.resolution``; other shapes of the run share its
            warp.

    Raises:
        ModelError: a warp is asked of a network that knows one only.
    """
    if layout.process == "vp":
        return vp_from_scheduler(scheduler)
    shift = options.timestep_shift
    if layout.told_shift is not None:
        if shift is not None:
            raise ModelError(
                "model.timestep_shift: this family is told the level before its warp, so the warp "
                "belongs to the network and cannot be chosen",
                "remove the key; draw.timestep_sampling chooses the levels",
            )
        return Rectified(shift=layout.told_shift(scheduler, num_tokens), told_level=True)
    if shift is None:
        static = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
        shift = 1.0 if scheduler.get("use_dynamic_shifting") else static
    return Rectified(shift=shift)
