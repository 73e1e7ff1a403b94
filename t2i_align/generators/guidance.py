r"""How a pipeline makes one prediction of two, with and without the prompt.

With c and u the branches' predictions and g the guidance scale

    (1)  standard    u + g (c - u)
    (2)  beyond      c + g (c - u)                              (Z-Image)
    (3)  renormed    p |c| / |p|, p of (1), norms over the denoiser's last dimension
                     (Qwen-Image: the channels of a token; Lumina 2: a row of the latents)
    (4)  guider      (1) while training; the pipeline's own component when it samples
                     (HunyuanImage: adaptive projection from some step on)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2i_align.contract import TensorDict
from t2i_align.generators.latents import PACKINGS
from t2i_align.generators.layouts import FamilyLayout


def standard(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Eq. (1), float32 where the inputs are not wider."""
    return uncond + scale * (cond - uncond)


def guide(
    layout: FamilyLayout, config: Mapping[str, Any], branches: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """One prediction ``(B, *L)`` of the branches (unconditional, conditional).

    Args:
        layout: of the family.
        config: of the denoiser.
        branches: predictions in the family's ``prediction`` convention.
        scale: g.
    """
    uncond, cond = (x.float() for x in branches)
    if layout.combine == "beyond":
        return standard(cond, 2 * cond - uncond, scale)
    both = standard(uncond, cond, scale)
    if layout.combine != "renormed":
        return both
    packing = PACKINGS[layout.packing]
    tokens, wanted = (packing.pack(x, config) for x in (both, cond))
    norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (wanted, tokens)]
    return packing.unpack(tokens * (norms[0] / norms[1]), tuple(cond.shape[1:]), config)


GUIDERS = ("guider", "ocr_guider")  # components that join the branches of (4)


def set_guiders(pipe: Any, scale: float) -> None:
    """Give the pipeline's guiders the scale ``g``; 1 turns them off."""
    for name in GUIDERS:
        guider = pipe.components.get(name)
        if guider is not None:
            setattr(pipe, name, guider.new(guidance_scale=scale))


def chosen_guider(pipe: Any, cond: TensorDict) -> Any:
    """The guider that the pipeline takes for a batch of prompts.

    HunyuanImage has one for batches in which a prompt quotes text to be drawn.
    """
    glyphs = cond.get("encoder_hidden_states_2")
    quoted = glyphs is not None and bool(glyphs.any())
    return (pipe.components.get("ocr_guider") if quoted else None) or pipe.guider


class StepGuidance:
    """Guidance along a sampling loop.

    Args:
        layout: of the family.
        config: of the denoiser.
        scale: g.
        guider: the pipeline's own component, already set to ``scale``, or None.
    """

    def __init__(
        self, layout: FamilyLayout, config: Mapping[str, Any], scale: float, guider: Any = None
    ) -> None:
        """Keep them."""
        self.layout, self.config, self.scale, self.guider = layout, config, scale, guider

    def __call__(self, branches: tuple[Tensor, Tensor], step: int, num: int, t: Tensor) -> Tensor:
        """The prediction of step ``step`` of ``num`` at the scheduler's time ``t``."""
        if self.guider is None:
            return guide(self.layout, self.config, branches, self.scale)
        self.guider.set_state(step=step, num_inference_steps=num, timestep=t)
        uncond, cond = branches
        if self.guider.num_conditions == 1:
            return cond
        return self.guider.forward(pred_cond=cond, pred_uncond=uncond).pred
