"""Models whose denoising error is no likelihood bound: recognised, refused, allowed on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_files import write_pipeline, write_recipe

from t2i_align.checks_model import distilled_warning, unfit_model
from t2i_align.errors import ModelError, RecipeError
from t2i_align.generators.distilled import (
    REFINER,
    Described,
    distilled_reason,
    few_step_sampler,
    refiner_reason,
)
from t2i_align.generators.known import KNOWN
from t2i_align.recipe import load_recipe
from tests import runs
from tests.tiny import pipeline_folder

TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}

# hub ids as published, and what they call themselves
FEW_STEP = {
    "stabilityai/sdxl-turbo": "turbo",
    "stabilityai/sd-turbo": "turbo",
    "stabilityai/stable-diffusion-3.5-large-turbo": "turbo",
    "ByteDance/SDXL-Lightning": "lightning",
    "ByteDance/Hyper-SD": "hyper-sd",
    "black-forest-labs/FLUX.1-schnell": "schnell",
    "latent-consistency/lcm-sdxl": "lcm",
    "SimianLuo/LCM_Dreamshaper_v7": "lcm",
    "tianweiy/DMD2": "dmd2",
}
MANY_STEP = [
    "stabilityai/stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-3.5-large",
    "black-forest-labs/FLUX.1-dev",
    "someone/turbocharged-cars",  # a word that only begins like one
    "/data/lightning/sdxl-base",  # where a folder lies says nothing
    "~/turbo/models/sdxl",
]


@pytest.mark.parametrize(("name", "word"), FEW_STEP.items())
def test_few_step_models_by_name(name: str, word: str) -> None:
    assert distilled_reason(Described((name,))) == f"'{name}' calls itself {word}"
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    assert distilled_reason(Described((base, name))) is not None  # another denoiser in its pipeline


@pytest.mark.parametrize("name", [*MANY_STEP, *KNOWN])
def test_others_are_not_taken_for_one(name: str) -> None:
    known = KNOWN.get(name)
    parts = () if known is None else (known.index, known.denoiser, known.scheduler)
    assert distilled_reason(Described((name,), *parts)) is None
    assert few_step_sampler(Described((name,), *parts)) is None


@pytest.mark.parametrize(
    ("index", "denoiser", "scheduler", "said"),
    [
        ({}, {}, {"_class_name": "LCMScheduler"}, "its scheduler is LCMScheduler"),
        ({}, {}, {"_class_name": "TCDScheduler"}, "its scheduler is TCDScheduler"),
        ({}, {}, TURBO, "with timestep_spacing trailing, as of the turbo models"),
        ({}, {}, TURBO | {"timestep_spacing": "leading"}, None),
        ({}, {}, TURBO | {"_class_name": "EulerDiscreteScheduler"}, None),
        ({"_class_name": "FluxPipeline"}, {"guidance_embeds": False}, {}, "FLUX.1 [schnell]"),
        ({"_class_name": "FluxPipeline"}, {"guidance_embeds": True}, {}, None),
        ({"_class_name": "OtherPipeline"}, {"guidance_embeds": False}, {}, None),
    ],
)
def test_few_step_models_by_what_their_files_say(
    index: dict[str, Any], denoiser: dict[str, Any], scheduler: dict[str, Any], said: str | None
) -> None:
    reason = distilled_reason(Described(("mine",), index, denoiser, scheduler))
    assert reason is None if said is None else reason is not None and said in reason


def test_the_refiner_by_class_or_by_its_score() -> None:
    assert "SDXL's refiner" in (refiner_reason({"_class_name": REFINER}) or "")
    index = {"_class_name": "StableDiffusionXLPipeline"}
    assert refiner_reason(index | {"requires_aesthetics_score": True}) is not None
    assert refiner_reason(index | {"requires_aesthetics_score": False}) is None


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert len(caught.value.problems) == 1
    return str(caught.value.problems[0])


def test_a_hub_id_is_refused_by_name_before_any_download(tmp_path: Path) -> None:
    said = refused(write_recipe(tmp_path), "model.denoiser_name_or_path=ByteDance/SDXL-Lightning")
    assert (
        "model.name_or_path: seems to be a few-step distilled model: 'ByteDance/SDXL-Lightning' "
        "calls itself lightning. Its error at a drawn noise level says little of its samples, and "
        "dpo compares such errors\n    train the model it was distilled from, or an objective on "
        "sampling trajectories; if this is wrong, set model.allow_distilled: true"
    ) in said


def scheduler(folder: Path, **config: Any) -> None:
    """Give a pipeline folder another scheduler config."""
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def test_a_folder_is_refused_by_its_scheduler_unless_allowed(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    assert load_recipe(path)
    scheduler(tmp_path / "model", _class_name="LCMScheduler")
    assert "its scheduler is LCMScheduler" in refused(path)
    recipe = load_recipe(path, ["model.allow_distilled=true"])
    assert distilled_warning(recipe) == (
        "model.allow_distilled: trains on denoising errors although its scheduler is LCMScheduler"
    )
    scheduler(tmp_path / "model", _class_name="DDIMScheduler")
    assert distilled_warning(recipe) is None


# what the hub's repositories hold: pipeline class, denoiser's config, scheduler's config
RELEASED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FLUX.1-schnell": (
        "FluxPipeline",
        {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": False},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
    ),
    "SDXL-Turbo": ("StableDiffusionXLPipeline", {"sample_size": 64}, TURBO),
    "LCM_Dreamshaper": (
        "LatentConsistencyModelPipeline",
        {"time_cond_proj_dim": 256},
        {"_class_name": "LCMScheduler", "original_inference_steps": 50},
    ),
    "FLUX.2-klein": ("Flux2KleinPipeline", {"guidance_embeds": False}, {}),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_few_step_models_are_refused_by_their_configs_alone(
    name: str, tmp_path: Path
) -> None:
    """Under a name that says nothing, without weights; validation, not a step of training."""
    pipeline, denoiser, sampler = RELEASED[name]
    path = write_recipe(tmp_path)
    folder = write_pipeline(tmp_path / "model", pipeline)
    part = "transformer" if pipeline.startswith("Flux") else "unet"
    index = {"_class_name": pipeline, part: ["diffusers", "X"], "is_distilled": "klein" in name}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / part).mkdir()
    (folder / part / "config.json").write_text(json.dumps(denoiser))
    scheduler(folder, **sampler)
    family = {"unet": "sdxl", "transformer": "flux"}[part]
    assert "seems to be a few-step distilled model" in refused(path, f"model.family={family}")


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, True),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}, True),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, False),
        (
            {
                "_class_name": "DDIMScheduler",
                "timestep_spacing": "trailing",
                "rescale_betas_zero_snr": True,
            },
            False,
        ),
    ],
)
def test_a_merged_lightning_or_hyper_adapter_is_warned_of(
    config: dict[str, Any], warned: bool, tmp_path: Path
) -> None:
    """Its scheduler is all that is left of it, and plain models may have that: no refusal."""
    path = write_recipe(tmp_path)
    scheduler(tmp_path / "model", **config)
    told = distilled_warning(load_recipe(path))
    assert (told is not None) is warned
    if told is not None:
        assert "trailing, as of pipelines with a Lightning or Hyper-SD adapter merged in" in told
        recipe = load_recipe(path, ["objective={type: spo}"], run_checks=False)
        assert distilled_warning(recipe) is None


def test_validate_says_the_warning(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from t2i_align.cli import build_app

    model = pipeline_folder("sdxl", tmp_path / "sdxl")
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    scheduler(model, **config | {"timestep_spacing": "trailing"})
    path = runs.write_recipe(tmp_path, "r", sections(model, tmp_path))
    result = CliRunner(env={"COLUMNS": "400"}).invoke(build_app(), ["validate", str(path)])
    assert result.exit_code == 0 and "a Lightning or Hyper-SD adapter" in result.stdout


def test_an_objective_on_trajectories_takes_any_model(tmp_path: Path) -> None:
    """Their steps have the sampler's own densities, however few they are."""
    path = write_recipe(tmp_path)
    scheduler(tmp_path / "model", _class_name="LCMScheduler")
    recipe = load_recipe(path, ["objective={type: spo}"], run_checks=False)
    assert recipe.needs.feed == "trajectory"
    assert list(unfit_model(recipe)) == []


def test_the_refiner_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    write_pipeline(tmp_path / "model", REFINER)
    said = refused(path, "model.allow_distilled=true", "model.family=sdxl")
    assert "model.name_or_path: this is SDXL's refiner: it knows low noise levels only" in said


def test_the_refiner_is_refused_from_python_too(tmp_path: Path) -> None:
    from t2i_align.generators.diffusers_family import DiffusersGenerator
    from t2i_align.generators.diffusers_options import DiffusersOptions

    index = {"_class_name": REFINER, "requires_aesthetics_score": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    options = DiffusersOptions(name_or_path=str(tmp_path), family="sdxl")
    with pytest.raises(ModelError, match="this is SDXL's refiner"):
        DiffusersGenerator(options, "meta")


def sections(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """One step of DPO on two pairs."""
    data = runs.pickapic(folder / "pairs.parquet", 2)
    return {
        "model": {"name_or_path": str(model), "resolution": 64, "lora": {"r": 2}, **changes},
        "objective": {"type": "dpo", "beta": 1.0},
        "data": {"type": "pickapic", "path": str(data)},
        "cache": {"dir": str(folder / "cache")},
        "train": {"train_batch_size": 2, "max_train_steps": 1, "report_to": "none"},
    }


def test_a_run_looks_again_once_the_model_is_here(tmp_path: Path) -> None:
    """A hub id that said nothing is read after its download; when allowed, the run says so."""
    import io

    from rich.console import Console

    from t2i_align.train.run import train

    model = pipeline_folder("sd", tmp_path / "sd")
    allowed = sections(model, tmp_path, allow_distilled=True)
    path = runs.write_recipe(tmp_path, "plain", sections(model, tmp_path))
    recipe = load_recipe(path)  # as if the folder were not here yet
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    scheduler(model, **config | {"_class_name": "LCMScheduler"})
    with pytest.raises(RecipeError, match="its scheduler is LCMScheduler"):
        train(recipe, Console(file=io.StringIO()))
    text = io.StringIO()
    train(load_recipe(runs.write_recipe(tmp_path, "allowed", allowed)), Console(file=text))
    assert "trains on denoising errors although its scheduler is LCMScheduler" in text.getvalue()
