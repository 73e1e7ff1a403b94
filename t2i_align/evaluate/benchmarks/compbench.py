"""T2I-CompBench and its ++ version: eight categories, three hundred prompts each, ten pictures.

    color, shape, texture    BLIP is asked about every noun phrase         compbench_marks.py (1)
    spatial, 3d_spatial      two objects and their relation                compbench.py
    numeracy                 how many of each                              compbench_numeracy.py
    non_spatial              cosine of picture and prompt, near 0.3
    complex                  three in one, by the kind of prompt           compbench_marks.py (2)

or, with ``scoring: vlm``, marks of 0 to 100 in every category (compbench_marks.py (3)). The files
named are those of evaluate/metrics; models and parsers are in this folder. A category's score is
the mean over its pictures. The benchmark has no total; ``overall`` is the plain mean of the
categories, for comparing one's own runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.benchmarks.compbench_experts import ExpertOptions, Experts
from t2i_align.evaluate.benchmarks.compbench_files import (
    ACTION_PART,
    FILES,
    OBJECTS,
    SPATIAL_PART,
    Files,
    find,
)
from t2i_align.evaluate.benchmarks.compbench_parsers import PARSERS, Parser
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.compbench import (
    Placed,
    Variant,
    depth_score,
    frame_of,
    plane_score,
    rescaled,
)
from t2i_align.evaluate.metrics.compbench_marks import (
    attribute_score,
    complex_part,
    complex_score,
    key,
    marks_score,
    questions,
)
from t2i_align.evaluate.metrics.compbench_numeracy import numeracy_score, read_objects, targets
from t2i_align.evaluate.metrics.compbench_words import (
    complex_objects,
    two_objects,
    without_adjectives,
)
from t2i_align.evaluate.pictures import read_picture
from t2i_align.evaluate.results import interval
from t2i_align.options import Options

CATEGORIES = tuple(FILES)
ATTRIBUTES = ("color", "shape", "texture")
UNREADABLE = "unreadable"


class CompBenchOptions(ExpertOptions):
    """Which prompts, which rules, which models."""

    prompts: str | None = Field(
        default=None,
        description="folder with the benchmark's text files; null: the published ones, from "
        "$T2I_ALIGN_BENCHMARKS/t2i_compbench",
    )
    categories: tuple[str, ...] = Field(
        default=CATEGORIES, min_length=1, strict=False, description="which of the eight"
    )
    variant: Variant = Field(
        default="official", description="the released rules with their slips, or fixed ones"
    )
    parser: Literal["pattern", "spacy"] = Field(
        default="pattern", description="finds nouns and noun phrases; see compbench_parsers.py"
    )
    pictures: int = Field(default=10, ge=1, description="of each prompt; the protocol asks for 10")

    @field_validator("categories")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in FILES]
        if unknown or len(set(value)) < len(value):
            raise ValueError(f"categories are some of {', '.join(FILES)}, each once; got {value}")
        return value


class CompBench:
    """Compositional prompts, scored by a model a category."""

    Options: ClassVar[type[Options]] = CompBenchOptions

    def __init__(self, options: CompBenchOptions, device: str = "cpu") -> None:
        """Load nothing.

        Args:
            options: see :class:`CompBenchOptions`.
            device: for the models.
        """
        self.options = options
        self.experts = Experts(options, device)
        self.rules: dict[str, Callable[[Item, Answer], Verdict]] = {
            **dict.fromkeys(ATTRIBUTES, self._attributes),
            "spatial": self._plane,
            "3d_spatial": self._depth,
            "numeracy": self._numeracy,
            "non_spatial": lambda _, answer: Verdict(float(answer["cosine"])),
            "complex": self._complex,
        }

    @property
    def images_per_prompt(self) -> int:
        """Ten, if the options do not say otherwise."""
        return self.options.pictures

    @cached_property
    def files(self) -> Files:
        """The prompt files."""
        return find(self.options.categories, self.options.prompts)

    @cached_property
    def parser(self) -> Parser:
        """The parser."""
        return PARSERS[self.options.parser]()

    def items(self) -> list[Item]:
        """All prompts, a category after the other, with what is asked of their pictures.

        Raises:
            DataError: a file is missing or, in the usual place, not the published one.
            ModelError: the parser is not installed.
        """
        return [
            Item(f"{category}_{number:05d}", prompt, category, self._metadata(category, prompt))
            for category in self.options.categories
            for number, prompt in enumerate(self.files.lines(FILES[category]))
        ]

    def _metadata(self, category: str, prompt: str) -> dict[str, Any]:
        """Questions, objects, caption: what models are asked, and verdicts compare with."""
        parse = self.parser(prompt)
        chunks = list(parse.chunks)
        objects = complex_objects if category == "complex" else two_objects
        facts: dict[str, Callable[[], Any]] = {
            "questions": lambda: questions(chunks),
            "words": lambda: objects(parse),
            "targets": lambda: [list(t) for t in targets(prompt, self._plurals)],
            "caption": lambda: without_adjectives(parse) if category == "complex" else prompt,
            "part": lambda: complex_part(prompt, *self._parts),
            "chunks": lambda: chunks,
        }
        used = ("chunks",) if self.options.scoring == "vlm" else USED[category]
        return {name: facts[name]() for name in used}

    @cached_property
    def _plurals(self) -> dict[str, str]:
        return read_objects(self.files.text(OBJECTS))

    @cached_property
    def _parts(self) -> tuple[set[str], set[str]]:
        """Keys of the complex prompts that are spatial, and that are actions."""
        spatial, action = (self.files.lines(name) for name in (SPATIAL_PART, ACTION_PART))
        return {key(p) for p in spatial}, {key(p) for p in action}

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """What the models of each picture's category say of it."""
        return [self.experts.answer(p, read_picture(p.file)) for p in pictures]

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """The score of each picture.

        Raises:
            DataError: an answer does not hold what its category needs.
        """
        return [self._verdict(p.item, a) for p, a in zip(pictures, answers, strict=True)]

    def _verdict(self, item: Item, answer: Answer) -> Verdict:
        rule = self._marks if self.options.scoring == "vlm" else self.rules[item.task]
        try:
            return rule(item, answer)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise DataError(
                f"the answer about a picture of {item.id} does not hold what '{item.task}' needs: "
                f"{type(error).__name__} {error}",
                "what it must hold stands in evaluate/benchmarks/compbench_experts.py",
            ) from error

    def _attributes(self, item: Item, answer: Answer) -> Verdict:
        asked, yes = item.metadata["questions"], [float(p) for p in answer["yes"]]
        if len(asked) != len(yes):
            raise ValueError(f"{len(asked)} questions and {len(yes)} answers")
        parts = dict(zip(asked, yes, strict=True))
        doubted = ", ".join(q for q, p in parts.items() if p < 0.5)
        return Verdict(attribute_score(yes, self.options.variant), reason=doubted, parts=parts)

    def _plane(self, item: Item, answer: Answer) -> Verdict:
        placed = plane_score(
            framed(answer), item.metadata["words"], item.prompt, self.options.variant
        )
        return place_verdict(placed, item)

    def _depth(self, item: Item, answer: Answer) -> Verdict:
        found, variant = framed(answer), self.options.variant
        means = answer["depth"]["swapped" if variant == "official" else "straight"]
        values = [math.nan if mean is None else float(mean) for mean in means]
        depths = {d.box: mean for d, mean in zip(found, values, strict=True)}
        placed = depth_score(found, depths, item.metadata["words"], item.prompt, variant)
        return place_verdict(placed, item)

    def _numeracy(self, item: Item, answer: Answer) -> Verdict:
        wanted = [(str(word), int(number)) for word, number in item.metadata["targets"]]
        score, there = numeracy_score(framed(answer), wanted, self.options.variant)
        wrong = [f"expected {n} {w}, found {there[w]}" for w, n in wanted if there[w] != n]
        reason = "; ".join(wrong) if wanted else "the prompt names nothing that is counted"
        return Verdict(score, reason=reason, parts={w: float(n) for w, n in there.items()})

    def _complex(self, item: Item, answer: Answer) -> Verdict:
        attributes = self._attributes(item, answer).score
        placed = self._plane(item, answer).score
        cosine = float(answer["cosine"])
        score = complex_score(item.metadata["part"], attributes, placed, cosine)
        parts = {"attributes": attributes, "spatial": placed, "cosine": cosine}
        return Verdict(score, parts=parts)

    def _marks(self, item: Item, answer: Answer) -> Verdict:
        attributes = item.task in ATTRIBUTES
        texts = [str(text) for text in answer["marks"]]
        score = marks_score(texts, attributes=attributes, variant=self.options.variant)
        if score is None:
            return Verdict(0.0, reason="no mark can be read", parts={UNREADABLE: 1.0})
        return Verdict(score)

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Mean of each category, and the plain mean of those; unreadable marks left out, counted.

        Raises:
            DataError: no picture has a score.
        """
        values: dict[str, list[float]] = {}
        groups: dict[str, list[str]] = {}
        lost: dict[str, float] = {}
        for picture, verdict in zip(pictures, verdicts, strict=True):
            task = picture.item.task
            if UNREADABLE in verdict.parts:
                lost[task] = lost.get(task, 0.0) + 1
                continue
            values.setdefault(task, []).append(verdict.score)
            groups.setdefault(task, []).append(picture.item.prompt)
        if not values:
            raise DataError("no picture has a score", "see the reasons in the stored answers")
        tasks = {task: sum(v) / len(v) for task, v in values.items()}
        tables = {"unreadable marks": lost} if lost else {}
        return Summary(tasks, interval(values, groups), tables)

    def identity(self) -> Mapping[str, Any]:
        """Prompt files, categories, variant, parser and every model with its hash."""
        o = self.options
        chosen = {"categories": list(o.categories), "variant": o.variant, "scoring": o.scoring}
        models = self.experts.identity(o.categories)
        return {**self.files.identity(), **chosen, **self.parser.identity(), "models": models}


# What of a prompt a category's models and verdicts use.
USED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ATTRIBUTES, ("questions",)),
    "spatial": ("words",),
    "3d_spatial": ("words",),
    "numeracy": ("targets",),
    "non_spatial": ("caption",),
    "complex": ("questions", "words", "caption", "part"),
}


def framed(answer: Answer) -> list[Detection]:
    """Stored detections with their boxes in the detector's frame."""
    width, height = (int(side) for side in answer["size"])
    found = [Detection.from_dict(d) for d in answer["detections"]]
    return rescaled(found, (width, height), frame_of(width, height))


def place_verdict(placed: Placed, item: Item) -> Verdict:
    """A spatial score with what is missing or wrong."""
    words = item.metadata["words"]
    if len(words) != 2:
        return Verdict(0.0, reason="the prompt does not name two objects")
    pairs = zip(words, (placed.first, placed.second), strict=True)
    missing = [f"no {word}" for word, found in pairs if found is None]
    parts = {} if placed.relation is None else {"relation": placed.relation}
    reason = ", ".join(missing) or ("" if placed.relation == 1 else "not placed as asked")
    return Verdict(placed.score, reason=reason, parts=parts)
