"""The embedded world under GenEval's six tasks and rules, judged exactly, on held-out prompts.

One picture an item: a task with fewer held-out prompts than ``per_task`` repeats them with other
noise. Beside the verdict every picture has a graded score in [0, 1] (scenes/score.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.geneval import evaluate
from t2i_align.evaluate.pictures import read_picture
from t2i_align.evaluate.results import GRADED, interval
from t2i_align.options import Options

if TYPE_CHECKING:
    from t2i_align.scenes.detect import Part


class ScenesOptions(Options):
    """Which prompts."""

    per_task: int = Field(default=100, ge=2, description="pictures of each of the six tasks")
    prompt_seed: int = Field(default=0, ge=0, description="which prompts of a side come first")
    held_out: bool = Field(
        default=True, description="held-out combinations; false: the training side's prompts"
    )


class Scenes:
    """GenEval's six tasks on the embedded world, judged exactly."""

    Options: ClassVar[type[Options]] = ScenesOptions

    def __init__(self, options: ScenesOptions, device: str = "cpu") -> None:
        """Load nothing.

        Args:
            options: which prompts.
            device: not used, the judge is not a network.
        """
        self.options = options

    @property
    def images_per_prompt(self) -> int:
        """One: further pictures of a prompt are items of their own."""
        return 1

    @cached_property
    def metadata(self) -> list[dict[str, Any]]:
        """Of every item, in order."""
        from t2i_align.scenes.grammar import fixed_prompts

        o = self.options
        return [m for m, _ in fixed_prompts(o.per_task, o.prompt_seed, held_out=o.held_out)]

    def items(self) -> list[Item]:
        """All prompts, those of a task together."""
        return [
            Item(f"{number:05d}", m["prompt"], m["tag"], m)
            for number, m in enumerate(self.metadata)
        ]

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """Every part of each picture with its detection and how well it fits."""
        from t2i_align.scenes.detect import detect

        return [answer_of(detect(read_picture(p.file))) for p in pictures]

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """GenEval's verdict and the graded score of each picture."""
        from t2i_align.scenes.score import graded_score

        found = []
        for picture, answer in zip(pictures, answers, strict=True):
            parts, metadata = parts_of(answer), dict(picture.item.metadata)
            verdict = evaluate([p.detection for p in parts], None, metadata)
            graded = {GRADED: graded_score(parts, metadata)}
            reason = "\n".join(verdict.reasons)
            found.append(Verdict(float(verdict.correct), verdict.correct, reason, graded))
        return found

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Share of right pictures by task, and the plain mean of those."""
        values: dict[str, list[float]] = {}
        groups: dict[str, list[str]] = {}
        for picture, verdict in zip(pictures, verdicts, strict=True):
            values.setdefault(picture.item.task, []).append(verdict.score)
            groups.setdefault(picture.item.task, []).append(picture.item.prompt)
        tasks = {task: sum(v) / len(v) for task, v in values.items()}
        return Summary(tasks, interval(values, groups))

    def identity(self) -> Mapping[str, Any]:
        """The options and a hash of the prompts they choose."""
        text = "\n".join(json.dumps(m, sort_keys=True) for m in self.metadata)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        return self.options.model_dump() | {"prompts_sha256": sha256}


def answer_of(parts: Sequence[Part]) -> Answer:
    """Parts as plain data."""
    rest = [{"overlap": p.overlap, "graded": p.graded, "accepted": p.accepted} for p in parts]
    facts = [{k: v.item() if hasattr(v, "item") else v for k, v in r.items()} for r in rest]
    return {"detections": [p.detection.to_dict() for p in parts], "parts": facts}


def parts_of(answer: Answer) -> list[Part]:
    """Parts from plain data.

    Raises:
        DataError: they are not as :func:`answer_of` writes them.
    """
    from t2i_align.scenes.detect import Part

    try:
        return [
            Part(
                Detection.from_dict(d), float(p["overlap"]), float(p["graded"]), bool(p["accepted"])
            )
            for d, p in zip(answer["detections"], answer["parts"], strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"an answer of the scenes holds detections and parts: {error}") from error
