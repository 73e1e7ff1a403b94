r"""Noising processes ``x_t = alpha_t x_0 + sigma_t eps``.

    VP          alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), integer t in [0, T)     (DDPM)
    Rectified   alpha = 1 - sigma, sigma in [0, 1]; the model is told time_scale * sigma, or
                time_scale * s where it was trained on the clock before the warp (rectified flow)

Both map a canonical level in [0, 1) to the model's time. A rectified process may warp levels with a
static shift k, ``sigma = k s / (1 + (k - 1) s)`` (SD3 paper), the warp its sampler uses.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from t2i_align.errors import ModelError

SNR_SHIFT = "snr_shift_scale"  # of CogVideoX's scheduler configs


class Process(Protocol):
    """What a generator needs of a noising process."""

    def time(self, level: Tensor) -> Tensor:
        """Model time of canonical noise levels, any shape."""
        ...

    def level(self, time: Tensor) -> Tensor:
        """Canonical noise level in [0, 1] of model times; metrics bin on it."""
        ...

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)`` at model times, float32, same shape."""
        ...


@dataclass(frozen=True)
class VP:
    """Variance preserving, discrete time.

    Args:
        alphas_cumprod: ``(T,)`` abar_t.
    """

    alphas_cumprod: Tensor

    @property
    def num_steps(self) -> int:
        """T."""
        return self.alphas_cumprod.shape[0]

    def time(self, level: Tensor) -> Tensor:
        """``floor(level T)`` as int64: a uniform level is a uniform integer in [0, T)."""
        return (level * self.num_steps).long().clamp(0, self.num_steps - 1)

    def level(self, time: Tensor) -> Tensor:
        """``(t + 1/2) / T``."""
        return (time.float() + 0.5) / self.num_steps

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Square roots of abar_t and 1 - abar_t, rounded once from float64."""
        abar = self.alphas_cumprod.double().to(time.device)[time.long()]
        return abar.sqrt().float(), (1 - abar).clamp(min=0).sqrt().float()


@dataclass(frozen=True)
class Rectified:
    """Straight path between data and noise.

    Args:
        time_scale: what the network is told is ``time_scale * sigma`` (1000 for SD3).
        shift: static warp k of the level; 1 for none.
        told_level: it is told ``time_scale * s`` instead, the level before the warp (CogView4).
    """

    time_scale: float = 1000.0
    shift: float = 1.0
    told_level: bool = False

    def _warped(self, level: Tensor) -> Tensor:
        return self.shift * level / (1 + (self.shift - 1) * level)

    def time(self, level: Tensor) -> Tensor:
        """``time_scale * sigma`` (or ``time_scale * s``) as float32."""
        told = level if self.told_level else self._warped(level)
        return (self.time_scale * told).float()

    def level(self, time: Tensor) -> Tensor:
        """Sigma itself."""
        told = time.float() / self.time_scale
        return self._warped(told) if self.told_level else told

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """``(1 - sigma, sigma)``."""
        sigma = self.level(time)
        return 1 - sigma, sigma


def broadcast(c: Tensor, like: Tensor) -> Tensor:
    """Append singleton dimensions to ``c`` until it broadcasts over ``like``."""
    return c.reshape(c.shape + (1,) * (like.dim() - c.dim()))


def noised(x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """``alpha x_0 + sigma eps`` with per-row coefficients."""
    return broadcast(alpha, x_0) * x_0 + broadcast(sigma, x_0) * eps


def vp_from_scheduler(config: Mapping[str, object]) -> VP:
    r"""The training schedule behind any DDPM-like scheduler config of diffusers.

    Uses diffusers' own DDPMScheduler, so betas, zero-terminal-SNR rescaling and trained betas are
    its business. CogVideoX's schedulers have another rule, known by ``snr_shift_scale`` k, so there
    the class itself is asked: every signal-to-noise ratio is divided by k before the rescaling,

        abar' = abar / (k + (1 - k) abar)   <=>   abar' / (1 - abar') = abar / (1 - abar) / k
    """
    import diffusers
    from diffusers import DDPMScheduler

    known = {k: v for k, v in config.items() if not k.startswith("_")}
    if not {"beta_start", "beta_schedule", "trained_betas"} & known.keys():
        raise ModelError(
            f"the scheduler {config.get('_class_name', '')} has no betas, so its noising process "
            "is not the discrete one of DDPM",
            "models trained with continuous sigmas (EDM) are not supported",
        )
    cls: Any = DDPMScheduler
    if SNR_SHIFT in known:
        cls = getattr(diffusers, str(config.get("_class_name", "")), None)
        if cls is None:
            raise ModelError(
                f"the scheduler shifts its signal-to-noise ratios ({SNR_SHIFT}), but this "
                f"diffusers has no class '{config.get('_class_name', '')}' that would know how",
                "save the pipeline again with its own scheduler",
            )
    # not by from_config, which imports every scheduler to see which are alike, and scipy with them
    named = inspect.signature(cls.__init__).parameters
    scheduler: Any = cls(**{k: v for k, v in known.items() if k in named})
    return VP(torch.as_tensor(scheduler.alphas_cumprod).double())
