"""Options every trainable module shares.

How it is adapted, in what precision, and against which reference.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from t2i_align.options import Options

Positive = Annotated[int, Field(ge=1)]


class LoraOptions(Options):
    """LoRA, in peft's names.

    There is no ``lora_dropout``: a likelihood must be the same number each time it is asked, so the
    policy is scored in eval mode, where dropout does nothing.
    """

    r: int = Field(default=16, ge=1, description="rank")
    lora_alpha: int = Field(
        default=16, ge=1, description="scale numerator; the update is scaled by lora_alpha / r"
    )
    target_modules: Literal["attention", "all-linear"] | list[str] = Field(
        default="attention",
        description="preset of the family, or module name suffixes (peft's target_modules)",
    )
    init_lora_weights: Literal["gaussian", "default"] = Field(
        default="gaussian",
        description="how A starts; B is zero either way, so training starts at the base model",
    )
    use_dora: bool = Field(
        default=False,
        description="DoRA (arXiv:2402.09353): direction by LoRA, the length of each row of the "
        "weight trained apart; slower, often better at small r",
    )
    use_rslora: bool = Field(
        default=False,
        description="rsLoRA (arXiv:2312.03732): scale by lora_alpha / sqrt(r) instead of "
        "lora_alpha / r, so that a larger r is not damped",
    )
    exclude_modules: list[str] = Field(
        default=[], description="module name suffixes that get no adapter"
    )
    rank_pattern: dict[str, Positive] = Field(
        default={}, description="another r for module name suffixes, e.g. {to_v: 32}"
    )
    alpha_pattern: dict[str, Positive] = Field(
        default={}, description="another lora_alpha for module name suffixes"
    )
    from_block: int | None = Field(
        default=None,
        ge=0,
        description="adapters only in blocks from this one on, counted from 0 in forward order "
        "(UNet: down, mid, up; DiT: transformer_blocks, then single ones); the backward pass ends "
        "there, and what comes before runs once for policy and reference (unless they are "
        "compiled); null: everywhere",
    )


class AdaptOptions(Options):
    """Fields common to every generator."""

    name_or_path: str = Field(description="folder or hub id of the base model")
    revision: str | None = Field(default=None, description="hub revision (commit, tag or branch)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="precision of the frozen weights; full fine-tuning keeps float32 master "
        "weights",
    )
    lora: LoraOptions | None = Field(
        default=None, description="LoRA options; leave out for full fine-tuning"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, one more forward; "
        "auto: of no more blocks than the memory plan needs, see train.memory_gb",
    )
    start_from: str | None = Field(
        default=None,
        description="output_dir of an earlier run of the same model and lora (or one of its "
        "checkpoints), whose trained weights policy and reference start from",
    )


class ReferenceOptions(Options):
    """The frozen model the policy is compared with (run-level section ``reference``)."""

    mode: Literal["auto", "adapters_off", "frozen_copy"] = Field(
        default="auto",
        description="auto: adapters off with LoRA (no extra memory), a frozen copy for full "
        "fine-tuning",
    )
    refresh: Literal["none", "soft", "hard"] = Field(
        default="none",
        description="TR-DPO (arXiv:2404.09656): every refresh_steps the reference becomes the "
        "policy (hard), or (1 - refresh_alpha) of itself and refresh_alpha of the policy (soft); "
        "with LoRA it is then a second set of adapter weights",
    )
    refresh_steps: int = Field(
        default=512, ge=1, description="optimizer steps between refreshes (512 in the paper)"
    )
    refresh_alpha: float = Field(
        default=0.6,
        gt=0,
        lt=1,
        description="share of the policy in a soft refresh (0.6 in the paper)",
    )

    @model_validator(mode="after")
    def _adapters_off_never_move(self) -> ReferenceOptions:
        if self.moves and self.mode == "adapters_off":
            raise ValueError(
                "mode adapters_off is the base model for ever, so refresh cannot move it; "
                "set mode: auto"
            )
        return self

    @property
    def moves(self) -> bool:
        """Whether it changes while training; what it said before must not be kept then."""
        return self.refresh != "none"

    def share(self, step: int) -> float:
        """How much of the policy goes into the reference after a step: 0, refresh_alpha or 1."""
        if not self.moves or step % self.refresh_steps:
            return 0.0
        return 1.0 if self.refresh == "hard" else self.refresh_alpha
