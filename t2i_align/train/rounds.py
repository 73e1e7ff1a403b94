"""Rounds of training: ``t2i-align train`` on a recipe with the section ``rounds``.

    round k: data -> train from the policy of round k-1, which is the reference too -> policy k

Where the data of a round comes from makes the method:

    staged data         a list of data sections: sDPO (Kim et al. 2024, arXiv:2403.19270)
    the policy itself   generate with policy k-1, label by judges: iterated DPO, the offline cousin
                        of OAIF (Guo et al. 2024, arXiv:2402.04792), which does it every step

Every stage is code that runs alone as well: the sampler of ``generate``, the judges of
``data.label_by``, the trainer. A stage that was finished is not done again, one that was
interrupted goes on where it was, so a killed run continued with
``train.resume_from_checkpoint=latest`` ends as if it had never stopped.

    <output_dir>/rounds.json     the recipe
    <output_dir>/samples-02/     what the policy of round 1 made, with metadata.jsonl
    <output_dir>/round-02/       a run like any other: weights, checkpoints, metrics, summary
    <output_dir>/summary.json    all rounds
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console

import t2i_align
from t2i_align.data import SOURCES
from t2i_align.data.options import RecordOptions
from t2i_align.errors import DataError, OutputError
from t2i_align.folder_lock import is_foreign, occupied
from t2i_align.plain_json import load_object
from t2i_align.process.seeds import derive
from t2i_align.recipe import Recipe, written_out
from t2i_align.registry import resolve
from t2i_align.train.log import write_json
from t2i_align.train.output import difference, recipe_in, started
from t2i_align.train.rounds_options import RoundsOptions, SamplesOptions, changed
from t2i_align.train.start import start_from

ROUNDS_FILE = "rounds.json"
SHARED = ("proportion_empty_prompts", "pairing", "shuffle_labels", "curriculum")  # of any source


def train_rounds(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Run every round that is not finished.

    Args:
        recipe: with the section ``rounds``.
        console: for lines and progress.

    Returns:
        The summary, also written to ``<output_dir>/summary.json``.

    Raises:
        OutputError: the folder holds rounds of another recipe, or is not to be continued.
    """
    state = Accelerator(
        mixed_precision=recipe.train.mixed_precision,
        # other processes wait while the first samples, which may take days
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    folder = Path(recipe.output_dir).expanduser()
    with occupied(folder, ROUNDS_FILE):
        if state.is_main_process:
            claim(folder, recipe)
        state.wait_for_everyone()
        start, rounds = recipe.model.start_from, []
        for number in range(1, section(recipe).count + 1):
            where = folder / f"round-{number:02d}"
            facts = _finished(where) or _round(recipe, number, start, console, state)
            start = str(where)
            kept = {k: facts[k] for k in ("steps", "records", "seconds", "last", "doctor")}
            rounds.append({"round": where.name, **kept})
        summary = {"format": 1, "t2i_align": t2i_align.__version__, "rounds": rounds}
        if state.is_main_process:
            write_json(folder / "summary.json", summary)
            console.print(f"done: {len(rounds)} rounds; the policy is in {start}", highlight=False)
    return summary


def section(recipe: Recipe) -> RoundsOptions:
    """The section of a recipe that has it."""
    assert recipe.rounds is not None
    return recipe.rounds


def _finished(where: Path) -> dict[str, Any] | None:
    """The summary of a round that is done."""
    file = where / "summary.json"
    return load_object(file.read_bytes(), str(file), OutputError) if file.is_file() else None


def _round(
    recipe: Recipe, number: int, start: str | None, console: Console, state: Accelerator
) -> dict[str, Any]:
    """One round: its data, then its training."""
    from t2i_align.train.run import train_one

    if state.is_main_process:
        console.print(f"round {number} of {section(recipe).count}", highlight=False)
    with state.main_process_first():  # what the first has made, the others find
        data = data_of(recipe, number, start, console)
    return train_one(round_recipe(recipe, number, data, start), console)


def claim(folder: Path, recipe: Recipe) -> None:
    """Make ``folder`` these rounds', or refuse.

    Raises:
        OutputError: it holds rounds of another recipe, rounds that are not to be continued, or
            something else.
    """
    marker, facts = folder / ROUNDS_FILE, _identity(recipe.to_dict())
    if marker.is_file():
        noted = recipe_in(marker) | {"output_dir": recipe.output_dir}
        before = _identity(written_out(noted, str(marker)))
        if before != facts:
            keys = [k for k in facts | before if before.get(k) != facts.get(k)]
            odd = [difference(k, before.get(k), facts.get(k)) for k in keys]
            raise OutputError(
                f"output_dir: {folder} holds rounds of another recipe: {'; '.join(odd)}",
                "restore those values to continue, or choose another output_dir",
            )
        if recipe.train.resume_from_checkpoint != "latest":
            raise OutputError(
                f"output_dir: {folder} already holds rounds",
                "continue them with train.resume_from_checkpoint=latest, or choose another "
                "output_dir",
            )
        return
    if is_foreign(folder, ROUNDS_FILE):
        raise OutputError(
            f"output_dir: {folder} is not empty and holds no rounds of t2i-align",
            "choose another output_dir; nothing in it was touched",
        )
    write_json(marker, {"format": 1, "t2i_align": t2i_align.__version__, "recipe": facts})


def _identity(recipe: dict[str, Any]) -> dict[str, Any]:
    """All that makes the rounds what they are."""
    train = {k: v for k, v in recipe.get("train", {}).items() if k != "resume_from_checkpoint"}
    kept = {k: v for k, v in recipe.items() if k not in ("output_dir", "cache")}
    return kept | {"train": train}


def round_recipe(recipe: Recipe, number: int, data: RecordOptions, start: str | None) -> Recipe:
    """The recipe of one round, a plain run.

    Args:
        recipe: of all rounds.
        number: from 1; later rounds have seeds of their own.
        data: of the round.
        start: run whose policy is the start and the reference.
    """
    where = Path(recipe.output_dir).expanduser() / f"round-{number:02d}"
    resume = "latest" if started(where) else None
    changes = {
        "output_dir": str(where),
        "seed": round_seed(recipe.seed, number, "train"),
        "data": data,
        "model": recipe.model.model_copy(update={"start_from": start}),
        "train": recipe.train.model_copy(update={"resume_from_checkpoint": resume}),
        "rounds": None,
    }
    return recipe.model_copy(update=changes)


def round_seed(seed: int, number: int, what: str) -> int:
    """The recipe's seed in the first round's training, a function of it elsewhere."""
    if (number, what) == (1, "train"):
        return seed
    return derive(seed, "", number, f"rounds/{what}") % 2**31


def data_of(recipe: Recipe, number: int, start: str | None, console: Console) -> RecordOptions:
    """The data section of a round, its samples made where they are missing."""
    rounds = section(recipe)
    if rounds.draws(number):
        assert rounds.samples is not None
        where = Path(recipe.output_dir).expanduser() / f"samples-{number:02d}"
        draw = draw_samples if rounds.samples.winners is None else draw_pairs
        own = draw(recipe, rounds.samples, number, start, where, console)
        given = recipe.data.model_dump(mode="json", include=set(SHARED))
        options: RecordOptions = resolve(SOURCES[own["type"]]).Options.model_validate(given | own)
        return options
    if number == 1:
        return recipe.data
    found, problems = changed(recipe.data, rounds.data[number - 2], f"rounds.data[{number - 2}]")
    assert found is not None, problems  # the recipe was checked
    return found


def policy(recipe: Recipe, start: str | None) -> Any:
    """The generator of a recipe with the weights of an earlier round, for sampling."""
    device = PartialState().device
    generator = recipe.chosen("model")(recipe.model, device)
    generator.load_module(recipe.seed, reference=False)
    if start is not None:
        start_from(generator.views, start)
    return generator


def _release() -> None:
    """Give the sampler's memory back before training."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _mark(where: Path, seconds: float, facts: dict[str, Any]) -> None:
    """Leave ``<where>.json``, by which a later call sees that the samples are whole."""
    write_json(where.with_suffix(".json"), {"seconds": round(seconds, 1), **facts})


def draw_samples(
    recipe: Recipe,
    options: SamplesOptions,
    number: int,
    start: str | None,
    where: Path,
    console: Console,
) -> dict[str, Any]:
    """Samples of a round's prompts as a folder; judges label it when training prepares its data."""
    from t2i_align.rollout import generate as sampling

    assert options.label_by is not None
    if not where.with_suffix(".json").is_file():
        begun = time.perf_counter()
        prompts = prompts_of(recipe, options, number)
        settings = sampling.Settings(
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            seed=round_seed(recipe.seed, number, "samples"),
            images_per_prompt=options.samples_per_prompt,
            batch_size=options.batch_size,
            denoiser=None if start is None else Path(start).name,
        )
        files = [file for file, _, _ in sampling.jobs(prompts, settings, where)]
        drop_torn_batches(files, options.batch_size)
        sampling.generate(policy(recipe, start), prompts, settings, where, console)
        _mark(where, time.perf_counter() - begun, {"prompts": len(prompts), "samples": len(files)})
        _release()
    rule = options.label_by.model_dump(mode="json")
    return {"type": "folder", "path": str(where), "label_by": rule | {"group_by": "prompt"}}


def drop_torn_batches(files: Sequence[Path], size: int) -> None:
    """Delete the samples of a batch that was cut, so that all are drawn as if it never was.

    The numbers of a sample depend on its batch by rounding.
    """
    for begin in range(0, len(files), size):
        batch = files[begin : begin + size]
        there = [file for file in batch if file.exists()]
        for file in there if len(there) < len(batch) else []:
            file.unlink()


def draw_pairs(
    recipe: Recipe,
    options: SamplesOptions,
    number: int,
    start: str | None,
    where: Path,
    console: Console,
) -> dict[str, Any]:
    """Samples of the embedded world, paired by its exact judge, as one parquet file."""
    from t2i_align.scenes.pairs import PairSettings, build_pairs

    file = where.with_suffix(".parquet")
    if not where.with_suffix(".json").is_file():
        begun = time.perf_counter()
        assert options.num_prompts is not None and options.winners is not None
        settings = PairSettings(
            num_prompts=options.num_prompts,
            samples=options.samples_per_prompt,
            winners=options.winners,
            seed=round_seed(recipe.seed, number, "samples"),
            guidance=options.guidance_scale,
            batch=options.batch_size,
            lossless=True,  # an anchor learns what compression leaves of a winner; docs/scenes.md
        )
        counts = build_pairs(policy(recipe, start), file, settings, console)
        _mark(where, time.perf_counter() - begun, counts)
        _release()
    return {"type": "pickapic", "path": str(file)}


def prompts_of(recipe: Recipe, options: SamplesOptions, number: int) -> list[str]:
    """The prompts of a round: each takes the next ``num_prompts``, from the start after the last.

    Raises:
        DataError: there are none.
    """
    from t2i_align.rollout.generate import read_prompts

    if options.prompts is not None:
        every = list(dict.fromkeys(read_prompts(Path(options.prompts).expanduser())))
    else:
        num = options.num_prompts
        every = first_distinct(data_prompts(recipe), None if num is None else num * number)
    if not every:
        raise DataError("rounds.samples: the recipe's data holds no prompts", "give prompts")
    if options.num_prompts is None:
        return every
    first = 0 if section(recipe).first == "samples" else 1  # rounds before that drew none
    begin = (number - 1 - first) * options.num_prompts
    num = min(options.num_prompts, len(every))
    return [every[(begin + k) % len(every)] for k in range(num)]


def data_prompts(recipe: Recipe) -> Iterator[str]:
    """Prompts of the recipe's records, in their order."""
    source = recipe.chosen("data")(recipe.data)
    return (item.prompt for record in source for item in record.items)


def first_distinct(texts: Iterator[str] | Sequence[str], num: int | None) -> list[str]:
    """The first ``num`` different texts, None for all."""
    found: dict[str, None] = {}
    for text in texts:
        found[text] = None
        if num is not None and len(found) == num:
            break
    return list(found)
