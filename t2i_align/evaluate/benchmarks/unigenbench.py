"""UniGenBench: a vision-language judge marks test points; rules are in metrics/unigenbench.py.

Asked in one of two ways: ``marks``, one answer with an analysis and a mark of every test point, as
the released scripts ask their judges (Gemini 2.5 Pro, or Qwen2.5-VL-72B offline); ``each``, one
yes-or-no question a test point, read as P(yes), which small models can answer too. The wording is
ours, so numbers compare among runs here and not with the released tables; ``template`` may name a
file with another wording.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.metrics import unigenbench as rules
from t2i_align.evaluate.metrics.question_graph import Variant
from t2i_align.evaluate.pictures import read_picture
from t2i_align.evaluate.prompt_files import PromptFile, find
from t2i_align.evaluate.question_files import folder_name
from t2i_align.evaluate.questions import Answerer, AskOptions, answerer
from t2i_align.evaluate.results import interval
from t2i_align.judges.vlm_common import VLMOptions
from t2i_align.options import Options

UNREAD = "unread"
MARKS = """You check a picture against the prompt it was made from. Trust only what can be seen.
Prompt: {prompt}
Test points, in order:
{points}
For every test point say in one sentence what the picture shows of it, then mark it: 1 if the
picture does what the prompt asks there, 0 if not or if you cannot tell.
Answer with two lists in the order of the test points, one entry a test point, and nothing else:
<analysis>["...", "..."]</analysis>
<score>[1, 0]</score>"""
EACH = (
    'The picture was made from the prompt "{prompt}". Look at one thing only: {meaning}. Does the '
    "picture show this part of the prompt: {description}? Please answer yes or no."
)


class UniGenBenchOptions(VLMOptions):
    """Prompts, judge, how it is asked."""

    prompts: str | None = Field(None, description="test_prompts_en.csv; null: the published one")
    images_per_prompt: int = Field(4, ge=1, description="pictures of each prompt")
    ask: Literal["marks", "each"] = Field(
        "marks", description="all test points in one answer, or a yes-or-no question each"
    )
    variant: Variant = Field(
        "official", description="unread answers are left out (official) or count as 0 (fixed)"
    )
    template: str | None = Field(
        None, description="file with the wording of marks, {prompt} and {points} in it once each"
    )
    max_new_tokens: int = Field(2048, ge=1, description="of an answer with marks")


class UniGenBench:
    """The 600 English prompts, short."""

    Options: ClassVar[type[Options]] = UniGenBenchOptions
    name: ClassVar[str] = "unigenbench"

    def __init__(self, options: UniGenBenchOptions, device: str = "cpu") -> None:
        """Load nothing yet."""
        self.options, self.device = options, device

    @property
    def images_per_prompt(self) -> int:
        """Four in the protocol."""
        return self.options.images_per_prompt

    @cached_property
    def file(self) -> PromptFile:
        """The prompts."""
        return find(self.name, self.options.prompts)

    @cached_property
    def template(self) -> str:
        """The wording of marks.

        Raises:
            DataError: no such file, or a field is missing or repeated.
        """
        if self.options.template is None:
            return MARKS
        try:
            text = Path(self.options.template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DataError(f"template: cannot read {self.options.template}: {error}") from error
        wrong = [f for f in ("{prompt}", "{points}") if text.count(f) != 1]
        if wrong:
            raise DataError(f"template holds {', '.join(wrong)} exactly once")
        return text

    @cached_property
    def judge(self) -> Answerer:
        """Who answers."""
        o = self.options
        reading = "text" if o.ask == "marks" else "yes_no"
        asking = AskOptions(
            name_or_path=o.name_or_path,
            revision=o.revision,
            max_pixels=o.max_pixels,
            batch_size=o.batch_size,
            reading=reading,
            template="{question}",
            max_new_tokens=o.max_new_tokens,
        )
        return answerer(asking, self.name, reading, self.device)

    def items(self) -> list[Item]:
        """All prompts; the task is the category of the prompt."""
        return read_items(self.file)

    def question(self, item: Item) -> str:
        """What a judge is asked for marks."""
        points = zip(item.metadata["points"], item.metadata["descriptions"], strict=True)
        lines = [f"- {p} ({rules.meaning_of(p)}): {d}" for p, d in points]
        # One pass over the template, so that a prompt with braces stays as it is.
        head, _, tail = self.template.partition("{prompt}")
        head, tail = (part.replace("{points}", "\n".join(lines)) for part in (head, tail))
        return head + item.prompt + tail

    def questions(self, item: Item) -> list[str]:
        """What a judge is asked of each test point."""
        points = zip(item.metadata["points"], item.metadata["descriptions"], strict=True)
        return [
            EACH.format(prompt=item.prompt, meaning=rules.meaning_of(p), description=d)
            for p, d in points
        ]

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """``{"text": ...}`` or ``{"points": [{text, p}]}``."""
        images = [read_picture(p.file) for p in pictures]
        both = list(zip(images, pictures, strict=True))
        if self.options.ask == "marks":
            replies = self.judge.ask([(i, self.question(p.item)) for i, p in both])
            return [dict(reply) for reply in replies]
        asked = [(i, q) for i, p in both for q in self.questions(p.item)]
        found = iter(self.judge.ask(asked))
        return [{"points": [next(found) for _ in p.item.metadata["points"]]} for p in pictures]

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """Percent of test points that are met; parts are 0 or 1 by position."""
        return [self._verdict(p, a) for p, a in zip(pictures, answers, strict=True)]

    def _verdict(self, picture: Picture, answer: Answer) -> Verdict:
        points = picture.item.metadata["points"]
        marks = marks_of(answer, len(points))
        if marks is None:
            fixed = self.options.variant == "fixed"
            zeros = {str(k): 0.0 for k in range(len(points))} if fixed else {}
            return Verdict(0.0, None, "the judge's answer has no marks", zeros | {UNREAD: 1.0})
        reason = "\n".join(f"no: {p}" for p, m in zip(points, marks, strict=True) if not m)
        parts = {str(k): float(m) for k, m in enumerate(marks)}
        return Verdict(100 * sum(marks) / len(marks), None, reason, parts | {UNREAD: 0.0})

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Tasks are the primary dimensions, the total their plain mean.

        Raises:
            DataError: no answer could be read.
        """
        read: list[tuple[Sequence[str], Sequence[int]]] = []
        values: dict[str, list[float]] = {}
        groups: dict[str, list[str]] = {}
        for picture, verdict in zip(pictures, verdicts, strict=True):
            points = picture.item.metadata["points"]
            if str(len(points) - 1) not in verdict.parts:
                continue
            marks = [int(verdict.parts[str(k)]) for k in range(len(points))]
            read.append((points, marks))
            for point, mark in zip(points, marks, strict=True):
                values.setdefault(rules.primary_of(point), []).append(100.0 * mark)
                groups.setdefault(rules.primary_of(point), []).append(picture.item.id)
        if not read:
            raise DataError("no answer of the judge has marks", "use --set ask=each")
        primary, fine = rules.dimensions(read)
        counts = {"answers": float(len(verdicts)), UNREAD: sum(v.parts[UNREAD] for v in verdicts)}
        tables = {"test points": {p: m.percent for p, m in fine.items()}, "answers": counts}
        tasks = {name: marks.percent for name, marks in primary.items()}
        return Summary(tasks, interval(values, groups), tables)

    def identity(self) -> Mapping[str, Any]:
        """File, rules, wording and judge."""
        wording = self.template if self.options.ask == "marks" else EACH
        return {
            **self.file.identity(),
            "variant": self.options.variant,
            "ask": self.options.ask,
            **self.judge.identity(),
            "template": wording,
        }


class UniGenBenchLong(UniGenBench):
    """The same with long prompts."""

    name: ClassVar[str] = "unigenbench_long"


def marks_of(answer: Answer, num_points: int) -> list[int] | None:
    """The marks in a stored answer; None where it has none.

    Raises:
        DataError: it is no answer of this benchmark, or has another number of test points.
    """
    if isinstance(answer.get("text"), str):
        return rules.read_marks(answer["text"], num_points)
    replies = answer.get("points")
    if not isinstance(replies, list) or len(replies) != num_points:
        raise DataError(f"an answer holds a text or {num_points} points, got {sorted(answer)}")
    return [int(reply["text"] == "yes") for reply in replies]


def read_facts(text: str) -> dict[str, Any]:
    """The JSON object of a prompt.

    In the long file's row 509 a comma between two test points is missing, and the released script
    stops there. Where a cell is no JSON, a comma is put between texts that stand side by side.

    Raises:
        ValueError: it is no JSON then either.
    """
    try:
        return json.loads(text)
    except ValueError:
        return json.loads(re.sub(r'"[ \t]+"', '", "', text))


def read_items(file: PromptFile) -> list[Item]:
    """The prompts of a file with ``index, prompt_en, sub_dims_en``.

    Raises:
        DataError: a column is missing, a row cannot be read, or a test point is unknown.
    """
    reader = csv.DictReader(io.StringIO(file.text(), newline=""))
    missing = {"index", "prompt_en", "sub_dims_en"} - set(reader.fieldnames or ())
    if missing:
        raise DataError(f"{file.path} has no column {', '.join(sorted(missing))}")
    found = []
    for number, row in enumerate(reader):
        where = f"{file.path}, row {number + 1}"
        try:
            facts = read_facts(row["sub_dims_en"])
            points, said = facts["Testpoints"], facts["Testpoint Description"]
            task = facts["Primary Categories"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where} cannot be read: {error!r}") from error
        if not points or len(points) != len(said):
            raise DataError(f"{where}: {len(points)} test points and {len(said)} descriptions")
        for point in points:
            rules.meaning_of(point)
        metadata = {"points": points, "descriptions": said}
        found.append(Item(folder_name(row["index"], where), row["prompt_en"], task, metadata))
    return found
