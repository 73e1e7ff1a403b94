"""Checks of the section ``rollout``: who needs it, and what of it is used; see checks.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from t2i_align.catalog import find_root, read_card
from t2i_align.checks import Found, check
from t2i_align.data.label import SIGNS
from t2i_align.data.rows import local_path
from t2i_align.errors import Problem

if TYPE_CHECKING:
    from t2i_align.recipe import Recipe

NO_RECORDS = "none"  # the source without records
OF_REPLAYS = frozenset({"num_inference_steps", "dtype", "replay_size", "replay_steps"})
OF_STEPS_ALONE = frozenset({"num_inner_steps", "threshold_max"})
OF_REPLAYS_ALONE = frozenset({"replay_size", "replay_steps"})


@check("rollout-feed", "objective", "data", "rollout", "draw", "train")
def _rollout_fits_objective(recipe: Recipe) -> Found:
    """Objectives on the policy's own samples say how it is sampled, and only they do."""
    needs, name = recipe.needs, recipe.objective.model_dump()["type"]
    if needs.feed == "stored" and recipe.rollout is not None:
        yield Problem(
            "rollout", f"is not used by {name}, which trains on stored records", fix="remove it"
        )
    elif needs.feed != "stored" and recipe.rollout is None:
        yield Problem(
            "rollout",
            f"is missing; {name} trains on samples of the policy",
            fix="add the section: t2i-align schema says its keys",
        )
    elif needs.feed == "trajectory":
        yield from _of_trajectories(recipe, name)
    elif needs.feed == "replay":
        yield from _of_a_replay(recipe, name)
    yield from _records(recipe, name)


def _records(recipe: Recipe, name: str) -> Found:
    none = recipe.data.model_dump()["type"] == NO_RECORDS
    wants = recipe.needs.feed != "trajectory"
    if none and wants:
        yield Problem(
            "data.type",
            f"got '{NO_RECORDS}', but {name} trains on records",
            fix="name a source: t2i-align ls sources",
        )
    elif not none and not wants:
        yield Problem(
            "data.type",
            f"is not used by {name}, which trains on trajectories of the policy",
            fix=f"set data: {{type: {NO_RECORDS}}} and rollout.prompts",
        )


def _of_trajectories(recipe: Recipe, name: str) -> Found:
    options: Any = recipe.rollout
    for key, why in (("prompts", "what is sampled"), ("judge", "what orders the samples")):
        if getattr(options, key) is None:
            yield Problem(f"rollout.{key}", f"is missing; for {name} it says {why}")
    yield from _unused(OF_REPLAYS_ALONE, options, name)
    if recipe.chosen("objective").compares == "trajectories":
        yield from _unused(OF_STEPS_ALONE, options, name)
    if options.divert_start_step >= options.num_inference_steps:
        yield Problem(
            "rollout.divert_start_step",
            f"got {options.divert_start_step}, not under num_inference_steps "
            f"{options.num_inference_steps}: no step would be trained",
            fix="lower it",
        )
    for key in sorted(recipe.draw.said()):
        yield Problem(
            f"draw.{key}",
            f"is not used by {name}, whose noise levels are the sampler's",
            fix="remove it",
        )
    if options.judge is not None:
        direction = read_card(find_root() / "reward_models" / options.judge / "card.yaml").direction
        if direction not in SIGNS:
            yield Problem(
                "rollout.judge",
                f"got '{options.judge}', which has no better end (its card says '{direction}')",
                fix="choose a judge that has one: t2i-align ls judges",
            )
    if isinstance(options.prompts, str) and not local_path(options.prompts).is_file():
        yield Problem(
            "rollout.prompts",
            f"no file '{options.prompts}'",
            fix="give a .txt with a prompt a line, a .jsonl, .json or .parquet with prompt or "
            "caption, or a list",
        )


def _of_a_replay(recipe: Recipe, name: str) -> Found:
    options: Any = recipe.rollout
    every = set(type(options).model_fields)
    yield from _unused(every - OF_REPLAYS, options, name)
    size, batch = options.replay_size, recipe.train.train_batch_size
    if size is not None and size < batch:
        yield Problem(
            "rollout.replay_size",
            f"got {size}, fewer than the {batch} states of a micro-batch",
            fix=f"set it to at least train.train_batch_size {batch}, or null",
        )
    draw = recipe.draw
    for key, value in (("timestep_sampling", "uniform"), ("num_draws", 1), ("coupling", "auto")):
        if getattr(draw, key) != value:
            yield Problem(
                f"draw.{key}",
                f"got {getattr(draw, key)!r}, but {name} takes its noise levels from the replay",
                fix=f"remove it; the replay's levels are {value} between min_level and max_level"
                if key == "timestep_sampling"
                else "remove it",
            )


def _unused(keys: set[str] | frozenset[str], options: Any, name: str) -> Found:
    """Keys the recipe gives that would do nothing."""
    for key in sorted(keys & options.said()):
        yield Problem(f"rollout.{key}", f"is not used by {name}", fix="remove it")
