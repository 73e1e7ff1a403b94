"""TIFA v1.0: files, pictures and answers; the rules are in metrics/tifa.py.

``prompts`` is the released list of questions, ``tifa_v1.0_question_answers.json``, whose entries
hold ``id, caption, question, choices, answer, element_type``. Stored of a question: the free answer
and the nearest choice, so both variants can be told from one file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from pydantic import Field

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.metrics import tifa as rules
from t2i_align.evaluate.metrics.question_graph import Variant
from t2i_align.evaluate.pictures import read_picture
from t2i_align.evaluate.prompt_files import PromptFile
from t2i_align.evaluate.question_files import find_supplied, folder_name
from t2i_align.evaluate.questions import Answerer, AskOptions, answerer
from t2i_align.evaluate.results import interval
from t2i_align.evaluate.sentences import Sentences
from t2i_align.options import Options

NAME = "tifa"
FIELDS = ("id", "caption", "question", "choices", "answer", "element_type")
EXACT = "exact"


class TIFAOptions(AskOptions):
    """Question file, judge, rules."""

    prompts: str | None = Field(
        None, description="tifa_v1.0_question_answers.json; null: in the usual place"
    )
    variant: Variant = Field("official", description="fixed: case does not matter, no repeats")
    images_per_prompt: int = Field(1, ge=1, description="pictures of each prompt")
    matcher: str = Field(
        "sentence-transformers/all-mpnet-base-v2",
        description="folder or hub id of the text encoder that finds the nearest choice; exact: "
        "an answer that is no choice is wrong",
    )
    matcher_revision: str | None = Field(None, description="commit of a hub id")


class TIFA:
    """TIFA by plug-in judges."""

    Options: ClassVar[type[Options]] = TIFAOptions

    def __init__(self, options: TIFAOptions, device: str = "cpu") -> None:
        """Load nothing yet."""
        self.options, self.device = options, device

    @property
    def images_per_prompt(self) -> int:
        """One, as released."""
        return self.options.images_per_prompt

    @cached_property
    def file(self) -> PromptFile:
        """The question file."""
        return find_supplied(NAME, self.options.prompts)

    @cached_property
    def judge(self) -> Answerer:
        """Who answers."""
        return answerer(self.options, NAME, "text", self.device)

    @cached_property
    def matcher(self) -> Sentences | None:
        """What finds the nearest choice."""
        o = self.options
        found = Sentences(o.matcher, o.matcher_revision, self.device)
        return None if o.matcher == EXACT else found

    def items(self) -> list[Item]:
        """All texts in the order in which they come; a task is where a text comes from."""
        return read_items(self.file)

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """``{"answers": [{text, nearest}]}``, in the order of the text's questions."""
        asked = []
        for picture in pictures:
            image = read_picture(picture.file)
            asked += [(image, q["question"]) for q in picture.item.metadata["questions"]]
        replies = iter(self.judge.ask(asked))
        return [
            {"answers": [self._answer(next(replies), q) for q in p.item.metadata["questions"]]}
            for p in pictures
        ]

    def _answer(self, reply: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:
        text, choices = reply["text"], question["choices"]
        if text in choices or self.matcher is None:
            return dict(reply)
        return dict(reply) | {"nearest": self.matcher.nearest(text, choices)}

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """Share of right answers; parts are 0 or 1 by the question's position."""
        return [self._verdict(p, a) for p, a in zip(pictures, answers, strict=True)]

    def _verdict(self, picture: Picture, answer: Answer) -> Verdict:
        questions, variant = picture.item.metadata["questions"], self.options.variant
        replies = answer.get("answers")
        if not isinstance(replies, list) or len(replies) != len(questions):
            raise DataError(f"{picture.item.id}: {len(questions)} questions need as many answers")
        parts, wrong = {}, []
        for k in rules.counted(questions, variant):
            question, reply = questions[k], replies[k]
            said = rules.chosen(reply["text"], reply.get("nearest"), question["choices"], variant)
            parts[str(k)] = float(said == question["answer"])
            if said != question["answer"]:
                wrong.append(f"{question['question']} {reply['text']}")
        return Verdict(sum(parts.values()) / len(parts), None, "\n".join(wrong), parts)

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Means by source and over all; tables by type of element, and the deviation."""
        tasks: dict[str, list[float]] = {}
        types: dict[str, list[float]] = {}
        for picture, verdict in zip(pictures, verdicts, strict=True):
            tasks.setdefault(picture.item.task, []).append(verdict.score)
            for k, value in verdict.parts.items():
                name = picture.item.metadata["questions"][int(k)]["element_type"]
                types.setdefault(name, []).append(value)
        scores = [v.score for v in verdicts]
        overall = interval({"": scores}, {"": [p.item.id for p in pictures]})
        tables = {"types": {k: sum(v) / len(v) for k, v in types.items()}}
        spread = rules.deviation(scores)
        tables |= {} if spread is None else {"deviation": {"over texts": spread}}
        return Summary({k: sum(v) / len(v) for k, v in tasks.items()}, overall, tables)

    def identity(self) -> Mapping[str, Any]:
        """File, rules, judge and what finds the nearest choice."""
        return {
            **self.file.identity(),
            "variant": self.options.variant,
            "matcher": self.options.matcher,
            "matcher_sha256": None if self.matcher is None else self.matcher.weights_sha256,
            **self.judge.identity(),
        }


def read_items(file: PromptFile) -> list[Item]:
    """The texts of a question file.

    Raises:
        DataError: it is no list of such entries, or a right answer is no choice.
    """
    try:
        rows = json.loads(file.text())
        found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            lacking = [f for f in FIELDS if f not in row]
            if lacking:
                raise DataError(f"{file.path}: an entry lacks {', '.join(lacking)}")
            found.setdefault(str(row["id"]), []).append({f: row[f] for f in FIELDS})
    except (ValueError, TypeError) as error:
        raise DataError(f"{file.path} is no list of TIFA's questions: {error}") from error
    if not found:
        raise DataError(f"{file.path} holds no question")
    return [_item(name, questions, file) for name, questions in found.items()]


def _item(name: str, questions: list[dict[str, Any]], file: PromptFile) -> Item:
    where = f"{file.path}, {name}"
    for question in questions:
        if not isinstance(question["choices"], list) or not question["choices"]:
            raise DataError(f"{where}: {question['question']!r} has no choices")
    plain = [{k: v for k, v in q.items() if k not in ("id", "caption")} for q in questions]
    task = name.split("_")[0]
    return Item(folder_name(name, where), questions[0]["caption"], task, {"questions": plain})
