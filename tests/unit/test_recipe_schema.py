"""The JSON schema says what the loader says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from recipe_files import write_recipe

from t2i_align.errors import RecipeError
from t2i_align.recipe import load_recipe, shipped
from t2i_align.recipe_schema import recipe_schema
from t2i_align.yaml_source import override, read


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_obey_it(name: str, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(read(shipped()[name]).data)


@pytest.mark.parametrize(
    "edit",
    [
        "train.learning_rat=1",
        "train.learning_rate=-1",
        "objective.type=dop",
        "objective.type=sft",  # beta is not a key of sft
        "model.lora.rank=4",
        "seed=x",
        "validation.prompts=[]",
        "train.optimizer=sgd",
    ],
)
def test_schema_and_loader_refuse_the_same(
    edit: str, tmp_path: Path, validator: jsonschema.Draft202012Validator
) -> None:
    path = write_recipe(tmp_path)
    with pytest.raises(RecipeError):
        load_recipe(path, [edit])
    assert not validator.is_valid(override(read(path), [edit])[0].data)


def test_the_default_type_may_be_left_out(
    tmp_path: Path, validator: jsonschema.Draft202012Validator
) -> None:
    """Only ``model`` has a default type; elsewhere ``type`` is required."""
    data: dict[str, Any] = read(write_recipe(tmp_path)).data
    del data["model"]["type"]
    validator.validate(data)
    del data["objective"]["type"]
    assert not validator.is_valid(data)


def test_every_field_is_described() -> None:
    """Editors show these on hover."""
    schema = recipe_schema()
    parts = {"Recipe": schema, **schema["$defs"]}
    bare = [
        f"{part}.{key}"
        for part, body in parts.items()
        for key, field in body["properties"].items()
        if key != "type" and "description" not in field
    ]
    assert bare == []
