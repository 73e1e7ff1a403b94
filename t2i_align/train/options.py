"""Run-level options of the training loop, in diffusers' names.

Import-light: recipe.py joins these into the Recipe.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from t2i_align.options import Options


class DrawOptions(Options):
    """How events (noise level and noise) are drawn; see :class:`t2i_align.contract.DrawSpec`."""

    num_draws: int = Field(default=1, ge=1, le=64, description="draws an item and step (S)")
    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = Field(
        default="uniform",
        description="density of the noise level; the papers' choice: uniform (DDPM), "
        "logit_normal (flow)",
    )
    logit_mean: float = Field(default=0.0, description="mean of the normal behind logit_normal")
    logit_std: float = Field(
        default=1.0, gt=0, description="standard deviation of the normal behind logit_normal"
    )
    mode_scale: float = Field(
        default=1.29, ge=-1, le=1.75, description="scale of the mode density (SD3 paper)"
    )
    min_level: float = Field(default=0.0, ge=0, lt=1, description="lowest noise level, 0 = data")
    max_level: float = Field(
        default=1.0, gt=0, le=1, description="highest noise level, 1 = pure noise"
    )
    coupling: Literal["auto", "none", "time", "time+noise"] = Field(
        default="auto",
        description="what winner and loser share; auto: the objective's own (dpo: time+noise)",
    )
    num_distinct: int | None = Field(
        default=None,
        ge=1,
        description="draws of a record that passes go round in: pass e has draw e mod this, so "
        "later passes find the reference's errors in the cache; null: another draw every pass",
    )


class CacheOptions(Options):
    """The latent and text cache on disk, keyed by content, shared between runs."""

    dir: str = Field(default="~/.cache/t2i_align", description="root folder of the cache")
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16",
        description="precision of cached tensors; float16 keeps 11 bits, half the disk of float32",
    )
    encode_batch_size: int = Field(
        default=8, ge=1, description="media (and prompts) encoded at once while building"
    )
    reference: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="keep what the reference says of each item and draw; auto: where this run "
        "meets a draw again (draw.num_distinct), or finds them from before; always: also for "
        "the next run of a sweep",
    )


class DistributedOptions(Options):
    """How several processes share a run; ``train --num-processes N`` starts them."""

    backend: Literal["ddp", "fsdp2", "deepspeed"] = Field(
        default="ddp",
        description="ddp: every process holds the whole network; fsdp2: parameters, gradients and "
        "optimizer state are split over the processes; deepspeed: ZeRO, see zero_stage",
    )
    zero_stage: Literal[2, 3] | None = Field(
        default=None,
        description="of deepspeed: 2 splits gradients and optimizer state, 3 parameters too; "
        "null: 2",
    )
    offload_optimizer: bool = Field(
        default=False, description="of deepspeed: keep the optimizer in main memory, and step there"
    )
    offload_parameters: bool = Field(
        default=False, description="of deepspeed, stage 3: keep parameters in main memory"
    )
    timeout_minutes: float | None = Field(
        default=None,
        gt=0,
        le=60 * 24 * 365,
        description="how long a process waits for the others before it gives up; null: a week, for "
        "they also wait while the first one fills the cache",
    )

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return self.zero_stage or 2

    @property
    def splits_network(self) -> bool:
        """Whether no process holds all parameters."""
        return self.backend == "fsdp2" or (self.backend == "deepspeed" and self.stage == 3)


class TrainOptions(Options):
    """Optimisation, precision, checkpoints, logging."""

    learning_rate: float = Field(default=1e-5, gt=0, description="peak learning rate")
    train_batch_size: int = Field(
        default=1, ge=1, description="records (for pairs: pairs) a device and forward"
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="forwards a step")
    max_train_steps: int = Field(default=1000, ge=1, description="optimizer steps")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field(default="constant_with_warmup", description="schedule, diffusers' names")
    lr_warmup_steps: int = Field(default=0, ge=0, description="linear warm-up, in optimizer steps")
    scale_lr: bool = Field(
        default=False, description="multiply learning_rate by processes x batch x accumulation"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        default="adamw",
        description="adamw: torch, fused; adamw_8bit: bitsandbytes; adafactor: transformers",
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW beta1")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW beta2")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(default=1e-2, ge=0, description="decoupled weight decay")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="clip the gradient norm; null for none"
    )
    divergence_limit: float | None = Field(
        default=3.0,
        gt=1,
        description="an objective without a lower bound stops when the losers' loss is this many "
        "times the reference's (or, without one, its own at the start); null: never",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="autocast precision"
    )
    channels_last: bool = Field(
        default=False,
        description="memory format of convolutional backbones; faster on GPUs, in wide networks",
    )
    compile: Literal["none", "regional", "full"] = Field(
        default="none",
        description="torch.compile: regional compiles the repeated block once, full the whole "
        "network, which takes minutes to start",
    )
    memory_gb: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="GB (1e9 bytes) that model.gradient_checkpointing: auto plans for; null: 9 "
        "tenths of what the device has",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="keep an average of the trained weights; samples and exports are drawn from it",
    )
    max_skipped_steps: int = Field(
        default=0,
        ge=0,
        description="steps of a run that may be skipped because a loss or gradient is no number; "
        "each is logged, and one more stops the run",
    )
    checkpointing_steps: int = Field(default=500, ge=1, description="steps between checkpoints")
    checkpoints_total_limit: int | None = Field(
        default=None,
        ge=1,
        description="keep this many newest checkpoints; the last good one is never deleted",
    )
    resume_from_checkpoint: str | None = Field(
        default=None, description="'latest' or a checkpoint folder; continues exactly"
    )
    report_to: Literal["tensorboard", "none"] = Field(
        default="tensorboard", description="metrics.jsonl is always written"
    )
    logging_steps: int = Field(default=1, ge=1, description="steps between log lines")
    distributed: DistributedOptions = Field(
        default_factory=lambda: DistributedOptions(), description="several processes"
    )


class ValidationOptions(Options):
    """Sample grids while training, from fixed prompts and noise."""

    prompts: list[str] = Field(min_length=1, max_length=64, description="prompts of the grid")
    validation_steps: int = Field(default=500, ge=1, description="optimizer steps between grids")
    num_inference_steps: int = Field(default=30, ge=1, description="sampler steps")
    guidance_scale: float = Field(default=5.0, ge=1, description="classifier-free guidance")
    seed: int = Field(default=0, ge=0, description="seed of the fixed noise")
    batch_size: int = Field(default=4, ge=1, description="samples drawn at once")
