"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): objects, counts, colours, positions.

The verdict and the summary are those of metrics/geneval.py; this file finds prompts, asks a
detector and a colour classifier, and keeps what they said. Stored of a picture: every detection
above ``floor`` (class, score, box; masks only with ``store_masks``), and the colour of every
detection that scores enough to count and whose class some clause asks a colour of. So stored
answers can be judged again under higher thresholds, and under lower ones where no colour is asked.

``geneval_long`` is the same with prompts rewritten by a language model, whose numbers are another
benchmark's. The overall is the mean of the six tasks' means; the table ``images and prompts`` has
the shares of right images and of prompts with at least one right image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.detectors import build
from t2i_align.evaluate.detectors.base import Detector, DetectorOptions
from t2i_align.evaluate.metrics import geneval as rules
from t2i_align.evaluate.metrics.geneval_rewards import fixed
from t2i_align.evaluate.pictures import read_picture
from t2i_align.evaluate.prompt_files import PromptFile, find
from t2i_align.evaluate.results import GRADED, interval
from t2i_align.options import Options

if TYPE_CHECKING:
    from t2i_align.evaluate.detectors.colors import ColorClassifier


class GenEvalBenchmarkOptions(rules.GenEvalOptions, DetectorOptions):
    """Prompts, detector, colour classifier, thresholds."""

    prompts: str | None = Field(
        default=None, description="file of prompts; null: the published one"
    )
    images_per_prompt: int = Field(default=4, ge=1, description="pictures of each prompt")
    detector: Literal["mask2former", "torchvision", "owlv2", "grounding_dino", "scenes"] = Field(
        default="mask2former", description="which detector; name_or_path says which weights"
    )
    store_masks: bool = Field(default=False, description="keep masks in answers.jsonl; large")
    clip_model: str = Field(default="ViT-L-14", description="open_clip's name, or a folder")
    clip_pretrained: str | None = Field(
        default="openai",
        description="tag of weights, or a file (OpenAI's: clip_model ViT-L-14-quickgelu); a "
        "folder: null",
    )
    bgcolor: str = Field(
        default="#999", description="outside an object's mask; 'original' keeps it"
    )
    crop: bool = Field(
        default=True, description="cut to the object's box before its colour is named"
    )
    self_test: Literal["require", "record"] = Field(
        default="require",
        description="record: note what the detector finds in the test picture first",
    )
    self_test_picture: str | None = Field(
        default=None, description="photograph of known objects, for record; null: a drawn picture"
    )
    self_test_objects: str = Field(default="", description="what is in it, e.g. dog:1,car:2")


VERDICT = set(rules.GenEvalOptions.model_fields)


class GenEval:
    """GenEval by plug-in detectors."""

    Options: ClassVar[type[Options]] = GenEvalBenchmarkOptions
    name: ClassVar[str] = "geneval"

    def __init__(self, options: GenEvalBenchmarkOptions, device: str = "cpu") -> None:
        """Load nothing yet.

        Args:
            options: see the class.
            device: for the detector and the colour classifier.
        """
        self.options, self.device = options, device
        self.rules = rules.GenEvalOptions(**options.model_dump(include=VERDICT))
        self._tested: dict[str, Any] | None = None

    # -- prompts

    @property
    def images_per_prompt(self) -> int:
        """Four in the protocol."""
        return self.options.images_per_prompt

    @cached_property
    def prompts(self) -> PromptFile:
        """The file of prompts."""
        return find(self.name, self.options.prompts)

    def items(self) -> list[Item]:
        """A line a prompt; ids are line numbers, as the released layout names its folders.

        Raises:
            DataError: the file is missing, or a line is no prompt of GenEval's form.
        """
        return list(self._items)

    @cached_property
    def _items(self) -> list[Item]:
        return read_items(self.prompts)

    # -- models

    @cached_property
    def detector(self) -> Detector:
        """The detector."""
        known = self.options.model_dump(include=set(DetectorOptions.model_fields))
        return build(self.options.detector, DetectorOptions(**known), self.device)

    @cached_property
    def classifier(self) -> ColorClassifier | None:
        """The colour classifier; None where the detector names colours."""
        if self.options.detector == "scenes":
            return None
        from t2i_align.evaluate.detectors.colors import ColorClassifier

        ground = self.options.bgcolor, self.options.crop
        o = self.options
        return ColorClassifier(o.clip_model, o.clip_pretrained, ground, self.device)

    def tested(self) -> dict[str, Any]:
        """The outcome of the detector's self-test, which comes first.

        Raises:
            ModelError: it failed, or none is recorded.
        """
        if self._tested is None:
            from t2i_align.evaluate.detectors import self_test

            if self.options.self_test == "record":
                given = self.options.self_test_picture
                picture = Path(given).expanduser() if given else None
                vouched = self_test.read_vouched(self.options.self_test_objects)
                self_test.record(self.detector, picture, vouched)
            self._tested = self_test.check(self.detector)
        return self._tested

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """Detections of each picture, with the colours a verdict may ask for."""
        self.tested()
        images = [read_picture(p.file) for p in pictures]
        found = self.detector.detect(images)
        answers = []
        for picture, image, seen in zip(pictures, images, found, strict=True):
            named = self._named(image, seen, picture.item.metadata)
            kept = named if self.options.store_masks else [replace(d, mask=None) for d in named]
            answers.append({"detections": [d.to_dict() for d in kept]})
        return answers

    def _named(
        self, image: Any, found: Sequence[Detection], metadata: Mapping[str, Any]
    ) -> list[Detection]:
        """Detections with the colours of those that count."""
        if self.classifier is None:
            return list(found)
        asked = {c.cls for c in rules.read_clauses(metadata)[0] if c.color is not None}
        low = min(self.rules.threshold, self.rules.counting_threshold)
        which = [k for k, d in enumerate(found) if d.cls in asked and d.score > low]
        colors = self.classifier.colors(image, [found[k] for k in which])
        known = dict(zip(which, colors, strict=True))
        return [replace(d, color=known.get(k)) for k, d in enumerate(found)]

    # -- verdicts

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """The released evaluator's verdict, and a graded one in [0, 1] that is 1 where it is yes.

        Raises:
            DataError: a threshold lies below what was stored, or a colour is not known.
        """
        if self.rules.threshold < self.options.floor:
            raise DataError(
                f"threshold {self.rules.threshold} is below floor {self.options.floor}, under "
                "which nothing is stored",
                "answer again with a lower floor",
            )
        return [self._verdict(p, a) for p, a in zip(pictures, answers, strict=True)]

    def _verdict(self, picture: Picture, answer: Answer) -> Verdict:
        found = detections_of(answer, picture)
        metadata = picture.item.metadata
        verdict = rules.evaluate(found, None, metadata, self.rules)
        named = [d for kept in verdict.kept.values() for d in kept]
        graded = 1.0 if verdict.correct else _graded(named, metadata, self.rules)
        reason = "\n".join(verdict.reasons)
        return Verdict(float(verdict.correct), verdict.correct, reason, {GRADED: graded})

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Means of the six tasks and their plain mean.

        Raises:
            DataError: there is nothing to summarise.
        """
        rows = [
            {"tag": p.item.task, "correct": v.correct, "metadata": p.item.id}
            for p, v in zip(pictures, verdicts, strict=True)
        ]
        table = rules.summary(rows)
        values: dict[str, list[float]] = {}
        groups: dict[str, list[str]] = {}
        for picture, verdict in zip(pictures, verdicts, strict=True):
            values.setdefault(picture.item.task, []).append(verdict.score)
            groups.setdefault(picture.item.task, []).append(picture.item.id)
        tasks = {name: task["mean"] for name, task in table["tasks"].items()}
        overall = replace(interval(values, groups), mean=table["overall"])
        shares = {"images": table["images"], "prompts": table["prompts"]}
        return Summary(tasks, overall, {"images and prompts": shares})

    def identity(self) -> Mapping[str, Any]:
        """Prompts, detector, classifier, their weights, thresholds, the self-test."""
        known: dict[str, Any] = {**self.prompts.identity(), **self.detector.identity()}
        known |= {} if self.classifier is None else self.classifier.identity()
        return known | self.tested() | self.rules.model_dump() | {"floor": self.options.floor}


class GenEvalLong(GenEval):
    """GenEval with prompts that a language model rewrote."""

    name: ClassVar[str] = "geneval_long"


def _graded(
    found: Sequence[Detection], metadata: Mapping[str, Any], options: rules.GenEvalOptions
) -> float:
    """The reward ``fixed``; 0 where it needs a colour that was not asked for."""
    try:
        return fixed(found, metadata, options)
    except DataError:
        return 0.0


def detections_of(answer: Answer, picture: Picture) -> list[Detection]:
    """The detections of a stored answer.

    Raises:
        DataError: it holds none, or one of another form; names the picture.
    """
    rows = answer.get("detections")
    if not isinstance(rows, list):
        raise DataError(f"the answer about picture {picture.number} of {picture.item.id} holds no "
                        "list of detections")  # fmt: skip
    try:
        return [Detection.from_dict(row) for row in rows]
    except DataError as error:
        where = f"picture {picture.number} of {picture.item.id}"
        raise DataError(f"{where}: {error.message}", error.fix) from error


def read_items(prompts: PromptFile) -> list[Item]:
    """Prompts of a file, a JSON object a line.

    Raises:
        DataError: a line is none, or has clauses that cannot be judged.
    """
    found = []
    for number, line in enumerate(prompts.text().splitlines()):
        try:
            metadata = json.loads(line)
            prompt, tag = metadata["prompt"], metadata["tag"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{prompts.path}:{number + 1} is no JSON object with a prompt and a tag"
            ) from error
        rules.read_clauses(metadata)
        found.append(Item(f"{number:05d}", prompt, tag, metadata))
    return found
