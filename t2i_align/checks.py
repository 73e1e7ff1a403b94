"""What single fields cannot say: combinations that fail late, or silently train something else.

Each check is one function from a recipe to problems, with the sections it reads; it runs whenever
those sections are valid, even if others are not. Its name and the first line of its docstring are
what ``validate`` prints, so the list a user sees is the list that ran. No GPU, no download, no
model is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.checks_paths import key_of_path, reason
from t2i_align.errors import Problem
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.known import KNOWN
from t2i_align.optional import pip_line, version_of

if TYPE_CHECKING:
    from t2i_align.recipe import Recipe

Found = Iterator[Problem]
SINGLE_ITEM_SOURCES = frozenset({"binary"})


@dataclass(frozen=True)
class Check:
    """One cross-field check.

    Args:
        name: short name.
        about: one sentence, what holds when it passes.
        needs: sections and keys that must be valid for it to run.
        run: the function.
        cuda: asked with whether the run has a CUDA device; not asked when that is unknown.
        machine: it tries something on the machine, so it is asked where the run starts.
    """

    name: str
    about: str
    needs: frozenset[str]
    run: Callable[[Recipe], Found]
    cuda: bool | None = None
    machine: bool = False

    def asked(self, cuda: bool | None) -> bool:
        """Whether it applies to a machine with or without CUDA, or to no machine (None)."""
        if self.machine:
            return cuda is not None
        return self.cuda is None or self.cuda is cuda


CHECKS: list[Check] = []


def check(
    name: str, *needs: str, cuda: bool | None = None, machine: bool = False
) -> Callable[[Callable[[Recipe], Found]], Callable[[Recipe], Found]]:
    """Register a check under a name; ``cuda=False`` runs it only for machines without CUDA.

    ``machine`` runs it on any, but not for a recipe alone.
    """

    def register(function: Callable[[Recipe], Found]) -> Callable[[Recipe], Found]:
        about = (function.__doc__ or "").strip().splitlines()[0].rstrip(".")
        CHECKS.append(Check(name, about, frozenset(needs), function, cuda, machine))
        return function

    return register


def run(recipe: Recipe, valid: set[str], *, cuda: bool | None = None) -> list[Problem]:
    """Problems of every check whose sections are valid.

    Args:
        recipe: a recipe, or a partial one that holds the valid sections only.
        valid: names of those sections.
        cuda: whether the run will have a CUDA device; None leaves out the checks that depend on it.
    """
    asked = [c for c in CHECKS if c.needs <= valid and c.asked(cuda)]
    return list(dict.fromkeys(problem for c in asked for problem in _found(c, recipe)))


def _found(asked: Check, recipe: Recipe) -> Found:
    """Problems of one check; a path it cannot even look at is one too."""
    try:
        yield from asked.run(recipe)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~name of an unknown user
        key = key_of_path(recipe, asked.needs, str(getattr(error, "filename", None) or "~"))
        if key is None:
            raise
        yield Problem(key, f"is no path that can be looked at: {reason(error)}")


def run_machine(recipe: Recipe, *, cuda: bool) -> dict[str, list[Problem]]:
    """Problems of a valid recipe on a machine with or without CUDA, by name of the check."""
    asked = [c for c in CHECKS if c.machine or c.cuda is cuda]
    found = {c.name: list(c.run(recipe)) for c in asked}
    return {name: problems for name, problems in found.items() if problems}


@check("objective-generator", "model", "objective")
def _objective_fits_generator(recipe: Recipe) -> Found:
    """The objective is defined for the generator's kind of likelihood."""
    generator, known = recipe.chosen("model"), recipe.needs.kinds
    own = {generator.kind}
    if generator.kind == "elbo" and recipe.needs.feed == "trajectory":
        own.add("transition")  # a denoiser's own trajectories have Gaussian steps
    if not own & known:
        kinds, why = ", ".join(sorted(known)), recipe.needs.only
        yield Problem(
            "objective.type",
            f"works on {kinds} likelihoods; {generator.__name__} has {generator.kind}; {why}",
            fix="choose another objective: t2i-align ls objectives",
        )


@check("reference-adapters", "model", "objective", "reference")
def _reference_needs_adapters(recipe: Recipe) -> Found:
    """A reference made by switching adapters off has adapters to switch off."""
    needed = "reference" in recipe.needs.views
    if needed and recipe.reference.mode == "adapters_off" and recipe.model.lora is None:
        yield Problem(
            "reference.mode",
            "got 'adapters_off', but model.lora is not set, so there are no adapters",
            fix="set reference.mode: frozen_copy (or auto), or add model.lora",
        )


@check("reference-moves", "model", "objective", "reference")
def _reference_can_move(recipe: Recipe) -> Found:
    """A reference that is refreshed, or starts from a run, exists and can hold other weights."""
    name = recipe.objective.model_dump()["type"]
    if recipe.reference.moves and "reference" not in recipe.needs.views:
        yield Problem(
            "reference.refresh",
            f"got '{recipe.reference.refresh}', but {name} has no reference",
            fix="set reference.refresh: none, or choose an objective with a reference",
        )
    own = recipe.reference.moves or recipe.model.start_from is not None
    if own and recipe.model.lora is not None and recipe.reference.mode != "auto":
        yield Problem(
            "reference.mode",
            f"got '{recipe.reference.mode}'; with model.lora a reference that is refreshed or "
            "starts from a run is a second set of adapter weights",
            fix="set reference.mode: auto",
        )


@check("fp16-needs-cuda", "train", cuda=False)
def _fp16_needs_cuda(recipe: Recipe) -> Found:
    """Mixed precision fp16 runs on CUDA only (checked where the run starts)."""
    if recipe.train.mixed_precision == "fp16":
        yield Problem(
            "train.mixed_precision",
            "got 'fp16', which needs a CUDA device; this machine has none",
            fix="set train.mixed_precision: bf16 or no",
        )


@check("vae-float16", "model")
def _vae_float16(recipe: Recipe) -> Found:
    """SDXL's own VAE does not run in float16, where it overflows to NaN."""
    model = recipe.model
    if not isinstance(model, DiffusersOptions) or not _is_sdxl(model):
        return
    if model.vae_dtype == "float16" and model.vae_name_or_path is None:
        yield Problem(
            "model.vae_dtype",
            "got 'float16', but the VAE of SDXL overflows in float16 and gives NaN latents",
            fix="set model.vae_dtype: float32, or "
            "model.vae_name_or_path: madebyollin/sdxl-vae-fp16-fix",
        )


@check("master-weights", "model")
def _master_weights(recipe: Recipe) -> Found:
    """Full fine-tuning keeps float32 weights, or small updates are rounded away."""
    if recipe.model.lora is None and recipe.model.dtype != "float32":
        yield Problem(
            "model.dtype",
            f"got '{recipe.model.dtype}', but without model.lora these are the weights trained; "
            "updates at usual learning rates round to nothing",
            fix="set model.dtype: float32 and train.mixed_precision: bf16, or add model.lora",
        )


@check("noise-levels", "draw")
def _noise_levels(recipe: Recipe) -> Found:
    """The range of noise levels is not empty."""
    low, high = recipe.draw.min_level, recipe.draw.max_level
    if low >= high:
        yield Problem(
            "draw.min_level",
            f"got {low}, which is not below draw.max_level {high}",
            fix="0 is data and 1 pure noise; the full range is 0 to 1",
        )


@check("warmup-length", "train")
def _warmup_length(recipe: Recipe) -> Found:
    """The warm-up ends before training does."""
    warmup, steps = recipe.train.lr_warmup_steps, recipe.train.max_train_steps
    if warmup > steps:
        yield Problem(
            "train.lr_warmup_steps",
            f"got {warmup}, more than train.max_train_steps {steps}; "
            "the peak learning rate would never be reached",
            fix=f"set train.lr_warmup_steps to at most {steps}",
        )


@check("warmup-schedule", "train")
def _warmup_schedule(recipe: Recipe) -> Found:
    """A warm-up is asked of a schedule that has one."""
    if recipe.train.lr_scheduler == "constant" and recipe.train.lr_warmup_steps > 0:
        yield Problem(
            "train.lr_scheduler",
            f"got 'constant', which ignores train.lr_warmup_steps {recipe.train.lr_warmup_steps}",
            fix="set train.lr_scheduler: constant_with_warmup, or train.lr_warmup_steps: 0",
        )


@check("validation-reached", "train", "validation")
def _validation_reached(recipe: Recipe) -> Found:
    """Sample grids are drawn at least once before training ends."""
    if recipe.validation is None:
        return
    every, steps = recipe.validation.validation_steps, recipe.train.max_train_steps
    if every > steps:
        yield Problem(
            "validation.validation_steps",
            f"got {every}, more than train.max_train_steps {steps}; no grid would be drawn",
            fix=f"set validation.validation_steps to at most {steps}, or validation: null",
        )


@check("resolution-multiple", "model")
def _resolution(recipe: Recipe) -> Found:
    """The crop is a whole number of latent pixels."""
    model = recipe.model
    if isinstance(model, DiffusersOptions) and model.resolution % 8:
        low = model.resolution // 8 * 8
        yield Problem(
            "model.resolution",
            f"got {model.resolution}, not a multiple of 8 (the VAE's downscaling)",
            fix=f"set model.resolution: {low} or {low + 8}",
        )


@check("model-folder", "model")
def _model_folder(recipe: Recipe) -> Found:
    """A local model folder exists and is a diffusers pipeline where one is needed."""
    from t2i_align.generators.diffusers_folder import local_path, looks_local

    model = recipe.model
    paths = {"name_or_path": model.name_or_path}
    if isinstance(model, DiffusersOptions) and model.vae_name_or_path:
        paths["vae_name_or_path"] = model.vae_name_or_path
    for key, text in paths.items():
        folder = local_path(text)
        if not looks_local(text):
            continue
        if not folder.is_dir():
            yield Problem(
                f"model.{key}",
                f"no folder '{text}'",
                fix="give an existing folder, or a hub id such as owner/name",
            )
        elif key == "name_or_path" and isinstance(model, DiffusersOptions):
            yield from _pipeline_folder(folder, text)


def _pipeline_folder(folder: Path, text: str) -> Found:
    if _model_index(folder) is None:
        yield Problem(
            "model.name_or_path",
            f"'{text}' holds no readable model_index.json, so it is not a diffusers pipeline",
            fix="give the folder that save_pretrained wrote (unet/ or transformer/, vae/, ...)",
        )


@check("data-readable", "data")
def _data_readable(recipe: Recipe) -> Found:
    """Local data exists, opens, and has the columns its source reads (hub ids are not asked)."""
    source = recipe.chosen("data")
    fields = source.Options.model_fields
    for message in source.check(recipe.data):
        first, _, fix = message.partition("\n")
        key, colon, rest = first.partition(": ")
        if not colon or key.removeprefix("data.") not in fields:
            key, rest = "data.path" if "path" in fields else "data", first
        yield Problem(key, rest, fix=fix.strip().removeprefix("fix: "))


@check("data-layout", "objective", "data")
def _data_layout(recipe: Recipe) -> Found:
    """The data says what the objective needs: single labelled items are no pairs."""
    layout, source = recipe.needs.layout, recipe.data.model_dump()["type"]
    rule = None if recipe.data.label_by is None else recipe.data.label_by.rule
    if layout in ("pairs", "groups") and rule == "binary":
        yield Problem(
            "data.label_by.rule",
            f"got 'binary', which gives single labelled items, not {layout}",
            fix="choose best_worst, all, pareto or ranked, or an objective on items",
        )
    elif layout in ("pairs", "groups") and rule is None and source in SINGLE_ITEM_SOURCES:
        yield Problem(
            "data.type",
            f"got '{source}', whose records are single labelled items, not {layout}",
            fix="choose a source of pairs, or an objective on items: t2i-align ls objectives",
        )


@check("data-curriculum", "objective", "data")
def _curriculum_of_pairs(recipe: Recipe) -> Found:
    """A curriculum, which goes by the difference of two values, is asked for pairs."""
    needs = recipe.needs
    if recipe.data.curriculum is not None and (needs.layout != "pairs" or needs.online):
        yield Problem(
            "data.curriculum",
            f"needs stored pairs; {recipe.objective.model_dump()['type']} is fed {needs.feed} "
            f"{needs.layout}",
            fix="set data.curriculum: null, or choose an objective on pairs",
        )


@check("optimizer-package", "train")
def _optimizer_package(recipe: Recipe) -> Found:
    """The package of an 8-bit optimizer is installed."""
    if recipe.train.optimizer == "adamw_8bit" and version_of("bitsandbytes") is None:
        yield Problem(
            "train.optimizer",
            "got 'adamw_8bit', which needs the package 'bitsandbytes'; it is not installed",
            fix=f"{pip_line('quant')}, or train.optimizer: adamw",
        )


@check("output-folder", "output_dir")
def _output_folder(recipe: Recipe) -> Found:
    """The output folder is, or can be made, a writable folder."""
    folder = Path(recipe.output_dir).expanduser()
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        yield Problem("output_dir", f"'{nearest}' is a file, not a folder", fix="choose another")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield Problem("output_dir", f"'{nearest}' is not writable", fix="choose another folder")


@check("resume-folder", "train")
def _resume_folder(recipe: Recipe) -> Found:
    """The checkpoint to resume from exists ('latest' is looked up when training starts)."""
    resume = recipe.train.resume_from_checkpoint
    if resume not in (None, "latest") and not Path(resume).expanduser().is_dir():
        yield Problem(
            "train.resume_from_checkpoint",
            f"no folder '{resume}'",
            fix="give a checkpoint folder, 'latest', or null to start afresh",
        )


def _model_index(folder: Path) -> dict[str, Any] | None:
    """A pipeline folder's index, or None when it has none that is readable."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) else None


def known_family(model: DiffusersOptions) -> str | None:
    """The family of a pipeline, as far as can be said without a download; else None."""
    from t2i_align.generators.diffusers_folder import local_path
    from t2i_align.generators.layouts import family_of

    if model.family != "auto":
        return model.family
    known = KNOWN.get(model.name_or_path)
    index = known.index if known else _model_index(local_path(model.name_or_path))
    return family_of(str(index.get("_class_name"))) if index else None


def _is_sdxl(model: DiffusersOptions) -> bool:
    """Whether a model is SDXL; a hub id that is not known is judged by its name."""
    family = known_family(model)
    return "xl" in model.name_or_path.lower() if family is None else family == "sdxl"
