"""Objectives side by side on the embedded world: recipes x seeds, each with its shuffled control.

Every phase is one command of the command line that leaves a file by which a later call sees that it
is done, so the bench may be stopped at any time and continued; its table is written anew after each
run and shows what is finished. All runs of a model are compared with one evaluation of that model,
on the same held-out prompts and noise.

    OUT/base-<model>/{eval,scores.jsonl}                one a base model
    OUT/<recipe>-s<seed>[-shuffled]/{policy,eval,scores.jsonl,phases.json}
    OUT/bench.json, OUT/table.md
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from t2i_align import __version__
from t2i_align.errors import DataError, UserError
from t2i_align.evaluate.compare import compare
from t2i_align.recipe import Recipe, load_recipe
from t2i_align.scenes.quickstart import JUDGES, Ledger, Phase, commands, judged, perform

GUIDANCE = {"bundled/scenes_sd3": 4.5}  # where its gate was measured; 3 elsewhere


@dataclass(frozen=True)
class Settings:
    """What every run of a bench shares.

    Args:
        out: folder of the bench.
        per_task: held-out pictures of each task.
        prompt_seed: which held-out prompts; also the seed of the noise.
        overrides: ``section.key=value`` texts for every recipe.
    """

    out: Path
    per_task: int
    prompt_seed: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One run.

    Args:
        recipe: name of a shipped recipe, or a file.
        seed: of the run.
        shuffled: whether labels are drawn by a coin (the control).
    """

    recipe: str
    seed: int
    shuffled: bool = False

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{Path(self.recipe).stem}-s{self.seed}" + ("-shuffled" if self.shuffled else "")


def entries(recipes: Sequence[str], seeds: Sequence[int], *, controls: bool) -> list[Entry]:
    """All first seeds, then their controls, then the other seeds.

    A bench that is stopped early has then seen every objective.
    """
    first = [Entry(recipe, seeds[0]) for recipe in recipes]
    shuffled = [Entry(e.recipe, e.seed, shuffled=True) for e in first] if controls else []
    return first + shuffled + [Entry(recipe, seed) for seed in seeds[1:] for recipe in recipes]


def possible(entry: Entry, settings: Settings) -> bool:
    """Whether a run makes sense: trajectories of the policy have no stored labels to shuffle."""
    recipe = load_recipe(entry.recipe, settings.overrides)
    return not entry.shuffled or recipe.needs.feed != "trajectory"


def read(entry: Entry, settings: Settings) -> Recipe:
    """The recipe of a run, validated before anything starts."""
    return load_recipe(entry.recipe, [*settings.overrides, *own_overrides(entry)])


def own_overrides(entry: Entry) -> list[str]:
    """What makes this run differ from its recipe."""
    return [f"seed={entry.seed}"] + ["data.shuffle_labels=true"] * entry.shuffled


def evaluation(settings: Settings, recipe: Recipe) -> tuple[str, ...]:
    """Arguments of ``eval`` that a model and a bench fix."""
    model: Any = recipe.model
    found = ("--model", model.name_or_path, "--per-task", str(settings.per_task))
    found += ("--prompt-seed", str(settings.prompt_seed), "--seed", str(settings.prompt_seed))
    if model.name_or_path in GUIDANCE:
        found += ("--guidance-scale", str(GUIDANCE[model.name_or_path]))
    if model.max_sequence_length is not None:
        found += ("--max-sequence-length", str(model.max_sequence_length))
    return found


def measured(folder: Path, which: tuple[str, ...], more: tuple[str, ...] = ()) -> list[Phase]:
    """Pictures with verdicts, and what other judges say of them."""
    named = tuple(x for name in JUDGES for x in ("--judge", name))
    scores = folder / "scores.jsonl"
    return [
        Phase(
            "evaluate",
            ("eval", "scenes", *which, *more, "--out", str(folder / "eval")),
            folder / "eval" / "summary.json",
        ),
        Phase(
            "judge",
            ("score", str(folder / "eval" / "images"), *named, "--jsonl", str(scores)),
            scores,
            silent=True,
        ),
    ]


def base_folder(settings: Settings, recipe: Recipe) -> Path:
    """Where the evaluation of a recipe's model lies."""
    model: Any = recipe.model
    return settings.out / f"base-{Path(model.name_or_path).name}"


def trained(folder: Path, entry: Entry, settings: Settings, recipe: Recipe) -> list[Phase]:
    """Training, then the same measurements as of the base."""
    run = folder / "policy"
    train = Phase(
        "train",
        ("train", entry.recipe, f"output_dir={run}", *settings.overrides, *own_overrides(entry)),
        run / "summary.json",
        ("train.resume_from_checkpoint=latest",),
        run,
    )
    network = "transformer" if "sd3" in base_folder(settings, recipe).name else "unet"
    weights = ("--denoiser", str(run / network))
    if recipe.model.lora is not None:
        weights = ("--lora", str(run))
    return [train, *measured(folder, evaluation(settings, recipe), weights)]


def ledger(folder: Path, planned: Sequence[Phase], recipe: Recipe) -> Ledger:
    """A run's ledger, which refuses a folder made with another recipe or command."""
    parts = [__version__, recipe.fingerprint(), commands(planned, folder)]
    return Ledger(folder, hashlib.sha256(json.dumps(parts).encode()).hexdigest())


def row(entry: Entry, settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """What a finished run gained over its base."""
    folder, base = settings.out / entry.name, base_folder(settings, recipe)
    result = compare(base / "eval", folder / "eval")
    trained_summary = json.loads((folder / "policy" / "summary.json").read_text())
    ledger_seconds = json.loads((folder / "phases.json").read_text())["seconds"].get("train", 0.0)
    run_seconds = sum(trained_summary["seconds"].get(k, 0.0) for k in ("prepare", "load", "train"))
    return {
        "run": entry.name,
        "objective": recipe.objective.model_dump()["type"],
        "seed": entry.seed,
        "shuffled": entry.shuffled,
        "model": base.name.removeprefix("base-"),
        "steps": trained_summary["steps"],
        # A bench killed while it trained never wrote the phase's seconds; the run's own it has.
        "minutes": round(max(ledger_seconds, run_seconds) / 60, 1),
        **{k: result["overall"][k] for k in ("before", "after", "difference", "win", "lose")},
        "graded": result["graded"]["difference"],
        "tasks": {name: r["difference"] for name, r in result["tasks"].items()},
        "judges": judged(base / "scores.jsonl", folder / "scores.jsonl"),
        "doctor": trained_summary.get("doctor", []),
        "last": trained_summary["last"],
    }


def lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for printing."""
    table = []
    for r in rows:
        d, g = r["difference"], r["graded"]
        judges = {j["judge"]: j for j in r["judges"]}
        outside, s = judges["scenes_clip"], judges["sharpness"]
        table.append(
            {
                "name": r["run"],
                "model": r["model"],
                "steps": r["steps"],
                "before": f"{r['before']:.3f}",
                "after": f"{r['after']:.3f}",
                "difference": f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]",
                "win/lose": f"{r['win']}/{r['lose']}",
                "graded": f"{g['mean']:+.3f} [{g['low']:+.3f}, {g['high']:+.3f}]",
                "scenes_clip": f"{outside['difference']:+.3f}",
                "sharpness": f"{s['difference']:+.0f} [{s['low']:+.0f}, {s['high']:+.0f}]",
                "minutes": f"{r['minutes']:.1f}",
            }
        )
    return table


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """A table of equal rows as Markdown."""
    if not table:
        return "nothing finished yet\n"
    heads = list(table[0])
    body = [heads, ["---"] * len(heads), *([str(r[h]) for h in heads] for r in table)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in body)


def write(settings: Settings, rows: Sequence[dict[str, Any]]) -> None:
    """``bench.json`` and ``table.md`` of what is finished."""
    shared = {"per_task": settings.per_task, "prompt_seed": settings.prompt_seed}
    facts = {"format": 1, "t2i_align": __version__, **shared, "rows": list(rows)}
    for name, text in (
        ("bench.json", json.dumps(facts, indent=1)),
        ("table.md", markdown(lines(rows))),
    ):
        temporary = settings.out / f".{name}.part"
        temporary.write_text(text)
        temporary.rename(settings.out / name)


def bench(
    planned: Sequence[Entry], settings: Settings, console: Console, minutes: float | None = None
) -> list[dict[str, Any]]:
    """Run what is missing; rows of the finished runs in their order.

    Args:
        planned: from :func:`entries`.
        settings: shared by all runs.
        console: for commands and progress.
        minutes: start no further run after so many minutes; None for no limit.

    Raises:
        RecipeError: a recipe is wrong, before anything has run.
        DataError: the folder holds runs of other settings.
    """
    planned = [entry for entry in planned if possible(entry, settings)]
    recipes = [read(entry, settings) for entry in planned]
    chained = [e.recipe for e, r in zip(planned, recipes, strict=True) if r.rounds is not None]
    if chained:
        raise UserError(
            f"--recipe: {chained[0]} has rounds, several trainings in one",
            "bench the recipes of its stages, or compare it by hand: train, eval, compare",
        )
    if settings.out.exists() and not settings.out.is_dir():
        raise DataError(f"--out: {settings.out} is a file", "choose a folder")
    settings.out.mkdir(parents=True, exist_ok=True)
    start, rows = time.monotonic(), []
    for entry, recipe in zip(planned, recipes, strict=True):
        folder, base = settings.out / entry.name, base_folder(settings, recipe)
        own = trained(folder, entry, settings, recipe)
        late = minutes is not None and time.monotonic() - start > 60 * minutes
        if late and not all(p.product.exists() for p in own):
            console.print(f"[dim]left for another call: {entry.name}[/]")
            continue
        first = measured(base, evaluation(settings, recipe))
        for where, some in ((base, first), (folder, own)):
            book = ledger(where, some, recipe) if where == folder else base_ledger(where, some)
            for phase in some:
                perform(phase, book, console)
        rows.append(row(entry, settings, recipe))
        write(settings, rows)
    return rows


def base_ledger(folder: Path, planned: Sequence[Phase]) -> Ledger:
    """The ledger of a base's evaluation, which depends on its commands alone."""
    parts = [__version__, commands(planned, folder)]
    return Ledger(folder, hashlib.sha256(json.dumps(parts).encode()).hexdigest())
