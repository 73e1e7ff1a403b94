"""The JSON schema of recipes, for editors: completion, descriptions, red underlines while typing.

It is made from the same Options classes that validate a recipe, over every entry of every table.
"""

from __future__ import annotations

from typing import Annotated, Any, Union

from pydantic import Field, TypeAdapter, create_model

from t2i_align.options import Options
from t2i_align.recipe import CHOICES, Choice, Recipe
from t2i_align.registry import resolve


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of recipes; ``type`` discriminates sections that have a table."""
    fields: dict[str, Any] = {
        name: (field.annotation, field)
        for name, field in Recipe.model_fields.items()
        if name not in CHOICES
    }
    for name, choice in CHOICES.items():
        about = Field(description=Recipe.model_fields[name].description)
        fields[name] = (_union(choice), about)
    model = create_model("Recipe", __base__=Options, __doc__=Recipe.__doc__, **fields)
    schema = TypeAdapter(model).json_schema()
    for choice in CHOICES.values():
        _require_type(schema["$defs"], choice)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _classes(choice: Choice) -> dict[str, type[Options]]:
    return {name: resolve(path).Options for name, path in choice.table.items()}


def _union(choice: Choice) -> Any:
    """The discriminated union of a table."""
    classes = tuple(_classes(choice).values())
    return Annotated[Union[classes], Field(discriminator="type")]  # noqa: UP007


def _require_type(definitions: dict[str, Any], choice: Choice) -> None:
    """Else a section that leaves out ``type`` would match several branches of ``oneOf``."""
    for name, cls in _classes(choice).items():
        if name != choice.default:
            definition = definitions[cls.__name__]
            definition["required"] = sorted({*definition.get("required", []), "type"})
