"""Options every trainable module shares.

How it is adapted, in what precision, and against which reference.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from t2i_align.options import Options


class LoraOptions(Options):
    """LoRA, in peft's names."""

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
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, one more forward",
    )


class ReferenceOptions(Options):
    """The frozen model the policy is compared with (run-level section ``reference``)."""

    mode: Literal["auto", "adapters_off", "frozen_copy"] = Field(
        default="auto",
        description="auto: adapters off with LoRA (no extra memory), a frozen copy for full "
        "fine-tuning",
    )
