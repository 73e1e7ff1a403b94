"""Running the fit of a judge from a recipe: read pairs, train, measure, write the judge."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from t2i_align.errors import InterruptedRun, OutputError
from t2i_align.folder_lock import is_foreign, occupied
from t2i_align.judges.fit import Fit
from t2i_align.judges.fit_data import Degrade, Pairs, read_pairs, split, with_random_labels
from t2i_align.judges.fit_judge import export
from t2i_align.judges.fit_recipe import FitRecipe

if TYPE_CHECKING:
    from rich.console import Console

STATE, RECIPE, RESULT, METRICS = "state.pt", "recipe.json", "result.json", "metrics.jsonl"
MEASURED = 512  # training pairs that accuracy is measured on, at most


def claim(out: Path, recipe: FitRecipe) -> None:
    """Make the output folder, or make sure that it holds an unfinished run of this recipe.

    Raises:
        OutputError: it holds something else, or a finished judge.
    """
    note = out / RECIPE
    if (out / RESULT).exists():
        raise OutputError(f"{out} holds a fitted judge", "choose another output_dir, or delete it")
    if is_foreign(out, RECIPE):
        raise OutputError(
            f"{out} is not empty and no run of this kind", "choose another output_dir"
        )
    if note.exists() and json.loads(note.read_text())["fingerprint"] != recipe.fingerprint():
        raise OutputError(
            f"{out} holds an unfinished run of another recipe ({note})",
            "repeat that recipe to continue it, choose another output_dir, or delete it",
        )
    out.mkdir(parents=True, exist_ok=True)
    facts = {"fingerprint": recipe.fingerprint(), "recipe": recipe.to_dict()}
    note.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def datasets(recipe: FitRecipe, console: Console) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs of a recipe.

    Raises:
        DataError: none, or none on one side.
    """
    records, skipped = read_pairs(recipe.source(), recipe.data.pairing, recipe.size)
    if skipped:
        console.print(f"{len(skipped)} pairs cannot be used, the first: {skipped[0]}")
    kept, held = split(records, recipe.fit.held_out, recipe.seed)
    if recipe.data.shuffle_labels:
        kept = with_random_labels(kept)
    return Pairs(kept, recipe.size, recipe.seed), Pairs(held, recipe.size, recipe.seed)


def fit_judge(
    recipe: FitRecipe,
    *,
    console: Console,
    device: str = "cpu",
    degrade: Degrade | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Fit a judge and write its folder; called again after a stop, it goes on.

    Args:
        recipe: validated.
        console: for lines.
        device: where the judge is trained.
        degrade: what makes the noisy pictures of a judge that is told the level; None: what
            ``noise.process`` says.
        stop: asked after every step.

    Returns:
        steps, pairs and accuracy before and after, on training and held-out pairs; also written to
        ``result.json``.

    Raises:
        InterruptedRun: stopped before the last step, to be continued.
        OutputError: the output folder belongs to something else.
    """
    out = Path(recipe.output_dir).expanduser()
    with occupied(out, RECIPE):
        claim(out, recipe)
        return _fit(recipe, out, console, device, degrade, stop)


def _fit(
    recipe: FitRecipe,
    out: Path,
    console: Console,
    device: str,
    degrade: Degrade | None,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """The work of :func:`fit_judge` in a folder that is its own."""
    pairs, held = datasets(recipe, console)
    if degrade is None and recipe.noise is not None and recipe.noise.process == "predicted":
        from t2i_align.rollout.predictions import Predictions

        half = recipe.fit.mixed_precision == "bf16"
        degrade = Predictions(recipe.noise, device, half=half)
    run = Fit(recipe, pairs, torch.device(device), degrade)
    some = Pairs(pairs.records[:MEASURED], recipe.size, recipe.seed)
    measured = lambda: {"train": run.accuracy(some), "held_out": run.accuracy(held)}  # noqa: E731
    first = measured()
    console.print(f"{len(pairs)} pairs, {len(held)} held out; at the start {_told(first)}")
    if (out / STATE).exists():
        run.resume(out / STATE)
        console.print(f"continuing at step {run.step_number}")
    seconds = _steps(run, out, console, stop)
    last = measured()
    result = {
        "steps": run.step_number,
        "pairs": {"train": len(pairs), "held_out": len(held)},
        "accuracy_before": _plain(first),
        "accuracy": _plain(last),
        "temperature": run.log_tau.exp().item(),
        "seconds": seconds,
    }
    _finish(run, out, result)
    console.print(f"step {run.step_number}: {_told(last)}")
    return result


def _finish(run: Fit, out: Path, result: dict[str, Any]) -> None:
    """Write judge, metrics and result, drop the state."""
    export(run.fitted, run.recipe, result["temperature"], out)
    lines = [json.dumps(facts) + "\n" for facts in run.history]
    (out / METRICS).write_text("".join(lines), encoding="utf-8")
    (out / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / STATE).unlink(missing_ok=True)


def _steps(run: Fit, out: Path, console: Console, stop: Callable[[], bool]) -> float:
    """Train to the last step, saved now and then; seconds."""
    options, start = run.options, time.monotonic()
    total = options.max_train_steps
    try:
        while run.step_number < total:
            loss = run.step()
            if run.step_number % options.logging_steps == 0:
                console.print(f"step {run.step_number}/{total}: loss {loss:.4f}")
            stopping = run.step_number < total and stop()
            if stopping or run.step_number % options.checkpointing_steps == 0:
                run.save(out / STATE)
            if stopping:
                raise _stopped(run.step_number, total)
    except KeyboardInterrupt as error:  # perhaps inside a step: what was saved last stands
        saved = run.step_number // options.checkpointing_steps * options.checkpointing_steps
        raise _stopped(saved, total) from error
    return time.monotonic() - start


def _stopped(saved: int, total: int) -> InterruptedRun:
    return InterruptedRun(f"stopped; step {saved} of {total} is saved", "the same call continues")


def _told(accuracy: dict[str, float]) -> str:
    """Accuracies in words."""
    return ", ".join(f"{name} accuracy {value:.3f}" for name, value in accuracy.items())


def _plain(accuracy: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {k: None if math.isnan(v) else v for k, v in accuracy.items()}
