"""Checks of the recipe's section ``rounds``; see :mod:`t2i_align.checks`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from t2i_align.checks import CHECKS, Found, check
from t2i_align.errors import Problem
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.train.rounds_options import changed

if TYPE_CHECKING:
    from t2i_align.recipe import Recipe

OF_DATA = ("data-readable", "data-layout", "data-curriculum", "rollout-feed")


@check("rounds", "model", "objective", "reference", "train", "rounds")
def _rounds(recipe: Recipe) -> Found:
    """Rounds learn from stored data, and the reference can be the policy before."""
    if recipe.rounds is None:
        return
    needs = recipe.needs
    name = recipe.objective.model_dump()["type"]
    if needs.online:
        yield Problem(
            "rounds",
            f"{name} makes its own data while it trains",
            fix="set rounds: null, or choose an objective on stored records",
        )
    if recipe.model.lora is not None and recipe.reference.mode != "auto":
        yield Problem(
            "reference.mode",
            f"got '{recipe.reference.mode}'; the reference of a later round is the policy before, "
            "with model.lora a second set of adapter weights",
            fix="set reference.mode: auto",
        )
    if recipe.train.resume_from_checkpoint not in (None, "latest"):
        yield Problem(
            "train.resume_from_checkpoint",
            f"got '{recipe.train.resume_from_checkpoint}'; rounds are continued where they stopped",
            fix="set train.resume_from_checkpoint: latest",
        )


@check("rounds-samples", "model", "objective", "rounds")
def _samples(recipe: Recipe) -> Found:
    """Samples of the policy are pictures, and their labels what the objective needs."""
    samples = recipe.rounds.samples if recipe.rounds is not None else None
    if samples is None:
        return
    generator = recipe.chosen("model")
    model, makes = recipe.model, generator.media_kind
    if isinstance(model, DiffusersOptions) and model.num_frames > 1:
        makes = "video"
    if makes != "image":
        yield Problem(
            "rounds.samples",
            f"judges look at pictures, and {generator.__name__} makes {makes}",
            fix="use rounds.data (staged data), or a generator of pictures",
        )
    layout = recipe.needs.layout
    rule = None if samples.label_by is None else samples.label_by.rule
    if layout in ("pairs", "groups") and rule == "binary":
        yield Problem(
            "rounds.samples.label_by.rule",
            f"got 'binary', which gives single labelled items, not {layout}",
            fix="choose best_worst, all, pareto or ranked, or an objective on items",
        )


@check("rounds-data", "objective", "data", "rounds")
def _stages(recipe: Recipe) -> Found:
    """The data of every stage is there, and of the layout the objective needs."""
    for number, change in enumerate(recipe.rounds.data if recipe.rounds is not None else []):
        key = f"rounds.data[{number}]"
        data, problems = changed(recipe.data, change, key)
        yield from problems
        if data is None:
            continue
        stage: Any = recipe.model_copy(update={"data": data})
        for found in (c.run(stage) for c in CHECKS if c.name in OF_DATA):
            for problem in found:
                yield replace(problem, key=key + problem.key.removeprefix("data"))
