"""Finished evaluations of the scenes from pictures that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_align.evaluate.answers import Stored, key_of
from t2i_align.evaluate.pictures import save
from t2i_align.evaluate.run import finish
from t2i_align.evaluate.sampling import defaults
from t2i_align.evaluate.work import Job, Worker

Metadata = dict[str, Any]


def protocol_of(per_task: int) -> dict[str, Any]:
    """How such an evaluation was made."""
    made = {"benchmark": "scenes", "per_task": per_task, "prompt_seed": 0, "held_out": True}
    return made | defaults("scenes").protocol()


def worker_of(out: Path, per_task: int) -> Worker:
    """Knows the prompts and judges the pictures of an evaluation."""
    return Worker(Job("scenes", {"per_task": per_task}, out / "images"))


def picture_path(out: Path, number: int) -> Path:
    """The file of a picture by position."""
    return out / "images" / f"{number:05d}" / "samples" / "0000.png"


def evaluation(
    out: Path,
    per_task: int,
    draw: Callable[[int, Metadata], Image.Image],
    facts: dict[str, Any] | None = None,
) -> list[Metadata]:
    """Pictures, verdicts and summary of them; returns the result rows."""
    worker = worker_of(out, per_task)
    for number, picture in enumerate(worker.pictures):
        save(draw(number, dict(picture.item.metadata)), picture)
    known = {"protocol": protocol_of(per_task), **(facts or {"model": "truth"})}
    (out / "protocol.json").write_text(json.dumps(known))
    answers = worker.answer(range(len(worker.pictures)))
    answered = {key_of(p): Stored(a) for p, a in zip(worker.pictures, answers, strict=True)}
    finish(worker, answered, known, out)
    return [json.loads(x) for x in (out / "results.jsonl").read_text().splitlines()]
