"""DSG-1k: files, pictures and answers; the rules are in metrics/dsg.py.

Tasks are the eight categories of prompts; the total is the mean over all prompts. Scores are in
percent, as the published table's. Tables beside: what the graph changes, and the share of yes by
kind of question, before looking at parents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.metrics import dsg as rules
from t2i_align.evaluate.metrics.question_graph import (
    GraphItem,
    Variant,
    propositions_of,
    read_graphs,
)
from t2i_align.evaluate.pictures import read_picture
from t2i_align.evaluate.prompt_files import PromptFile, find
from t2i_align.evaluate.question_files import folder_name
from t2i_align.evaluate.questions import Answerer, AskOptions, answerer
from t2i_align.evaluate.results import interval
from t2i_align.options import Options

NAME = "dsg"
WITHOUT = "without the graph"


class DSGOptions(AskOptions):
    """Question file, judge, rules."""

    prompts: str | None = Field(None, description="dsg-1k-anns.csv; null: in the usual place")
    variant: Variant = Field("official", description="official keeps the released loader's quirks")
    images_per_prompt: int = Field(1, ge=1, description="pictures of each prompt")


class DSG:
    """DSG-1k by plug-in judges."""

    Options: ClassVar[type[Options]] = DSGOptions

    def __init__(self, options: DSGOptions, device: str = "cpu") -> None:
        """Load nothing yet."""
        self.options, self.device = options, device

    @property
    def images_per_prompt(self) -> int:
        """One in the published table."""
        return self.options.images_per_prompt

    @cached_property
    def file(self) -> PromptFile:
        """The question file."""
        return find(NAME, self.options.prompts)

    @cached_property
    def graphs(self) -> list[GraphItem]:
        """Prompts with their questions."""
        return read_graphs(self.file.text(), str(self.file.path))

    @cached_property
    def judge(self) -> Answerer:
        """Who answers."""
        return answerer(self.options, NAME, "yes_no", self.device)

    def items(self) -> list[Item]:
        """All prompts in the file's order."""
        return [
            Item(folder_name(g.id, NAME), g.text, rules.category_of(g.id), g.metadata())
            for g in self.graphs
        ]

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """``{"answers": {question: {text, p}}}``."""
        asked, places = [], []
        found: list[Answer] = [{"answers": {}} for _ in pictures]
        for picture, answer in zip(pictures, found, strict=True):
            image = read_picture(picture.file)
            for p in propositions_of(picture.item.metadata):
                asked.append((image, p.question))
                places.append((answer["answers"], str(p.id)))
        for (cell, name), reply in zip(places, self.judge.ask(asked), strict=True):
            cell[name] = reply
        return found

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """Percent of answered questions that hold; an unanswered picture is 0, as released."""
        return [self._verdict(p, a) for p, a in zip(pictures, answers, strict=True)]

    def _verdict(self, picture: Picture, answer: Answer) -> Verdict:
        asked = propositions_of(picture.item.metadata)
        try:
            texts = {int(q): str(r["text"]) for q, r in answer["answers"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{picture.item.id}: no answers of DSG: {error!r}") from error
        odd = sorted(set(texts) - {p.id for p in asked})
        if odd:
            raise DataError(f"{picture.item.id}: answers to questions {odd} that nobody asked")
        variant = self.options.variant
        raw, after = rules.question_scores(texts, rules.dependencies(asked, variant), variant)
        reason = "\n".join(f"no: {p.question}" for p in asked if after.get(p.id, 0.0) < 1)
        parts = {str(q): v for q, v in raw.items()}
        parts[WITHOUT] = 100 * rules.item_score(raw)
        return Verdict(100 * rules.item_score(after), None, reason, parts)

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Means by category and over all prompts."""
        tasks: dict[str, list[float]] = {}
        kinds: dict[str, list[float]] = {}
        for picture, verdict in zip(pictures, verdicts, strict=True):
            tasks.setdefault(picture.item.task, []).append(verdict.score)
            for p in propositions_of(picture.item.metadata):
                if str(p.id) in verdict.parts:
                    kinds.setdefault(p.detailed, []).append(100 * verdict.parts[str(p.id)])
        overall = interval({"": [v.score for v in verdicts]}, {"": [p.item.id for p in pictures]})
        without = sum(v.parts[WITHOUT] for v in verdicts) / len(verdicts)
        tables = {
            "graph": {"with the graph": overall.mean, WITHOUT: without},
            "questions": {k: sum(v) / len(v) for k, v in sorted(kinds.items())},
        }
        return Summary({k: sum(v) / len(v) for k, v in tasks.items()}, overall, tables)

    def identity(self) -> Mapping[str, Any]:
        """File, rules and judge."""
        return {
            **self.file.identity(),
            "variant": self.options.variant,
            **self.judge.identity(),
        }
