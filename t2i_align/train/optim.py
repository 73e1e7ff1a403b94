"""Optimizers, schedules and the running average of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.optional import require
from t2i_align.train.options import TrainOptions


def build_optimizer(
    options: TrainOptions, parameters: list[nn.Parameter], num_records: int
) -> torch.optim.Optimizer:
    """The optimizer of a recipe.

    Args:
        options: the ``train`` section.
        parameters: what is trained.
        num_records: records a step over all processes, the factor of ``scale_lr``.
    """
    lr = options.learning_rate * (num_records if options.scale_lr else 1)
    betas = (options.adam_beta1, options.adam_beta2)
    if options.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        # the settings of the released Diffusion-DPO trainer for SDXL
        return Adafactor(
            parameters,
            lr=lr,
            weight_decay=options.weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )
    common: dict[str, Any] = {
        "lr": lr,
        "betas": betas,
        "eps": options.adam_epsilon,
        "weight_decay": options.weight_decay,
    }
    if options.optimizer == "adamw_8bit":
        require("bitsandbytes", "quant", "train.optimizer: adamw_8bit")
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **common)
    return torch.optim.AdamW(parameters, fused=True, **common)


def build_schedule(
    options: TrainOptions, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Diffusers' schedule of that name; a function of the step count only."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        options.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )


class Ema:
    """Exponential moving average of the trained weights, float32.

    ``shadow <- d shadow + (1 - d) w`` with ``d = min(decay, (1 + n) / (10 + n))`` after n steps,
    the usual warm-up.
    """

    def __init__(self, decay: float, weights: Mapping[str, Tensor]) -> None:
        """Start at the weights themselves."""
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """One step; ``step`` counts from 1."""
        d = min(self.decay, (1 + step) / (10 + step))
        for k, v in weights.items():
            self.shadow[k].lerp_(v.detach().float(), 1 - d)
