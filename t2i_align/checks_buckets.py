"""Checks of ``model.aspect_buckets``; see :mod:`t2i_align.checks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_align.checks import Found, check
from t2i_align.data.buckets import KEY, faults
from t2i_align.errors import Problem
from t2i_align.generators.diffusers_options import DiffusersOptions

if TYPE_CHECKING:
    from t2i_align.recipe import Recipe

UNIT = 8  # the VAE's downscaling; the generator itself knows the network's patch, too


def bucketed(recipe: Recipe) -> bool:
    """Whether a recipe asks for aspect buckets."""
    model = recipe.model
    return isinstance(model, DiffusersOptions) and model.aspect_buckets is not None


@check("aspect-buckets", "model")
def _sizes(recipe: Recipe) -> Found:
    """Aspect buckets are whole numbers of latent pixels, of at most the resolution's area."""
    model = recipe.model
    if isinstance(model, DiffusersOptions) and model.aspect_buckets is not None:
        for key, message, fix in faults(model.aspect_buckets, model.resolution, UNIT):
            yield Problem(key, message, fix=fix)


@check("aspect-buckets-feed", "model", "objective", "data")
def _stored(recipe: Recipe) -> Found:
    """Aspect buckets are asked for stored records in random order."""
    if not bucketed(recipe):
        return
    if recipe.needs.online:
        yield Problem(
            KEY,
            f"needs stored records; {recipe.objective.model_dump()['type']} trains on samples of "
            "the policy, which have one size",
            fix="set model.aspect_buckets: null, or choose an objective on stored records",
        )
    if recipe.data.curriculum is not None:
        yield Problem(
            "data.curriculum",
            "a curriculum says which pairs come when, and model.aspect_buckets which come together",
            fix="set data.curriculum: null or model.aspect_buckets: null",
        )
