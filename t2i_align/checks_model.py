"""Checks of how a denoiser is held and run: bits, kernels, distilled models; see checks.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_align.checks import Found, check
from t2i_align.errors import ModelError, Problem
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.known import KNOWN
from t2i_align.optional import pip_line, version_of

if TYPE_CHECKING:
    from t2i_align.generators.distilled import Described
    from t2i_align.recipe import Recipe


@check("quantized-base", "model", "reference")
def _quantized_base(recipe: Recipe) -> Found:
    """A quantised denoiser is frozen: adapters are trained, and off they are the reference."""
    model = recipe.model
    if not isinstance(model, DiffusersOptions) or model.quantization is None:
        return
    kind = model.quantization.type
    if model.lora is None:
        yield Problem(
            "model.quantization",
            f"got '{kind}', but without model.lora these are the weights trained, and rounded "
            "weights have no gradient",
            fix="add model.lora, or remove model.quantization",
        )
    if model.quantization.double_quant and kind != "nf4":
        yield Problem(
            "model.quantization.double_quant",
            f"belongs to nf4; {kind} has one scale a row",
            fix="remove it, or set model.quantization.type: nf4",
        )
    if model.quantization.backend == "torchao" and kind == "nf4":
        yield Problem(
            "model.quantization.backend",
            "got 'torchao', which has int8 and float8 here; nf4 is bitsandbytes'",
            fix="remove it, or set model.quantization.type: int8",
        )
    if recipe.reference.mode == "frozen_copy":
        yield Problem(
            "reference.mode",
            "got 'frozen_copy', which with model.quantization would be a second copy of the same "
            "quantised weights, not the model before quantisation",
            fix="set reference.mode: auto (the same numbers, no extra memory)",
        )


@check("quantized-package", "model")
def _quantized_package(recipe: Recipe) -> Found:
    """The package behind a quantised denoiser is installed."""
    from t2i_align.generators.quantize import by_torchao

    model = recipe.model
    if not isinstance(model, DiffusersOptions) or model.quantization is None:
        return
    kind = model.quantization.type
    needed = {"nf4": ("bitsandbytes", "quant")}.get(kind)
    if by_torchao(model.quantization):
        needed = ("torchao", "torchao")
    if needed is None or version_of(needed[0]) is not None:
        return
    yield Problem(
        "model.quantization.type",
        f"got '{kind}', which needs the package '{needed[0]}'; it is not installed",
        fix=f"{pip_line(needed[1])}, or set it to int8",
    )


@check("distilled-model", "model", "objective")
def unfit_model(recipe: Recipe) -> Found:
    """The model's denoising error is a likelihood bound: it is no few-step model and no refiner."""
    from t2i_align.generators.distilled import (
        EXPERTS_FIX,
        MEANFLOW_FIX,
        distilled_reason,
        experts_reason,
        meanflow_reason,
        refiner_reason,
    )

    model = recipe.model
    if not isinstance(model, DiffusersOptions):
        return
    described = _described(model)
    refiner = refiner_reason(described.index)
    if refiner is not None:
        yield Problem("model.name_or_path", refiner, fix="train the base model instead")
        return
    experts = experts_reason(described.index)
    if experts is not None:
        yield Problem("model.name_or_path", experts, fix=EXPERTS_FIX)
        return
    meanflow = meanflow_reason(described.index, described.denoiser)
    if meanflow is not None:
        yield Problem("model.name_or_path", meanflow, fix=MEANFLOW_FIX)
        return
    reason = distilled_reason(described)
    if reason is None or recipe.needs.feed == "trajectory" or model.allow_distilled:
        return
    yield Problem(
        "model.name_or_path",
        f"seems to be a few-step distilled model: {reason}. Its error at a drawn noise level says "
        f"little of its samples, and {recipe.objective.model_dump()['type']} compares such errors",
        fix="train the model it was distilled from, or an objective on sampling trajectories; if "
        "this is wrong, set model.allow_distilled: true",
    )


def distilled_warning(recipe: Recipe) -> str | None:
    """What a run says that trains a distilled model on request, or one that may be distilled."""
    from t2i_align.generators.distilled import distilled_reason, few_step_sampler

    model = recipe.model
    if not isinstance(model, DiffusersOptions) or recipe.needs.feed == "trajectory":
        return None
    described = _described(model)
    if model.allow_distilled:
        reason = distilled_reason(described)
        said = f"model.allow_distilled: trains on denoising errors although {reason}"
        return None if reason is None else said
    doubt = few_step_sampler(described)
    if doubt is None:
        return None
    return (
        f"model.name_or_path: {doubt}, as of pipelines with a Lightning or Hyper-SD adapter merged "
        "in; if one is, train the model before it, since its denoising errors say little"
    )


def _described(model: DiffusersOptions) -> Described:
    """What is known of a model without a download."""
    from t2i_align.generators import diffusers_folder as folders
    from t2i_align.generators.distilled import Described

    names = tuple(n for n in (model.name_or_path, model.denoiser_name_or_path) if n)
    known = KNOWN.get(model.name_or_path)
    if known is not None:
        return Described(names, known.index, known.denoiser, known.scheduler)
    try:
        folder = folders.find_folder(
            model.name_or_path, model.revision, model.variant, download=False
        )
        if folder is None:
            return Described(names)
        index = folders.read_json(folder / "model_index.json")
        parts = (
            ("transformer" if "transformer" in index else "unet", "config.json"),
            ("scheduler", "scheduler_config.json"),
        )
        files = [folder / part / file for part, file in parts]
        return Described(
            names, index, *(folders.read_json(f) if f.is_file() else {} for f in files)
        )
    except ModelError:  # 'model-folder' tells what is wrong with it
        return Described(names)


@check("scored-frames", "model", "objective")
def _scored_frames(recipe: Recipe) -> Found:
    """The objective sees errors, which leave out the frames that are not scored."""
    model, needs = recipe.model, recipe.needs
    if not isinstance(model, DiffusersOptions):
        return
    asked = {"short_clips": model.short_clips == "mask", "given_frames": model.given_frames > 0}
    why = "compares whole predictions" if needs.want else "is of samples of the policy"
    for key in (key for key, on in asked.items() if on):
        if needs.want or needs.feed != "stored":
            yield Problem(
                f"model.{key}",
                f"leaves frames out of the error, and {recipe.objective.model_dump()['type']} "
                f"{why}",
                fix="remove the key, or choose an objective on errors: dpo, kto, ipo by its link",
            )


@check("attention-backend", "model", "train", machine=True)
def _attention_backend(recipe: Recipe) -> Found:
    """The attention kernel runs forward and backward on this machine."""
    model = recipe.model
    if not isinstance(model, DiffusersOptions) or model.attention in ("sdpa", "auto"):
        return
    import torch

    from t2i_align.generators.attention import computes_in, unusable

    dtype = computes_in(model.dtype, recipe.train.mixed_precision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = unusable(model.attention, device, dtype)
    if reason is not None:
        yield Problem(
            "model.attention",
            f"got '{model.attention}', which is not usable: {reason}",
            fix="set model.attention: sdpa, or auto for the fastest that works",
        )


@check("compile-toolchain", "train", machine=True)
def _compile_toolchain(recipe: Recipe) -> Found:
    """What torch.compile needs is on this machine."""
    if recipe.train.compile == "none":
        return
    import torch

    from t2i_align.train.compiled import missing_compiler

    missing = missing_compiler("cuda" if torch.cuda.is_available() else "cpu")
    if missing is not None:
        yield Problem(
            "train.compile",
            f"got '{recipe.train.compile}', but {missing}",
            fix="install one (Debian: apt install g++), or set train.compile: none",
        )
