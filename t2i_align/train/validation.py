"""Samples while training.

Fixed prompts, fixed noise, so that pictures of different steps compare.
"""

from __future__ import annotations

from pathlib import Path

import torch

from t2i_align.contract import SamplingInputs
from t2i_align.data.media_io import save_media
from t2i_align.process.seeds import derive
from t2i_align.protocols import Generator
from t2i_align.train.options import ValidationOptions


def prepare_validation(generator: Generator, options: ValidationOptions) -> SamplingInputs:
    """Encode the prompts while the encoders are still here."""
    return generator.prepare_sampling(
        options.prompts, num_steps=options.num_inference_steps, guidance=options.guidance_scale
    )


def save_samples(
    generator: Generator,
    inputs: SamplingInputs,
    options: ValidationOptions,
    folder: Path,
    step: int,
    *,
    averaged: bool,
) -> Path:
    """Sample every prompt and save one file; returns its path."""
    seeds = torch.tensor([derive(options.seed, p, 0, "validation") for p in options.prompts])
    view = "ema" if averaged else "policy"
    media = []
    for start in range(0, len(seeds), options.batch_size):
        part = slice(start, start + options.batch_size)
        rollout = generator.rollout(inputs.items(part), seeds[part], view)
        media += generator.decode(rollout.sample)
    return save_media(media, options.prompts, folder / f"step-{step:08d}")
