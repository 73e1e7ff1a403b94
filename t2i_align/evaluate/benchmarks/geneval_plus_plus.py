"""GenEval++: prompts that join counts, colours, places and sizes, judged by a language model.

280 prompts, 7 tags of 40, one picture each (yejy53/Echo-4o). The released script asks GPT-4.1 with
temperature 0 for a JSON object {correct, reason} under strict instructions (every expectation met,
like a photograph, no collage), three times at most, and counts no answer as wrong. The overall is
the mean of the tags' accuracies; the table ``plain`` has the accuracy over all pictures.

Here any image-text-to-text model is the judge, greedy, with instructions of our own that ask for
the same. So the numbers compare among models under one judge, not with the published ones; a greedy
answer does not change when it is asked for again, so it is asked once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.pictures import read_picture
from t2i_align.evaluate.prompt_files import PromptFile, find
from t2i_align.evaluate.results import interval
from t2i_align.judges.vlm_common import VLMOptions, capped, talk
from t2i_align.judges.vlm_model import VisionLanguage, load_vlm
from t2i_align.options import Options

NAME = "geneval_plus_plus"
TEMPLATE = """You check strictly whether a picture shows what was asked for.
The prompt was: {prompt}
Expected, each with its number, colour, place and size where given: {clauses}
Answer "correct": true only if every expectation is met exactly, nothing is missing or too many,
and the picture is one coherent, photo-like scene, not a collage of separate pictures.
Answer with one JSON object and nothing else: {"correct": true or false, "reason": "short"}"""


class GenEvalPlusPlusOptions(VLMOptions):
    """Prompts and judge."""

    prompts: str | None = Field(
        default=None, description="file of prompts; null: the published one"
    )
    template: str = Field(
        default=TEMPLATE, description="the question; holds {prompt} and {clauses} once"
    )
    max_new_tokens: int = Field(default=200, ge=1, description="of an answer")


class GenEvalPlusPlus:
    """GenEval++ by an offline vision-language judge."""

    Options: ClassVar[type[Options]] = GenEvalPlusPlusOptions

    def __init__(self, options: GenEvalPlusPlusOptions, device: str = "cpu") -> None:
        """Load nothing yet.

        Raises:
            DataError: the template lacks a field, or repeats one.
        """
        wrong = [f for f in ("{prompt}", "{clauses}") if options.template.count(f) != 1]
        if wrong:
            raise DataError(f"template holds {', '.join(wrong)} exactly once")
        self.options, self.device = options, device

    @property
    def images_per_prompt(self) -> int:
        """One in the protocol."""
        return 1

    @cached_property
    def prompts(self) -> PromptFile:
        """The file of prompts."""
        return find(NAME, self.options.prompts)

    @cached_property
    def judge(self) -> VisionLanguage:
        """The model that is asked."""
        if self.options.name_or_path is None:
            raise DataError(
                f"{NAME} needs a judge", "--set name_or_path=FOLDER or hub id of a model"
            )
        return load_vlm(self.options, Path(NAME), torch.device(self.device), self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.startswith("cuda") else torch.float32

    def items(self) -> list[Item]:
        """A line a prompt; ids are line numbers from 0.

        Raises:
            DataError: a line is no JSON object with a prompt and a tag.
        """
        found = []
        for number, line in enumerate(self.prompts.text().splitlines()):
            try:
                metadata = json.loads(line)
                found.append(Item(f"{number:05d}", metadata["prompt"], metadata["tag"], metadata))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.prompts.path}:{number + 1} is no prompt") from error
        return found

    def question(self, item: Item) -> str:
        """What the judge is asked of a prompt's picture."""
        clauses = json.dumps(item.metadata.get("include", []))
        asked = self.options.template.replace("{clauses}", clauses)
        return asked.replace("{prompt}", item.prompt)

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """The judge's text about each picture."""
        found: list[Answer] = []
        for start in range(0, len(pictures), self.options.batch_size):
            part = pictures[start : start + self.options.batch_size]
            images = [capped(read_picture(p.file), self.options.max_pixels) for p in part]
            for picture in part:
                self.judge.check(picture.item.prompt)
            talks = [talk([i], self.question(p.item)) for i, p in zip(images, part, strict=True)]
            texts = self.judge.texts(talks, self.options.max_new_tokens)
            found += [{"text": text} for text in texts]
        return found

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """What the texts say; one that says nothing is wrong and counted as unread."""
        return [verdict_of(answer.get("text")) for answer in answers]

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Accuracy by tag and its plain mean."""
        values: dict[str, list[float]] = {}
        groups: dict[str, list[str]] = {}
        for picture, verdict in zip(pictures, verdicts, strict=True):
            values.setdefault(picture.item.task, []).append(verdict.score)
            groups.setdefault(picture.item.task, []).append(picture.item.id)
        tasks = {task: sum(v) / len(v) for task, v in values.items()}
        plain = sum(v.score for v in verdicts) / len(verdicts)
        unread = sum(v.parts["unread"] for v in verdicts)
        table = {"accuracy over all pictures": plain, "answers that say nothing": unread}
        return Summary(tasks, interval(values, groups), {"plain": table})

    def identity(self) -> Mapping[str, Any]:
        """Prompts, the judge, its weights and its question."""
        return {
            **self.prompts.identity(),
            "judge": self.options.name_or_path,
            "judge_sha256": self.judge.weights_sha256,
            "template": self.options.template,
            "max_pixels": self.options.max_pixels,
            "max_new_tokens": self.options.max_new_tokens,
        }


def verdict_of(text: Any) -> Verdict:
    """The verdict in an answer: the first JSON object with ``correct``, true or false, 1 or 0."""
    for found in re.finditer(r"\{[^{}]*\}", text if isinstance(text, str) else ""):
        try:
            said = json.loads(found[0])
        except ValueError:
            continue
        correct = said.get("correct")
        if isinstance(correct, str) and correct.strip().lower() in ("true", "false"):
            correct = correct.strip().lower() == "true"
        if correct in (0, 1):
            right = bool(correct)
            reason = "" if right else str(said.get("reason", ""))
            return Verdict(float(right), right, reason, {"unread": 0.0})
    return Verdict(0.0, False, "no verdict in the judge's answer", {"unread": 1.0})
