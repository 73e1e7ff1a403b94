"""``t2i-align validate``: everything that can be known about a run before it starts."""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any

import typer

from t2i_align.errors import Problem, RecipeError

Notes = dict[str, list[Problem]]


def validate(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, read as YAML.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Plan, checks and problems.")] = False,
) -> None:
    """Check a recipe and print its plan: parameters, memory, cache, steps; needs no GPU."""
    from t2i_align.cli.show import print_json
    from t2i_align.quiet import hush
    from t2i_align.recipe import load_recipe
    from t2i_align.train.plan import plan
    from t2i_align.train.shapes import shape_rows, shapes

    hush()
    try:
        loaded = load_recipe(recipe, overrides or ())
    except RecipeError as error:
        if as_json:
            print_json({"recipe": recipe, "ok": False, "problems": _plain(error.problems)})
        raise
    found, buckets, notes = plan(loaded), shapes(loaded), _notes(loaded)
    if as_json:
        facts = {"recipe": recipe, "ok": True, "fingerprint": loaded.fingerprint()}
        facts |= {"plan": found.to_dict(), "buckets": buckets, "checks": _checks(notes)}
        facts |= {"deepspeed": _deepspeed(loaded)}
        print_json(facts | {"notes": _plain(list(chain(*notes.values())))})
        return
    _print(recipe, [*found.rows(), *shape_rows(buckets), *_shared(loaded), *_doubt(loaded)], notes)


def _print(recipe: str, rows: list[tuple[str, str]], notes: Notes) -> None:
    from rich.console import Console

    from t2i_align.cli.show import print_pairs

    print_pairs(f"{recipe}: plan", rows)
    verdicts = {True: "ok", False: "not here"}
    print_pairs(
        "checks", [(c["name"], f"{verdicts[c['ok']]}: {c['about']}") for c in _checks(notes)]
    )
    console = Console(highlight=False, soft_wrap=True)
    for note in chain(*notes.values()):
        console.print(f"on this machine: {note}", style="yellow", markup=False)
    console.print("the recipe is valid" + (", but would not train here" if notes else ""))


def _deepspeed(recipe: Any) -> dict[str, Any] | None:
    """DeepSpeed's configuration, where the run has one."""
    from t2i_align.train.zero import config

    return config(recipe.train) if recipe.train.distributed.backend == "deepspeed" else None


def _shared(recipe: Any) -> list[tuple[str, str]]:
    """How processes share the run, where they do not each hold all of it."""
    import json

    backend, ours = recipe.train.distributed.backend, _deepspeed(recipe)
    rows = [("processes", f"{backend}; the memory above is of a process that holds everything")]
    return rows[: backend != "ddp"] + ([("deepspeed", json.dumps(ours))] if ours else [])


def _doubt(recipe: Any) -> list[tuple[str, str]]:
    """That the model may be a few-step distilled one, where something says so."""
    from t2i_align.checks_model import distilled_warning

    warning = distilled_warning(recipe)
    return [] if warning is None else [("warning", warning)]


def _notes(recipe: Any) -> Notes:
    """Problems of this machine rather than of the recipe: one may plan here and train elsewhere."""
    import torch

    from t2i_align.checks import run_machine

    return run_machine(recipe, cuda=torch.cuda.is_available())


def _checks(notes: Notes) -> list[dict[str, Any]]:
    from t2i_align.checks import CHECKS

    return [{"name": c.name, "about": c.about, "ok": c.name not in notes} for c in CHECKS]


def _plain(problems: list[Problem]) -> list[dict[str, str]]:
    return [{"key": p.key, "message": p.message, "where": p.where, "fix": p.fix} for p in problems]
