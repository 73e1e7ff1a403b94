"""Checks of how processes share a run; see checks.py, train/sharding.py and train/zero.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_align.checks import Found, check
from t2i_align.errors import Problem
from t2i_align.optional import pip_line, version_of

if TYPE_CHECKING:
    from t2i_align.recipe import Recipe

DDP = "set train.distributed.backend: ddp"
ALONE = "start with --num-processes 2 or more, or use ddp"


def alone(recipe: Recipe, num_processes: int) -> list[Problem]:
    """What only the number of processes says."""
    backend = recipe.train.distributed.backend
    if backend == "ddp" or num_processes > 1:
        return []
    key = "train.distributed.backend"
    return [Problem(key, f"not {backend}: one process has nothing to share with", fix=ALONE)]


@check("distributed", "model", "train", "validation", "reference", "rollout", "rounds")
def unfit(recipe: Recipe) -> Found:
    """Nothing is asked that splitting a run over processes would ignore or break."""
    how = recipe.train.distributed
    if how.backend == "ddp":
        return
    wrong = _of_optimizer(recipe)
    if how.splits_network:
        wrong |= _of_split_network(recipe)
    if how.backend == "deepspeed":
        wrong |= _of_deepspeed(recipe)
    name = f"deepspeed stage {how.stage}" if how.backend == "deepspeed" else how.backend
    for key, (holds, why) in wrong.items():
        if holds:
            yield Problem(key, f"not with train.distributed.backend {name}: {why}", fix=DDP)


def _of_optimizer(recipe: Recipe) -> dict[str, tuple[bool, str]]:
    """The optimizer's state is in parts."""
    train = recipe.train
    return {
        "train.optimizer": (train.optimizer != "adamw", "only adamw takes sharded parameters"),
        "train.mixed_precision": (train.mixed_precision == "fp16", "its loss scaler is one's own"),
    }


def _of_split_network(recipe: Recipe) -> dict[str, tuple[bool, str]]:
    """No process has the whole network."""
    quantization = recipe.model.model_dump().get("quantization")
    return {
        "validation": (recipe.validation is not None, "samples are drawn by one process alone"),
        "reference.refresh": (recipe.reference.moves, "a reference that moves is one process's"),
        "rollout": (recipe.rollout is not None, "processes sample on their own"),
        "model.quantization": (bool(quantization), "its weights cannot be split"),
    }


def _of_deepspeed(recipe: Recipe) -> dict[str, tuple[bool, str]]:
    """DeepSpeed keeps gradients to itself, and stage 3 parameters."""
    train, lora = recipe.train, recipe.model.lora
    found = {
        "train.max_skipped_steps": (
            train.max_skipped_steps > 0,
            "what a step has accumulated cannot be dropped",
        ),
        "train.channels_last": (train.channels_last, "it flattens parameters"),
        "train.compile": (train.compile != "none", "it has hooks in every module"),
        "rounds": (recipe.rounds is not None, "it begins once in a process"),
    }
    if train.distributed.stage < 3:
        return found
    trunk = lora is not None and lora.from_block is not None
    return found | {
        "train.ema_decay": (train.ema_decay is not None, "an average needs whole parameters"),
        "model.lora.from_block": (trunk, "parameters come with the calls a shared trunk saves"),
    }


@check("zero-options", "train")
def _zero_options(recipe: Recipe) -> Found:
    """Options of ZeRO are given to DeepSpeed, those of stage 3 to stage 3."""
    how = recipe.train.distributed
    given = {
        "zero_stage": how.zero_stage is not None,
        "offload_optimizer": how.offload_optimizer,
        "offload_parameters": how.offload_parameters,
    }
    if how.backend == "deepspeed":
        given = {"offload_parameters": how.offload_parameters and how.stage < 3}
    for name, idle in given.items():
        if idle:
            yield Problem(
                f"train.distributed.{name}",
                f"is not used by backend {how.backend}"
                + (f" with zero_stage {how.stage}" if how.backend == "deepspeed" else ""),
                fix="remove it, or set backend: deepspeed and the zero_stage it belongs to",
            )


@check("deepspeed-installed", "train", machine=True)
def _deepspeed_installed(recipe: Recipe) -> Found:
    """DeepSpeed is installed where it is asked for."""
    if recipe.train.distributed.backend == "deepspeed" and version_of("deepspeed") is None:
        yield Problem(
            "train.distributed.backend",
            "got 'deepspeed', which is not installed",
            fix=f"{pip_line('deepspeed')}, or {DDP}",
        )


@check("deepspeed-needs-cuda", "train", cuda=False)
def _deepspeed_needs_cuda(recipe: Recipe) -> Found:
    """DeepSpeed runs on CUDA only (checked where the run starts)."""
    if recipe.train.distributed.backend == "deepspeed":
        yield Problem(
            "train.distributed.backend",
            "got 'deepspeed', which is for CUDA devices; this machine has none, and on a CPU it "
            "saves no memory that fsdp2 does not",
            fix="set train.distributed.backend: fsdp2 or ddp",
        )
