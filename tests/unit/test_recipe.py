"""Recipes: every problem at once, located, in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe_files import write_recipe

from t2i_align.errors import RecipeError, UserError
from t2i_align.generators import GENERATORS
from t2i_align.objectives import OBJECTIVES
from t2i_align.recipe import Recipe, copy_recipe, find_recipe, load_recipe, noted_recipe, shipped


def problems(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return [str(p) for p in caught.value.problems]


OBJECTIVE_NAMES, GENERATOR_NAMES = ", ".join(OBJECTIVES), ", ".join(GENERATORS)


def test_defaults_and_values(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    assert recipe.train.learning_rate == 1e-5
    assert recipe.model.lora is not None and recipe.model.lora.r == 8
    defaults = {"label_smoothing": 0.0, "sft_weight": 0.0, "modpo_weight": 1.0, "weight": None}
    defaults |= {"link": {"type": "sigmoid"}}
    assert recipe.objective.model_dump() == {"type": "dpo", "beta": 2000.0, **defaults}
    assert recipe.draw.num_draws == 1
    assert recipe.validation is None
    assert recipe.chosen("model").__name__ == "DiffusersGenerator"
    assert recipe.chosen("objective").__name__ == "DPO"


def test_three_typos_are_reported_together_with_lines(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        ("learning_rate", "learning_rat"),
        ("type: dpo", "type: dop"),
        ("r: 8", "r: eight"),
    )
    assert problems(path) == [
        f"{path}:7: model.lora.r: got the text 'eight'; allowed: a whole number >= 1",
        f"{path}:9: objective.type: got the text 'dop'; known objectives: {OBJECTIVE_NAMES}\n"
        "    did you mean 'dpo'?",
        f"{path}:15: train.learning_rat: unknown key; allowed: {TRAIN_KEYS}\n"
        "    did you mean 'learning_rate'?",
    ]


TRAIN_KEYS = (
    "adam_beta1, adam_beta2, adam_epsilon, channels_last, checkpointing_steps, "
    "checkpoints_total_limit, compile, distributed, divergence_limit, ema_decay, "
    "gradient_accumulation_steps, learning_rate, logging_steps, lr_scheduler, lr_warmup_steps, "
    "max_grad_norm, max_skipped_steps, max_train_steps, memory_gb, mixed_precision, optimizer, "
    "report_to, resume_from_checkpoint, scale_lr, train_batch_size, weight_decay"
)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=0", "got the number 0; allowed: a number > 0"),
        ("train.learning_rate='1e-5'", "allowed: a number > 0\n    remove the quotes"),
        ("train.max_train_steps=1e4", "allowed: a whole number >= 1\n    write 10000"),
        ("train.max_train_steps=1.5", "got the number 1.5; allowed: a whole number >= 1"),
        ("train.scale_lr=yes", "allowed: true or false\n    write true or false"),
        (
            "train.optimizer=adam",
            "'adamw' or 'adamw_8bit' or 'adafactor'\n    did you mean 'adamw'?",
        ),
        ("train.mixed_precision=no_", "got the text 'no_'; allowed: 'no' or 'bf16' or 'fp16'"),
        ("train.mixed_precision=false", "got false; allowed: 'no' or 'bf16' or 'fp16'"),
        ("train.ema_decay=2", "got the number 2; allowed: a number or null > 0 and < 1"),
        ("train.resume_from_checkpoint=3", "allowed: text or null\n    quote it to make it text"),
        ("model.lora.target_modules=atention", "or a list of text\n    did you mean 'attention'?"),
        ("model.lora.target_modules=[1]", "got the number 1; allowed: text"),
        ("model.lora=8", "model.lora: got the number 8; allowed: a section with r, lora_alpha"),
        (
            "model.lora.rank=4",
            "model.lora.rank: unknown key; allowed: alpha_pattern, exclude_modules, from_block, ",
        ),
        ("model.type=3", f"model.type: got the number 3; known generators: {GENERATOR_NAMES}"),
        ("objective=dpo", "must be a section\n    write objective: {type: dpo}"),
        ("objective.type=null", f"objective.type: is missing; known objectives: {OBJECTIVE_NAMES}"),
        ("train=null", "train: got null; must be a section"),
        ("trian.learning_rate=1", "trian: unknown key; allowed: output_dir, seed, model"),
        ("seed=-1", "seed: got the number -1; allowed: a whole number >= 0"),
        ("output_dir=", "output_dir: got null; allowed: text (at least 1 long)"),
        ("validation.seed=1", "validation.prompts: is missing; must be a list of text"),
        (
            "validation.prompts=[]",
            "got a list of 0; allowed: a list of text (at least 1 and at most",
        ),
        ("validation.prompts=[a, 1]", "validation.prompts[1]: got the number 1; allowed: text"),
    ],
)
def test_overrides_obey_the_same_rules(tmp_path: Path, override: str, said: str) -> None:
    found = problems(write_recipe(tmp_path), override)
    assert len(found) == 1
    assert found[0].startswith("command line: ")
    assert said in found[0]


def test_missing_keys_point_at_their_section(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, (f"  name_or_path: {tmp_path}/model\n", ""), ("output_dir", "#"))
    first, second = problems(path)
    assert first.startswith(f"{path}:1: output_dir: is missing; must be text")
    assert second == (
        f"{path}:3: model.name_or_path: is missing; must be text\n"
        "    folder or hub id of the base model"
    )


def test_a_missing_section_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"output_dir: {tmp_path}\n")
    assert problems(path) == [
        f"{path}:1: model: is missing; must be a section\n    the generator that is trained",
        f"{path}:1: objective: is missing; must be a section\n    what is minimised",
        f"{path}:1: data: is missing; must be a section\n    where preference records come from",
    ]


def test_rules_of_a_whole_section_are_said_in_their_own_words(tmp_path: Path) -> None:
    found = problems(write_recipe(tmp_path), "data.hub_id=a/b")
    assert found[0].startswith(f"{tmp_path}/r.yaml:11: data: give exactly one of path and hub_id")


def test_every_bad_override_and_every_bad_key_come_together(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, ("beta: 2000", "beta: -1"))
    found = problems(path, "nonsense", "train.lr=1", "seed=x")
    keys = [p.partition(": ")[2].partition(": ")[0] for p in found]
    assert found[0].startswith(f"{path}:10: objective.beta")
    assert sorted(keys[1:]) == ["nonsense", "seed", "train.lr"]


def test_a_recipe_survives_its_own_json(tmp_path: Path) -> None:
    recipe = load_recipe(
        write_recipe(tmp_path), ["validation.prompts=[a, b]", "validation.validation_steps=5"]
    )
    again = tmp_path / "again.json"
    again.write_text(json.dumps(recipe.to_dict()))
    loaded = load_recipe(again)
    assert loaded == recipe
    assert loaded.fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize(
    "name", [n for n in shipped() if n.startswith("scenes_") and "base" not in n]
)
def test_a_shipped_recipe_is_accepted_as_it_is_written_out(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, run_checks=False)
    again = tmp_path / "again.json"
    again.write_text(json.dumps(recipe.to_dict()))
    assert load_recipe(again, run_checks=False) == recipe
    try:
        load_recipe(again)
    except RecipeError as error:  # captions of one's own are made first
        assert [p.key for p in error.problems] == ["data.path"]
    assert noted_recipe(recipe.to_dict(), "run.json") == recipe


def test_the_fingerprint_is_of_the_meaning_not_the_text(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    before = load_recipe(path).fingerprint()
    path.write_text("# other comments\n" + path.read_text().replace("1e-5", "0.00001"))
    assert load_recipe(path).fingerprint() == before
    assert load_recipe(path, ["train.learning_rate=2e-5"]).fingerprint() != before
    assert load_recipe(path, ["objective.beta=1"]).fingerprint() != before


def test_a_name_is_a_shipped_recipe_and_a_wrong_one_is_close_to_one() -> None:
    assert find_recipe("sd15_dpo") == shipped()["sd15_dpo"]
    assert problems("sdxl_dpo_lora_24g")[0].endswith("did you mean 'sdxl_dpo_lora_24gb'?")
    assert problems("no/such.yaml")[0].startswith("no/such.yaml: no such file")
    assert "is a folder" in problems("/")[0]


def test_a_copy_never_overwrites(tmp_path: Path) -> None:
    made = copy_recipe("sd15_dpo", tmp_path / "deep" / "mine.yaml")
    assert made.read_bytes() == shipped()["sd15_dpo"].read_bytes()
    with pytest.raises(UserError, match=r"mine.yaml' exists and is not overwritten"):
        copy_recipe("sd15_dpo", made)
    assert copy_recipe("sd15_dpo", tmp_path) == tmp_path / "sd15_dpo.yaml"
    with pytest.raises(RecipeError, match="did you mean 'sd15_dpo'"):
        copy_recipe("sd15dpo", tmp_path / "x.yaml")
    with pytest.raises(UserError, match="no folder can be made at"):
        copy_recipe("sd15_dpo", made / "below_a_file.yaml")


def test_recipes_are_immutable(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_recipe_can_be_built_in_python(tmp_path: Path) -> None:
    loaded = load_recipe(write_recipe(tmp_path))
    built = Recipe(
        output_dir=loaded.output_dir,
        model=loaded.model,
        objective=loaded.objective,
        data=loaded.data,
    )
    assert built.train.max_train_steps == 1000
    assert built.to_dict()["objective"]["beta"] == 2000
