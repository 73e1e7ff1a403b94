"""DPG-Bench: files, pictures and answers; the rules are in metrics/dpg.py.

``prompts`` is the released ``dpg_bench.csv``. Its text column is what a model is given, unless
``texts`` names a folder of the released prompt files (``<id>.txt``) or a JSON object {id: text}.
Pictures lie one file each; with ``grid: true`` a file is the released script's 2 x 2 grid, whose
cells are read top left, top right, bottom left, bottom right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.metrics import dpg as rules
from t2i_align.evaluate.metrics.question_graph import (
    GraphItem,
    Variant,
    propositions_of,
    read_graphs,
)
from t2i_align.evaluate.pictures import read_picture
from t2i_align.evaluate.prompt_files import PromptFile
from t2i_align.evaluate.question_files import find_supplied, folder_name
from t2i_align.evaluate.questions import Answerer, AskOptions, answerer
from t2i_align.evaluate.results import interval
from t2i_align.judges.weight_files import combined
from t2i_align.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

NAME = "dpg_bench"
CELLS = 4
DROPPED = "dropped"


class DPGBenchOptions(AskOptions):
    """Question file, prompts, judge, rules."""

    prompts: str | None = Field(None, description="dpg_bench.csv; null: in the usual place")
    texts: str | None = Field(
        None, description="folder of <id>.txt, or JSON {id: text}; null: the CSV's text column"
    )
    variant: Variant = Field("official", description="official keeps the released script's quirks")
    images_per_prompt: int = Field(CELLS, ge=1, description="pictures of each prompt")
    grid: bool = Field(False, description="every file is a 2 x 2 grid of a prompt's four pictures")


class DPGBench:
    """DPG-Bench by plug-in judges."""

    Options: ClassVar[type[Options]] = DPGBenchOptions

    def __init__(self, options: DPGBenchOptions, device: str = "cpu") -> None:
        """Load nothing yet."""
        self.options, self.device = options, device

    @property
    def images_per_prompt(self) -> int:
        """Four, or one grid."""
        return 1 if self.options.grid else self.options.images_per_prompt

    @cached_property
    def file(self) -> PromptFile:
        """The question file."""
        return find_supplied(NAME, self.options.prompts)

    @cached_property
    def graphs(self) -> list[GraphItem]:
        """Prompts with the questions that are asked; official ones lack the file's first."""
        official = self.options.variant == "official"
        return read_graphs(self.file.text(), str(self.file.path), drop_first=official)

    @cached_property
    def texts(self) -> dict[str, str]:
        """What a model is given, by id.

        Raises:
            DataError: the files or the object lack a prompt.
        """
        if self.options.texts is None:
            return {g.id: g.text for g in self.graphs}
        return read_texts(Path(self.options.texts).expanduser(), [g.id for g in self.graphs])

    @cached_property
    def judge(self) -> Answerer:
        """Who answers."""
        return answerer(self.options, NAME, "yes_no", self.device)

    def items(self) -> list[Item]:
        """All prompts in the file's order; a task is where a prompt comes from."""
        return [
            Item(folder_name(g.id, NAME), self.texts[g.id], source_of(g.id), g.metadata())
            for g in self.graphs
        ]

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """``{"cells": [{question: {text, p}}]}``, one cell of a single picture, four of a grid."""
        asked, places = [], []
        found: list[Answer] = []
        for picture in pictures:
            cells = self._cells(read_picture(picture.file), picture)
            found.append({"cells": [{} for _ in cells]})
            for cell, image in zip(found[-1]["cells"], cells, strict=True):
                for p in propositions_of(picture.item.metadata):
                    asked.append((image, p.question))
                    places.append((cell, str(p.id)))
        for (cell, name), reply in zip(places, self.judge.ask(asked), strict=True):
            cell[name] = reply
        return found

    def _cells(self, image: PILImage, picture: Picture) -> list[PILImage]:
        if not self.options.grid:
            return [image]
        if image.width % 2 or image.height % 2:
            size = f"{image.width} x {image.height}"
            raise DataError(f"{picture.file} is no grid of four equal cells: {size} pixels")
        w, h = image.width // 2, image.height // 2
        return [image.crop((x, y, x + w, y + h)) for y in (0, h) for x in (0, w)]

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """Percent of questions that hold; parts are what categories are made of."""
        return [self._verdict(p, a) for p, a in zip(pictures, answers, strict=True)]

    def _verdict(self, picture: Picture, answer: Answer) -> Verdict:
        asked = propositions_of(picture.item.metadata)
        wanted = {p.id for p in asked}
        try:
            cells = [{int(q): str(r["text"]) for q, r in c.items()} for c in answer["cells"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{picture.item.id}: no answers of DPG-Bench: {error!r}") from error
        lacking = [sorted(wanted - set(c)) for c in cells if wanted - set(c)]
        if lacking:
            raise DataError(f"{picture.item.id}: no answer to questions {lacking[0]}")
        known = [{p.id: c[p.id] for p in asked} for c in cells]
        try:
            parents = rules.dependencies(asked, self.options.variant)
            found = rules.picture_score(known, parents, self.options.variant)
        except rules.MissingParent as error:
            return Verdict(0.0, None, f"dropped: {error.message}", {DROPPED: 1.0})
        failed = [p.question for p in asked if found.questions[p.id] < 1]
        reason = "\n".join(f"no: {question}" for question in failed)
        return Verdict(
            100 * found.score, None, reason, {str(q): v for q, v in found.questions.items()}
        )

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Tasks are the five categories; the total is the mean over prompts.

        Raises:
            DataError: every picture is dropped.
        """
        by_item: dict[str, list[tuple[Picture, Verdict]]] = {}
        for picture, verdict in zip(pictures, verdicts, strict=True):
            by_item.setdefault(picture.item.id, []).append((picture, verdict))
        kept = {i: v for i, v in by_item.items() if not any(DROPPED in x.parts for _, x in v)}
        if not kept:
            raise DataError("every picture is dropped", "use --set variant=fixed")
        means = {i: sum(v.score for _, v in rows) / len(rows) for i, rows in kept.items()}
        broad, fine = rules.categories(
            pair for rows in kept.values() for pair in self._questions(rows)
        )
        overall = interval({"": list(means.values())}, {"": list(means)})
        counts = {"prompts": float(len(by_item)), DROPPED: float(len(by_item) - len(kept))}
        return Summary(broad, overall, {"categories": fine, "prompts": counts})

    def _questions(self, rows: Sequence[tuple[Picture, Verdict]]) -> list[tuple[str, float]]:
        """What a prompt's pictures give to categories: the last one's, or the mean of all."""
        asked = propositions_of(rows[0][0].item.metadata)
        if self.options.variant == "official":
            rows = [max(rows, key=lambda row: row[0].number)]
        return [(p.detailed, sum(v.parts[str(p.id)] for _, v in rows) / len(rows)) for p in asked]

    def identity(self) -> Mapping[str, Any]:
        """Files, rules and judge."""
        texts = (f"{i}\0{t}" for i, t in sorted(self.texts.items()))
        return {
            **self.file.identity(),
            "texts_sha256": None if self.options.texts is None else combined(texts),
            "variant": self.options.variant,
            "grid": self.options.grid,
            **self.judge.identity(),
        }


def source_of(item_id: str) -> str:
    """Where a prompt comes from: the letters its id starts with."""
    letters = re.match(r"[A-Za-z]+", item_id)
    return letters[0] if letters else "numbers"


def read_texts(path: Path, ids: Sequence[str]) -> dict[str, str]:
    """Prompts from ``<id>.txt`` files or a JSON object.

    Raises:
        DataError: one is missing or empty.
    """
    try:
        if path.is_dir():
            found = {i: (path / f"{i}.txt").read_text(encoding="utf-8").strip() for i in ids}
        else:
            table = json.loads(path.read_text(encoding="utf-8"))
            found = {i: table[i].strip() for i in ids}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"texts: {path} lacks a prompt: {error!r}") from error
    empty = [i for i, text in found.items() if not text]
    if empty:
        raise DataError(f"texts: the prompt of {empty[0]} in {path} is empty")
    return found
