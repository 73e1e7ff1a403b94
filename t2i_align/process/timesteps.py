r"""Densities of the noise level.

    uniform       u ~ U[0, 1)
    logit_normal  u = sigmoid(mu + s z), z ~ N(0, 1)                      (SD3 paper,
    arXiv:2403.03206, Eq. 19) mode          u = 1 - q - s (cos^2(pi q / 2) - 1 + q), q ~ U[0, 1)
    (same paper, Eq. 20)

``u`` is the canonical noise level, 1 = pure noise. diffusers indexes a descending table with the
same u, so its ``logit_mean`` has the opposite sign of ours; at the default mean 0 both agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t2i_align.contract import DrawSpec
from t2i_align.process.seeds import uniforms


def sample_levels(spec: DrawSpec, seeds: Tensor) -> Tensor:
    """Noise levels ``(B, S)`` float64 in ``[min_level, max_level)``, from the seeds only."""
    q = uniforms(seeds, spec.num_draws)
    if spec.timestep_sampling == "logit_normal":
        z = torch.special.ndtri(q.clamp(1e-12, 1 - 1e-12))
        u = torch.sigmoid(spec.logit_mean + spec.logit_std * z)
    elif spec.timestep_sampling == "mode":
        u = 1 - q - spec.mode_scale * (torch.cos(math.pi / 2 * q) ** 2 - 1 + q)
    else:
        u = q
    return spec.min_level + (spec.max_level - spec.min_level) * u.clamp(0, 1 - 1e-9)
