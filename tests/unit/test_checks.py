"""One broken recipe for every check that ``validate`` lists."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from recipe_files import write_pipeline, write_recipe

from t2i_align import checks
from t2i_align.errors import RecipeError
from t2i_align.generators import GENERATORS
from t2i_align.objectives import OBJECTIVES
from t2i_align.recipe import Recipe, load_recipe

SDXL = "model.name_or_path=stabilityai/stable-diffusion-xl-base-1.0"

# check name, overrides that break it, the key it names, part of what it says
BROKEN: list[tuple[str, list[str], str, str]] = [
    (
        "reference-adapters",
        ["reference.mode=adapters_off", "model.lora=null"],
        "reference.mode",
        "there are no adapters\n    set reference.mode: frozen_copy (or auto), or add model.lora",
    ),
    (
        "vae-float16",
        [SDXL, "model.vae_dtype=float16"],
        "model.vae_dtype",
        "the VAE of SDXL overflows in float16 and gives NaN latents\n    "
        "set model.vae_dtype: float32, or model.vae_name_or_path: madebyollin/sdxl-vae-fp16-fix",
    ),
    (
        "vae-float16",
        ["model.name_or_path=someone/my-sdxl-merge", "model.vae_dtype=float16"],
        "model.vae_dtype",
        "overflows in float16",
    ),
    (
        "vae-float16",
        ["model.family=sdxl", "model.vae_dtype=float16"],
        "model.vae_dtype",
        "overflows in float16",
    ),
    (
        "master-weights",
        ["model.lora=null", "model.dtype=bfloat16"],
        "model.dtype",
        "got 'bfloat16', but without model.lora these are the weights trained",
    ),
    (
        "reference-cache",
        ["cache.reference=always", "reference.refresh=hard"],
        "cache.reference",
        "got 'always', but reference.refresh 'hard' moves the reference",
    ),
    (
        "distinct-draws",
        ["objective={type: diffusion_dro}", "draw.num_distinct=2"],
        "draw.num_distinct",
        "is not used by diffusion_dro",
    ),
    (
        "noise-levels",
        ["draw.min_level=0.5", "draw.max_level=0.5"],
        "draw.min_level",
        "got 0.5, which is not below draw.max_level 0.5",
    ),
    (
        "warmup-length",
        ["train.lr_warmup_steps=11"],
        "train.lr_warmup_steps",
        "got 11, more than train.max_train_steps 10",
    ),
    (
        "warmup-schedule",
        ["train.lr_warmup_steps=5", "train.lr_scheduler=constant"],
        "train.lr_scheduler",
        "got 'constant', which ignores train.lr_warmup_steps 5",
    ),
    (
        "validation-reached",
        ["validation.prompts=[a]", "validation.validation_steps=11"],
        "validation.validation_steps",
        "got 11, more than train.max_train_steps 10; no grid would be drawn",
    ),
    (
        "resolution-multiple",
        ["model.resolution=500"],
        "model.resolution",
        "got 500, not a multiple of 8 (the VAE's downscaling)\n    "
        "set model.resolution: 496 or 504",
    ),
    ("model-folder", ["model.name_or_path=./none"], "model.name_or_path", "no folder './none'"),
    ("model-folder", ["model.name_or_path=a/b/c"], "model.name_or_path", "no folder 'a/b/c'"),
    ("model-folder", ["model.vae_name_or_path=~/none"], "model.vae_name_or_path", "no folder"),
    (
        "data-layout",
        ["data.type=binary"],
        "data.type",
        "got 'binary', whose records are single labelled items, not pairs",
    ),
    ("data-readable", ["data.path=none.parquet"], "data.path", ": data.path: nothing at 'none"),
    (
        "reference-moves",
        ["objective={type: sft}", "reference.refresh=soft"],
        "reference.refresh",
        "got 'soft', but sft has no reference",
    ),
    (
        "reference-moves",
        ["model.start_from=run", "reference.mode=frozen_copy"],
        "reference.mode",
        "is a second set of adapter weights\n    set reference.mode: auto",
    ),
    (
        "data-curriculum",
        ["objective={type: sft}", "data.curriculum.chunks=2"],
        "data.curriculum",
        "needs stored pairs; sft is fed stored winners",
    ),
    (
        "aspect-buckets",
        ["model.aspect_buckets.step=96"],
        "model.aspect_buckets.step",
        "got 96, but resolution 512 is not a multiple of it",
    ),
    (
        "aspect-buckets-feed",
        ["model.aspect_buckets={}", "data.curriculum.chunks=2"],
        "data.curriculum",
        "a curriculum says which pairs come when, and model.aspect_buckets which come together",
    ),
    (
        "rounds",
        ["rounds.data=[{}]", "train.resume_from_checkpoint=."],
        "train.resume_from_checkpoint",
        "rounds are continued where they stopped",
    ),
    (
        "rounds-samples",
        [
            "rounds.num_rounds=2",
            "rounds.samples.label_by={judges: [jpeg], rule: binary, threshold: -1}",
        ],
        "rounds.samples.label_by.rule",
        "got 'binary', which gives single labelled items, not pairs",
    ),
    ("rounds-data", ["rounds.data=[{path: no.parquet}]"], "rounds.data[0].path", "nothing at 'no."),
    ("rollout-feed", ["rollout={judge: jpeg}"], "rollout", "is not used by dpo, which trains on"),
    (
        "resume-folder",
        ["train.resume_from_checkpoint=none"],
        "train.resume_from_checkpoint",
        "no folder 'none'\n    give a checkpoint folder, 'latest', or null to start afresh",
    ),
]
# Those that need a prepared machine, file or table have their own test below.
ELSEWHERE = {"objective-generator", "fp16-needs-cuda", "optimizer-package", "output-folder"}
ELSEWHERE |= {"distributed", "zero-options"}  # test_zero.py, and the two below
ELSEWHERE |= {"deepspeed-installed", "deepspeed-needs-cuda"}
# Those of checks_model.py: test_ways_to_train_*.py.
ELSEWHERE |= {"quantized-base", "quantized-package", "distilled-model"}
ELSEWHERE |= {"attention-backend", "compile-toolchain"}
ELSEWHERE |= {"scored-frames"}  # test_clip_masks.py


def failures(recipe: Recipe, *, cuda: bool | None = None) -> set[str]:
    """Names of the checks that find something."""
    return {c.name for c in checks.CHECKS if c.cuda in (None, cuda) and list(c.run(recipe))}


def broken(path: Path, *overrides: str, cuda: bool | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, cuda=cuda)
    return [str(p) for p in caught.value.problems]


def test_every_check_has_a_broken_recipe() -> None:
    names = [c.name for c in checks.CHECKS]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, *_ in BROKEN} | ELSEWHERE
    assert all(c.about and not c.about.endswith(".") for c in checks.CHECKS)


def test_a_sound_recipe_fails_none(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path), cuda=False)
    assert failures(recipe, cuda=False) == set()


@pytest.mark.parametrize(("name", "overrides", "key", "said"), BROKEN)
def test_broken(name: str, overrides: list[str], key: str, said: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    found = [p for p in broken(path, *overrides) if f" {key}: " in p]
    assert len(found) == 1
    assert said in found[0]
    assert name in failures(load_recipe(path, overrides, run_checks=False))


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "model" / "model_index.json").write_text("{")
    assert (
        "holds no readable model_index.json, so it is not a diffusers pipeline" in broken(path)[0]
    )


def test_the_vae_check_reads_the_pipeline_class_of_a_folder(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    assert load_recipe(path, ["model.vae_dtype=float16"])
    write_pipeline(tmp_path / "model", "StableDiffusionXLPipeline")
    assert "overflows in float16" in broken(path, "model.vae_dtype=float16")[0]
    fixed = ["model.vae_dtype=float16", "model.vae_name_or_path=madebyollin/sdxl-vae-fp16-fix"]
    assert load_recipe(path, fixed)


def test_wrong_columns_are_seen_before_training(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write_recipe(tmp_path)
    table = pa.table({"captoin": ["a"], "jpg_0": [b""], "jpg_1": [b""], "label_0": [1.0]})
    pq.write_table(table, tmp_path / "d.parquet")
    found = broken(path)
    assert len(found) == 1
    assert found[0].startswith(f"{path}:13: data.path: ")
    assert "caption" in found[0] and "captoin" in found[0]


def test_objective_and_generator_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2i_align.objectives.dpo import DPO

    narrow = replace(DPO.needs, kinds=frozenset({"token", "masked"}), only="it counts")
    monkeypatch.setattr(DPO, "needs", narrow)
    assert broken(write_recipe(tmp_path)) == [
        f"{tmp_path}/r.yaml:9: objective.type: works on masked, token likelihoods; "
        "DiffusersGenerator has elbo; it counts\n"
        "    choose another objective: t2i-align ls objectives"
    ]


def test_fp16_is_asked_of_the_machine_that_trains(tmp_path: Path) -> None:
    path, fp16 = write_recipe(tmp_path), "train.mixed_precision=fp16"
    assert "needs a CUDA device; this machine has none" in broken(path, fp16, cuda=False)[0]
    recipe = load_recipe(path, [fp16])  # written here, trained elsewhere
    assert load_recipe(path, [fp16], cuda=True) == recipe
    assert list(checks.run_machine(recipe, cuda=False)) == ["fp16-needs-cuda"]
    assert checks.run_machine(recipe, cuda=True) == {}


def test_8bit_adam_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path)
    monkeypatch.setattr(checks, "version_of", lambda dist: None)
    found = broken(path, "train.optimizer=adamw_8bit")
    assert 'pip install "t2i-align[quant]", or train.optimizer: adamw' in found[0]
    assert load_recipe(path)


def test_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "out").write_text("")
    assert f"output_dir: '{tmp_path}/out' is a file, not a folder" in broken(path)[0]
    assert "is a file" in broken(path, f"output_dir={tmp_path}/out/deeper/still")[0]
    (tmp_path / "out").unlink()
    monkeypatch.setattr(os, "access", lambda where, mode: Path(where) != tmp_path)
    assert f"'{tmp_path}' is not writable" in broken(path)[0]


def test_checks_run_on_the_sections_that_are_valid(tmp_path: Path) -> None:
    """A typo in one section does not hide an impossible combination in another."""
    found = broken(write_recipe(tmp_path), "train.lr=1", "draw.min_level=0.9", "draw.max_level=0.1")
    assert sorted(p.split(": ")[1] for p in found) == ["draw.min_level", "train.lr"]


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_class_declares_what_checks_ask(objective: str, generator: str) -> None:
    from t2i_align.registry import resolve

    kinds = resolve(OBJECTIVES[objective]).needs.kinds
    assert kinds <= {"elbo", "transition", "token", "masked"}
    assert resolve(GENERATORS[generator]).kind in {"elbo", "transition", "token", "masked"}
