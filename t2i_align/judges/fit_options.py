"""Sections of a judge's recipe (fit_recipe.py): where it starts, the noise, the optimisation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from t2i_align.catalog import find_root
from t2i_align.options import Options

BUNDLED = "bundled/"


class StartOptions(Options):
    """The judge that is fitted, and where it starts."""

    type: Literal["dual_encoder", "timed_clip"] = Field(
        "dual_encoder", description="an open_clip model, or one that is told the noise level"
    )
    path: str = Field(
        min_length=1, description="open_clip folder, or bundled/NAME for a judge of the suite"
    )
    weights: Literal["pretrained", "scratch"] = Field(
        "pretrained", description="start from the folder's weights, or anew in its architecture"
    )
    train: Literal["all", "vision", "modulation"] = Field(
        "all", description="which weights move; modulation: only what tells the noise level"
    )
    output: Literal["cosine", "logit"] = Field(
        "logit", description="the score: the cosine, or exp(a) cosine + b with the model's a and b"
    )
    batch_norm: Literal["frozen", "train"] = Field(
        "frozen", description="statistics of batch norms: kept, or followed (for scratch)"
    )
    width: int = Field(128, ge=1, description="timed_clip: width of the level's embedding")

    @property
    def folder(self) -> Path:
        """The open_clip folder."""
        if self.path.startswith(BUNDLED):
            return find_root() / "reward_models" / self.path.removeprefix(BUNDLED)
        return Path(self.path).expanduser()

    @model_validator(mode="after")
    def _parts_exist(self) -> StartOptions:
        if self.train == "modulation" and self.type != "timed_clip":
            raise ValueError("train: modulation needs type: timed_clip")
        if self.weights == "scratch" and self.train != "all":
            raise ValueError("weights: scratch needs train: all")
        return self


class NoiseOptions(Options):
    """Noise on the pictures of a pair, the same on both; a level is 0 for none, 1 for only noise.

    With x in [-1, 1], rectified is (1 - l) x + l eps and variance_preserving is cos(pi l / 2) x +
    sin(pi l / 2) eps, clamped. predicted: a generator's decoded prediction of the clean picture
    from its noisy latent, which is what SPO's sampler shows the judge (rollout/predictions.py).
    """

    process: Literal["rectified", "variance_preserving", "predicted"] = Field(
        "rectified", description="how picture and noise are mixed, or what a generator makes of it"
    )
    model: str | None = Field(
        None, description="predicted: a diffusers pipeline, a folder, hub id or bundled/NAME"
    )
    guidance_scale: float = Field(
        5.0, ge=1, description="predicted: of the prediction; 5 as published, 1 for none"
    )
    min_level: float = Field(0.0, ge=0, lt=1, description="lowest level, drawn uniformly")
    max_level: float = Field(1.0, gt=0, le=1, description="highest level")

    @model_validator(mode="after")
    def _ordered(self) -> NoiseOptions:
        if self.min_level >= self.max_level:
            raise ValueError("min_level must be under max_level")
        if (self.process == "predicted") != (self.model is not None):
            raise ValueError("process: predicted and model: NAME belong together")
        return self


class FitOptions(Options):
    """Optimisation."""

    learning_rate: float = Field(1e-4, gt=0, description="peak; linear to 0 after the warm-up")
    train_batch_size: int = Field(32, ge=1, description="pairs a step")
    max_train_steps: int = Field(1000, ge=1, description="optimizer steps")
    lr_warmup_steps: int = Field(0, ge=0, description="linear warm-up, in steps")
    weight_decay: float = Field(0.05, ge=0, description="decoupled, of matrices only")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient; null for none")
    temperature: float = Field(1.0, gt=0, description="factor of score differences in the loss")
    learn_temperature: bool = Field(
        False, description="fit it too; with output: logit it ends up in the model's scale"
    )
    mixed_precision: Literal["no", "bf16"] = Field("no", description="autocast precision")
    channels_last: bool = Field(
        False, description="memory format of a convolutional vision tower; faster on most hardware"
    )
    held_out: float = Field(
        0.1, ge=0, lt=1, description="share of prompts kept apart to measure accuracy on"
    )
    logging_steps: int = Field(10, ge=1, description="a line of metrics.jsonl each")
    checkpointing_steps: int = Field(100, ge=1, description="a saved state each")
