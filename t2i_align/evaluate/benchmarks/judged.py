"""Benchmarks that are prompts and a judge: a number a picture, its mean by category.

The judge is any of judges/ by the name of its card. Beside it stand judges that are held out: they
see the same pictures and change nothing, so a model that was trained on the first one shows whether
it gained with the others. Stored is every judge's own number, or why it gave none; a picture
without a number is an error, never a 0. Two models are compared picture by picture with
``t2i-align compare``; win rates for every judge are in win_rates.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from t2i_align.errors import DataError, UserError
from t2i_align.evaluate.aggregate import Interval
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.prompt_files import PromptFile, find
from t2i_align.evaluate.results import interval
from t2i_align.options import Options

if TYPE_CHECKING:
    from t2i_align.evaluate.scoring import Member

SCORES, REASONS = "scores", "reasons"
JUDGE = "judge "  # before the name of a held-out judge, in a row's parts


class JudgedOptions(Options):
    """Prompts and judges."""

    prompts: str | None = Field(None, description="file of prompts; null: the published one")
    images_per_prompt: int = Field(1, ge=1, description="pictures of each; diversity needs 2")
    judge: str = Field("pickscore", description="whose number counts: a card of reward_models/")
    held_out: list[str] = Field(
        ["hpsv2_1"], description="judges that look on; not those a model was trained with"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the judges' weights"
    )

    @model_validator(mode="after")
    def _each_once(self) -> JudgedOptions:
        names = [self.judge, *self.held_out]
        if len(set(names)) < len(names):
            raise ValueError(f"a judge is held out or counts, and is named once: {names}")
        return self


@dataclass(frozen=True)
class Panel:
    """Judges by name; loaded when first asked.

    Args:
        names: of their cards.
        device: for all of them.
        dtype: of their weights.
    """

    names: Sequence[str]
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """A typo is told before any work.

        Raises:
            UserError: unknown judge.
        """
        from t2i_align.judges.base import judge_card

        for name in self.names:
            judge_card(name)

    @cached_property
    def members(self) -> list[Member]:
        """The judges with what their numbers come from."""
        from t2i_align.evaluate.scoring import panel

        return panel(self.names, device=self.device, dtype=self.dtype)

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """``{scores: {judge: number or null}, reasons: {judge: text}}`` of each picture.

        Raises:
            UserError: a judge behind an address is not there.
        """
        from t2i_align.contract import Media

        media = [Media("image", p.file.read_bytes()) for p in pictures]
        prompts = [p.item.prompt for p in pictures]
        found: list[Answer] = [{SCORES: {}, REASONS: {}} for _ in pictures]
        for member in self.members:
            given = member.judge.score(media, prompts).kept(member.name)
            values = zip(given.values.tolist(), given.reasons, strict=True)
            for answer, (value, reason) in zip(found, values, strict=True):
                answer[SCORES][member.name] = value if math.isfinite(value) else None
                if reason is not None:
                    answer[REASONS][member.name] = reason
        return found

    def facts(self) -> dict[str, Any]:
        """Card version, options and hash of the weights of each."""
        found = {member.name: member.facts.to_dict() for member in self.members}
        return {n: {k: v for k, v in f.items() if k != "judge"} for n, f in found.items()}


def number(picture: Picture, answer: Answer, judge: str) -> float:
    """What a judge said of a picture.

    Raises:
        DataError: it was not asked, or had no number.
    """
    scores = answer.get(SCORES, {})
    where = f"picture {picture.number} of {picture.item.id}"
    if judge not in scores:
        known = ", ".join(scores) or "none"
        raise DataError(
            f"the judge '{judge}' was not asked of {where}; asked were: {known}",
            "run the evaluation again with this judge, its pictures are kept",
        )
    if scores[judge] is None:
        why = answer.get(REASONS, {}).get(judge, "no reason was stored")
        raise DataError(f"'{judge}' has no number for {where}: {why}", "leave that judge out")
    return float(scores[judge])


def by_task(
    pictures: Sequence[Picture], values: Sequence[float], key: str | None = None
) -> dict[str, list[float]]:
    """Values by the task of their prompt, or by a field of its metadata.

    Args:
        pictures: judged.
        values: of each.
        key: of the metadata; None: the task.
    """
    found: dict[str, list[float]] = {}
    for picture, value in zip(pictures, values, strict=True):
        item = picture.item
        found.setdefault(item.task if key is None else str(item.metadata[key]), []).append(value)
    return found


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each."""
    return {name: math.fsum(v) / len(v) for name, v in values.items()}


def mean_of_pictures(pictures: Sequence[Picture], values: Sequence[float]) -> Interval:
    """Mean of all pictures, its interval over prompts."""
    prompts = [p.item.prompt for p in pictures]
    return interval({"": list(values)}, {"": prompts})


def held_out_tables(
    pictures: Sequence[Picture], verdicts: Sequence[Verdict]
) -> dict[str, dict[str, float]]:
    """A table a held-out judge: its mean by task, and of all pictures."""
    names = [k for k in verdicts[0].parts if k.startswith(JUDGE)] if verdicts else []
    found = {}
    for name in names:
        values = [v.parts[name] for v in verdicts]
        total = {"all pictures": math.fsum(values) / len(values)}
        found[f"held-out {name}"] = means(by_task(pictures, values)) | total
    return found


class Judged(ABC):
    """Base of a benchmark of one prompt file and a judge."""

    Options: ClassVar[type[Options]] = JudgedOptions
    name: ClassVar[str]
    tables: ClassVar[tuple[str, ...]] = ()  # further fields of the metadata to report by

    def __init__(self, options: JudgedOptions, device: str = "cpu") -> None:
        """Load nothing yet.

        Args:
            options: prompts and judges.
            device: for the judges.

        Raises:
            UserError: unknown judge, or one for which less is better or nothing is.
        """
        from t2i_align.judges.base import judge_card

        self.options: Any = options
        self.panel = Panel([options.judge, *options.held_out], device, options.dtype)
        direction = judge_card(options.judge).direction
        if direction != "higher is better":
            raise UserError(
                f"the card of judge '{options.judge}' says '{direction}'",
                "a score needs a judge that is higher for better pictures; it may be held_out",
            )

    @abstractmethod
    def read_items(self) -> list[Item]:
        """All prompts."""

    def scale(self) -> float:
        """What the judge's number is multiplied with."""
        return 1.0

    @property
    def images_per_prompt(self) -> int:
        """As the options say; no protocol asks for more than one."""
        return self.options.images_per_prompt

    @cached_property
    def prompts(self) -> PromptFile:
        """The file of prompts."""
        return find(self.name, self.options.prompts)

    @cached_property
    def _items(self) -> list[Item]:
        return self.read_items()

    def items(self) -> list[Item]:
        """All prompts, as the file has them.

        Raises:
            DataError: the file is missing or has another form.
        """
        return list(self._items)

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """Every judge's number of each picture."""
        return self.panel.answers(pictures)

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """The judge's number; those of the others beside it.

        Raises:
            DataError: a judge was not asked, or had no number.
        """
        o = self.options
        return [
            Verdict(
                self.scale() * number(p, a, o.judge),
                parts={f"{JUDGE}{name}": number(p, a, name) for name in o.held_out},
            )
            for p, a in zip(pictures, answers, strict=True)
        ]

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Mean by category and of all pictures."""
        values = [v.score for v in verdicts]
        tables = {f"by {key}": means(by_task(pictures, values, key)) for key in self.tables}
        tables |= held_out_tables(pictures, verdicts)
        total = mean_of_pictures(pictures, values)
        return Summary(means(by_task(pictures, values)), total, tables)

    def identity(self) -> Mapping[str, Any]:
        """Prompt file, judges and the hash of their weights."""
        o = self.options
        named = {"judge": o.judge, "held_out_judges": list(o.held_out), "judge_dtype": o.dtype}
        return self.prompt_identity() | named | {"judges": self.panel.facts()}

    def prompt_identity(self) -> dict[str, Any]:
        """Which prompts."""
        return self.prompts.identity()


def read_table(file: PromptFile, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a file with tab stops; quotation marks are letters of the prompt, not CSV's.

    Args:
        file: of prompts.
        columns: that its first line names.

    Raises:
        DataError: another first line, a row of another length, or an empty prompt.
    """
    lines = file.text().removesuffix("\n").split("\n")  # other line ends are part of a prompt
    if lines[0].split("\t") != list(columns):
        raise DataError(
            f"{file.path}: the first line names the columns {', '.join(columns)}, with tab stops"
        )
    rows = []
    for line_number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        if len(cells) != len(columns) or not cells[0].strip():
            raise DataError(
                f"{file.path}:{line_number} has {len(cells)} of {len(columns)} columns, or no "
                "prompt"
            )
        rows.append(dict(zip(columns, cells, strict=True)))
    return rows
