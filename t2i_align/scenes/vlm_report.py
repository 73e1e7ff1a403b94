"""How often a vision-language model answers questions about the world right.

Questions are about renders that fulfil held-out prompts: the prompt's own claim (yes) or one that
differs from it in one fact and does not hold (no), a coin decides, in random wordings. Half of the
answers are yes, so guessing scores .5. Right answers are averaged by task and by wording; intervals
draw prompts again (``evaluate/aggregate.py``).

    python -m t2i_align.scenes.vlm_report FOLDER [PAIRS.parquet]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from t2i_align.evaluate.aggregate import bootstrap_mean, macro_mean
from t2i_align.scenes.grammar import fixed_prompts, scene_for
from t2i_align.scenes.questions import (
    FIGURE,
    Claim,
    Question,
    false_claim,
    phrase,
    read_claim,
    reply,
    side,
    things_in,
)
from t2i_align.scenes.render import render

Ask = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]


@dataclass(frozen=True)
class Item:
    """A question of the examination.

    Args:
        image: ``(64, 64, 3)`` uint8.
        question: text and answer.
        claim: what the question is about.
        task: GenEval's task of the claim.
        prompt: the prompt of the picture.
    """

    image: np.ndarray
    question: Question
    claim: Claim
    task: str
    prompt: str


def examination(per_task: int, seed: int, *, held_out: bool = True) -> list[Item]:
    """``per_task`` questions of each task about renders of one side's prompts.

    Args:
        per_task: questions of each task.
        seed: of prompts, places, answers and wordings.
        held_out: held-out prompts (True) or training prompts.
    """
    rng = np.random.default_rng([seed, 13])
    allowed = either_side if held_out else side(held_out=False).__contains__
    items = []
    for metadata, _ in fixed_prompts(per_task, seed, held_out=held_out):
        scene, claim = scene_for(metadata, rng), read_claim(metadata)
        wanted = bool(rng.random() < 0.5)
        false = None if wanted else false_claim(claim, things_in(scene), rng, allowed)
        asked = claim if false is None else false
        question = reply(asked, false is None, rng)
        facts = (question, asked, metadata["tag"], metadata["prompt"])
        items.append(Item(render(scene, rng), *facts))
    return items


def either_side(claim: Claim) -> bool:
    """Whether a claim is of the grammar and on one of its sides."""
    return claim in side(held_out=False) or claim in side(held_out=True)


def vqa_accuracy(
    ask: Ask, *, per_task: int = 100, seed: int = 0, held_out: bool = True, batch_size: int = 64
) -> dict[str, Any]:
    """Share of right answers at a threshold of 1/2.

    Args:
        ask: pictures and questions to P(yes), e.g. ``VQAScore.ask``.
        per_task: questions of each task.
        seed: of the questions.
        held_out: held-out prompts (True) or training prompts.
        batch_size: questions at once.

    Returns:
        ``overall``, ``tasks`` and ``wordings``: each a mean with ``low`` and ``high``; ``figure``:
        VQAScore's own wording for every claim, the questions a score is made of; ``yes`` and
        ``no``: shares right by answer.
    """
    items = examination(per_task, seed, held_out=held_out)
    right = judged(ask, items, [i.question.text for i in items], batch_size)
    texts = [FIGURE.format(prompt=f"a photo of {phrase(i.claim)}") for i in items]
    figure = judged(ask, items, texts, batch_size)
    groups = [i.prompt for i in items]
    by = lambda keys, values: grouped(keys, values, groups)  # noqa: E731
    tasks, wordings = [i.task for i in items], [i.question.wording for i in items]
    answers = np.array([i.question.answer for i in items])
    return {
        "questions": len(items),
        "overall": asdict(macro_mean(split(tasks, right), split(tasks, groups))),
        "tasks": by(tasks, right),
        "wordings": by(wordings, right),
        "figure": asdict(macro_mean(split(tasks, figure), split(tasks, groups))),
        "figure_tasks": by(tasks, figure),
        **{a: float(right[answers == a].mean()) for a in ("yes", "no")},
    }


def judged(ask: Ask, items: Sequence[Item], texts: Sequence[str], batch_size: int) -> np.ndarray:
    """Whether each answer is right ``(n,)``."""
    said = []
    for start in range(0, len(items), batch_size):
        part = [Image.fromarray(i.image) for i in items[start : start + batch_size]]
        said += (ask(part, texts[start : start + batch_size]) > 0.5).tolist()
    return np.array([(i.question.answer == "yes") == s for i, s in zip(items, said, strict=True)])


def split(keys: Sequence[str], values: Sequence[Any] | np.ndarray) -> dict[str, list[Any]]:
    """Values by key."""
    return {
        k: [v for v, key in zip(values, keys, strict=True) if key == k] for k in sorted({*keys})
    }


def grouped(
    keys: Sequence[str], values: np.ndarray, groups: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Mean and interval by key; keys with one prompt only are left out."""
    named = split(keys, groups)
    return {
        k: asdict(bootstrap_mean(v, named[k]))
        for k, v in split(keys, values).items()
        if len(set(named[k])) > 1
    }


def figures(folder: Path, pairs: Path | None = None) -> dict[str, Any]:
    """What the card says of a trained model.

    Args:
        folder: of the model.
        pairs: parquet of scenes pairs on held-out prompts, to compare orders on.
    """
    from t2i_align.evaluate.pair_accuracy import pair_accuracy
    from t2i_align.judges.vqa_score import VQAScore, VQAScoreOptions

    judge = VQAScore(folder, VQAScoreOptions(), torch.device("cpu"), torch.float32)
    found = {
        "held_out": vqa_accuracy(judge.ask),
        "training": vqa_accuracy(judge.ask, held_out=False),
    }
    return found if pairs is None else found | {"pair_accuracy": pair_accuracy(judge, pairs)}


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m t2i_align.scenes.vlm_report FOLDER [PAIRS.parquet]")
    print(json.dumps(figures(*map(Path, sys.argv[1:])), indent=1))
