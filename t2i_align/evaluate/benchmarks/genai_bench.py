"""GenAI-Bench: prompts by skill, scored by a judge; the rules are in metrics/genai.py.

``prompts`` is ``genai_image.json`` and ``skills`` the ``genai_skills.json`` beside it. The judge is
any card of reward_models; ``vqascore`` asks a model of today, the released numbers are
CLIP-FlanT5-XXL's. People's ratings of six models stand beside ours, skill by skill.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from t2i_align.contract import Media
from t2i_align.errors import DataError
from t2i_align.evaluate.answers import file_sha256
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.human_layouts import rated_prompts
from t2i_align.evaluate.metrics import genai as rules
from t2i_align.evaluate.prompt_files import PromptFile, find
from t2i_align.evaluate.question_files import folder_name
from t2i_align.evaluate.results import interval
from t2i_align.judges.base import Judge, load
from t2i_align.judges.facts import facts_of
from t2i_align.options import Options

SKILLS = "genai_skills.json"


class GenAIBenchOptions(Options):
    """Prompts, skills, judge."""

    prompts: str | None = Field(None, description="genai_image.json; null: in the usual place")
    skills: str | None = Field(None, description="genai_skills.json; null: beside the prompts")
    judge: str = Field("vqascore", description="card of the judge, see `t2i-align ls judges`")
    batch_size: int = Field(32, ge=1, description="pictures given to the judge at once")


class GenAIBench:
    """The 1,600 prompts."""

    Options: ClassVar[type[Options]] = GenAIBenchOptions
    name: ClassVar[str] = "genai_bench"

    def __init__(self, options: GenAIBenchOptions, device: str = "cpu") -> None:
        """Load nothing yet."""
        self.options, self.device = options, device

    @property
    def images_per_prompt(self) -> int:
        """One."""
        return 1

    @cached_property
    def file(self) -> PromptFile:
        """The prompts."""
        return find(self.name, self.options.prompts)

    @cached_property
    def table(self) -> dict[str, Any]:
        """Prompts and ratings by id."""
        return rated_prompts(self.file.path)

    @cached_property
    def skills_file(self) -> Path:
        """The skills.

        Raises:
            DataError: they are not there.
        """
        given = self.options.skills
        path = Path(given).expanduser() if given else self.file.path.with_name(SKILLS)
        if not path.is_file():
            raise DataError(
                f"the skills of the prompts are not at {path}",
                f"run `t2i-align eval fetch {self.name}`, or name the file with --set skills=PATH",
            )
        return path

    @cached_property
    def skills(self) -> dict[str, list[int]]:
        """Numbers of the prompts of each skill."""
        try:
            table = json.loads(self.skills_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{self.skills_file} is no JSON: {error}") from error
        return rules.read_skills(table, list(self.table), str(self.skills_file))

    @cached_property
    def judge(self) -> Judge:
        """Who scores, in bfloat16 on a GPU."""
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        return load(self.options.judge, self.device, dtype)

    def items(self) -> list[Item]:
        """All prompts; the task is basic or advanced, or both or neither of them."""
        levels = {level: set(self.skills[level]) for level in ("basic", "advanced")}
        found = []
        for name, row in self.table.items():
            number = int(name)
            named = [level for level, numbers in levels.items() if number in numbers]
            own = [skill for skill, numbers in self.skills.items() if number in numbers]
            task = " and ".join(named) or "neither"
            found.append(Item(folder_name(name, self.name), row["prompt"], task, {"skills": own}))
        return found

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """``{"score": number}``.

        Raises:
            DataError: the judge has no number for a picture; says why.
        """
        found: list[Answer] = []
        for start in range(0, len(pictures), self.options.batch_size):
            part = pictures[start : start + self.options.batch_size]
            media = [Media("image", p.file.read_bytes()) for p in part]
            scores = self.judge.score(media, [p.item.prompt for p in part])
            for picture, value, why in zip(part, scores.values, scores.reasons, strict=True):
                if not math.isfinite(float(value)):
                    raise DataError(f"{picture.file}: {self.options.judge} cannot score it: {why}")
                found.append({"score": float(value)})
        return found

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """The judge's number."""
        found = []
        for picture, answer in zip(pictures, answers, strict=True):
            value = answer.get("score")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise DataError(f"{picture.item.id}: an answer holds a score, got {answer!r}")
            found.append(Verdict(float(value)))
        return found

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Tasks basic and advanced; tables of all skills, ours and people's of six models."""
        pairs = list(zip(pictures, verdicts, strict=True))
        values = {int(p.item.id): v.score for p, v in pairs}
        skills: dict[str, list[int]] = {}
        for picture in pictures:
            for skill in picture.item.metadata["skills"]:
                skills.setdefault(skill, []).append(int(picture.item.id))
        ordered = {s: skills[s] for s in (*rules.BASIC, *rules.ADVANCED) if s in skills}
        means = rules.skill_means(values, ordered | skills)
        kept = [(p, v) for p, v in pairs if p.item.metadata["skills"]]
        overall = interval({"": [v.score for _, v in kept]}, {"": [p.item.id for p, _ in kept]})
        tasks = {level: means[level] for level in ("basic", "advanced") if level in means}
        human = rules.human_means(self.table, self.skills)
        tables = {f"people on {model}": means_of for model, means_of in human.items()}
        return Summary(tasks, overall, {"skills": means} | tables)

    def identity(self) -> Mapping[str, Any]:
        """Files and judge."""
        facts = facts_of(self.options.judge, self.judge)
        return {
            **self.file.identity(),
            "skills_sha256": file_sha256(self.skills_file),
            "judge": self.options.judge,
            "judge_version": facts.version,
            "judge_sha256": facts.weights_sha256,
            "judge_options": dict(facts.options),
            "judge_digest": facts.digest,
        }


class GenAIBench527(GenAIBench):
    """The 527 prompts of the VQAScore paper."""

    name: ClassVar[str] = "genai_bench_527"
