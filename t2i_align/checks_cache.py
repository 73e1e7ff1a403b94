"""Checks of what may be kept of the reference; see checks.py and train/reference.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_align.checks import Found, check
from t2i_align.errors import Problem

if TYPE_CHECKING:
    from t2i_align.recipe import Recipe


@check("reference-cache", "model", "objective", "reference", "cache")
def _reference_may_be_kept(recipe: Recipe) -> Found:
    """Reference errors are kept only where they depend on the reference alone."""
    if recipe.cache.reference != "always":
        return
    from t2i_align.train.reference import obstacle

    why = obstacle(recipe, recipe.needs)
    if why:
        yield Problem("cache.reference", f"got 'always', but {why}", fix="set it to auto or never")


@check("distinct-draws", "objective", "draw")
def _draws_that_repeat_are_of_records(recipe: Recipe) -> Found:
    """Draws that passes go round in belong to stored records."""
    if recipe.draw.num_distinct is not None and recipe.needs.feed == "replay":
        name = recipe.objective.model_dump()["type"]
        yield Problem(
            "draw.num_distinct",
            f"is not used by {name}, which trains on fresh draws and samples of the policy",
            fix="remove it",
        )
