"""Text rendering: does the picture show the text that its prompt quotes? Read by real OCR.

Prompts are those of Flow-GRPO's test set (arXiv:2505.05470): 1,018 with one quoted text each; any
text file with one prompt a line is taken, or .jsonl with the key ``prompt``. The recogniser is that
of judges/ocr.py. Stored is every line it reads, with box and confidence, down to confidence 0, so
``text_score`` can be changed afterwards.

``variant: fixed`` counts pictures that show the text and nothing else (Eq. 1 of
metrics/text_rendering.py) and grades them by Eq. (2); ``official`` is the mean of Flow-GRPO's
reward, Eq. (4), which surplus text does not lower. All four numbers stand in the tables of both.
The paper's numbers come from another recogniser (PaddleOCR) and do not compare.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from t2i_align.contract import MediaError
from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Answer, Item, Picture, Summary, Verdict
from t2i_align.evaluate.benchmarks.judged import (
    JUDGE,
    Panel,
    by_task,
    held_out_tables,
    mean_of_pictures,
    means,
    number,
)
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.text_rendering import text_scores, words_of
from t2i_align.evaluate.pictures import read_picture
from t2i_align.evaluate.prompt_files import PromptFile, find
from t2i_align.evaluate.results import GRADED
from t2i_align.options import Options

if TYPE_CHECKING:
    from t2i_align.judges.ocr import OcrJudge

NUMBERS = {
    "exact": "exact match",
    "similarity": "normalised edit similarity",
    "words": "word accuracy",
    "reward": "reward of Flow-GRPO",
}


class TextRenderingOptions(Options):
    """Prompts, recogniser, what counts."""

    prompts: str | None = Field(None, description="file of prompts; null: the published one")
    images_per_prompt: int = Field(1, ge=1, description="pictures of each; diversity needs 2")
    variant: Literal["official", "fixed"] = Field(
        "fixed", description="official: mean reward of Flow-GRPO; fixed: share of exact texts"
    )
    target: Literal["quotes", "first_quote"] = Field(
        "quotes", description="all quoted texts in their order, or the first one"
    )
    text_score: float = Field(
        0.5, ge=0, le=1, description="recognised text under this confidence is not read"
    )
    side: int = Field(
        736, ge=32, description="smaller pictures are enlarged until the shorter side is this"
    )
    num_threads: int = Field(-1, ge=-1, description="threads of ONNX Runtime; -1: its own choice")
    held_out: list[str] = Field(
        ["clip_score"], description="judges that look on: is the rest of the prompt there?"
    )


class TextRendering:
    """Quoted texts, read by OCR."""

    Options: ClassVar[type[Options]] = TextRenderingOptions
    name: ClassVar[str] = "text_rendering"

    def __init__(self, options: TextRenderingOptions, device: str = "cpu") -> None:
        """Load nothing yet.

        Args:
            options: prompts, recogniser, what counts.
            device: for the held-out judges; the recogniser runs on the CPU.

        Raises:
            UserError: unknown judge.
        """
        self.options = options
        self.panel = Panel(options.held_out, device)

    @property
    def images_per_prompt(self) -> int:
        """As the options say."""
        return self.options.images_per_prompt

    @cached_property
    def prompts(self) -> PromptFile:
        """The file of prompts."""
        return find(self.name, self.options.prompts)

    @cached_property
    def _items(self) -> list[Item]:
        return read_items(self.prompts, self.options.target)

    def items(self) -> list[Item]:
        """A line an item; tasks are numbers of words.

        Raises:
            DataError: the file is missing, or a prompt quotes no text.
        """
        return list(self._items)

    @cached_property
    def reader(self) -> OcrJudge:
        """The recogniser, at confidence 0.

        Raises:
            MissingDependencyError: it is not installed.
        """
        import torch

        from t2i_align.judges.ocr import OcrJudge, OcrOptions

        o = self.options
        made = OcrOptions(target=o.target, text_score=0.0, side=o.side, num_threads=o.num_threads)
        return OcrJudge(Path(), made, torch.device("cpu"), torch.float32)

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """Every line that is read, and the numbers of the held-out judges."""
        judged = self.panel.answers(pictures)
        return [
            {"detections": [line.to_dict() for line in self.read(p)], **answer}
            for p, answer in zip(pictures, judged, strict=True)
        ]

    def read(self, picture: Picture) -> list[Detection]:
        """Lines of a picture, top to bottom: text, confidence, box."""
        import numpy as np

        bgr = np.ascontiguousarray(np.asarray(read_picture(picture.file))[..., ::-1])
        try:
            parts, _ = self.reader.engine(bgr)
        except Exception as error:  # the engine has no common base class for its errors
            raise MediaError(f"{picture.file}: the text recogniser broke: {error}") from error
        return [line_of(corners, text, score) for corners, text, score in parts or ()]

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """Exact or not with the edit similarity, or the reward.

        Raises:
            DataError: an answer has no lines, or no number of a held-out judge.
        """
        return [self._verdict(p, a) for p, a in zip(pictures, answers, strict=True)]

    def _verdict(self, picture: Picture, answer: Answer) -> Verdict:
        target = str(picture.item.metadata["target"])
        read = text_of(answer, self.options.text_score)
        found = text_scores(read, target)
        parts = asdict(found)
        parts |= {f"{JUDGE}{n}": number(picture, answer, n) for n in self.options.held_out}
        if self.options.variant == "official":
            return Verdict(found.reward, parts=parts)
        right = found.exact == 1
        said = f'"{read}"' if read else "nothing"
        reason = "" if right else f'expected "{target}", read {said}'
        return Verdict(found.exact, right, reason, parts | {GRADED: found.similarity})

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Mean score by number of words and of all pictures; the four numbers of all."""
        values = [v.score for v in verdicts]
        numbers = {
            title: math.fsum(v.parts[key] for v in verdicts) / len(verdicts)
            for key, title in NUMBERS.items()
        }
        tables = {"all pictures": numbers} | held_out_tables(pictures, verdicts)
        tasks = means(by_task(pictures, values))
        return Summary(tasks, mean_of_pictures(pictures, values), tables)

    def identity(self) -> Mapping[str, Any]:
        """Prompt file, variant, recogniser and judges with the hash of their weights."""
        o = self.options
        known = {k: getattr(o, k) for k in ("variant", "target", "text_score")}
        known |= {"held_out_judges": list(o.held_out)}
        reader = {"ocr": "rapidocr-onnxruntime", "ocr_side": o.side}
        reader |= {"ocr_sha256": self.reader.weights_sha256}
        return self.prompts.identity() | known | reader | {"judges": self.panel.facts()}


def line_of(corners: Sequence[Sequence[float]], text: str, score: Any) -> Detection:
    """A line as a detection; its box holds the four corners."""
    xs, ys = ([float(point[k]) for point in corners] for k in (0, 1))
    return Detection(str(text), float(score), (min(xs), min(ys), max(xs), max(ys)))


def text_of(answer: Answer, text_score: float) -> str:
    """What counts as read: lines of enough confidence, a space between them.

    Raises:
        DataError: the answer holds no lines.
    """
    if not isinstance(answer.get("detections"), list):
        raise DataError("an answer of text_rendering holds the lines that were read: detections")
    lines = [Detection.from_dict(record) for record in answer["detections"]]
    return " ".join(line.cls for line in lines if line.score >= text_score)


def read_items(file: PromptFile, target: Literal["quotes", "first_quote"]) -> list[Item]:
    """Prompts with the text each quotes.

    Raises:
        DataError: a prompt quotes no text, or a line is no JSON object with a prompt.
    """
    from t2i_align.judges.ocr import target_text

    found = []
    for line_number, line in enumerate(file.text().splitlines(), 1):
        if not line.strip():
            continue
        prompt = line if file.path.suffix != ".jsonl" else _prompt(file, line_number, line)
        try:
            text = target_text(prompt, target)
        except MediaError as error:
            raise DataError(f"{file.path}:{line_number}: {error}") from error
        found.append(Item(f"{len(found):05d}", prompt, task_of(text), {"target": text}))
    return found


def _prompt(file: PromptFile, line_number: int, line: str) -> str:
    try:
        return str(json.loads(line)["prompt"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file.path}:{line_number} is no JSON object with a 'prompt'") from error


def task_of(text: str) -> str:
    """Its number of words: 1, 2, 3, or more."""
    count = len(words_of(text))
    return "1 word" if count == 1 else f"{count} words" if count < 4 else "4 words or more"
