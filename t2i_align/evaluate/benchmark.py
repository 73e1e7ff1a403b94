"""What a benchmark is: prompts, raw answers about pictures, and verdicts that follow from those.

    items -> pictures -> answers (models run here; stored) -> verdicts (pure) -> summary

Answers are stored as they were given (detections with their colours, yes/no with probabilities,
recognised text), so verdicts can be recomputed from the file under other rules, and two detectors
compared. Everything a number depends on is in ``identity``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from t2i_align.evaluate.aggregate import Interval
from t2i_align.options import Options

Answer = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Args:
        id: unique and stable, also the name of its folder of pictures, e.g. ``00012``.
        prompt: what a model is given.
        task: the category that is reported apart.
        metadata: what verdicts need, as the benchmark's own file has it.
    """

    id: str
    prompt: str
    task: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """One picture of a prompt.

    Args:
        item: its prompt.
        number: which of the prompt's pictures, from 0.
        file: of the picture; it may be absent when stored answers are replayed.
    """

    item: Item
    number: int
    file: Path


@dataclass(frozen=True)
class Verdict:
    """What a picture (or, for benchmarks that pool them, a prompt's pictures) is worth.

    Args:
        score: the benchmark's own unit.
        correct: for benchmarks that say right or wrong.
        reason: in words, empty when right.
        parts: further numbers, e.g. a score a question.
    """

    score: float
    correct: bool | None = None
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A benchmark's numbers.

    Args:
        tasks: mean score of each task.
        overall: the benchmark's own total with a bootstrap interval over prompts.
        tables: further tables by name: row -> number (e.g. by category level).
    """

    tasks: Mapping[str, float]
    overall: Interval
    tables: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Benchmark(Protocol):
    """One benchmark with its options resolved; implementations do not inherit from this.

    Class attributes:
        Options: prompt file, variant, judge or detector, their weights.
    """

    Options: ClassVar[type[Options]]

    @property
    def images_per_prompt(self) -> int:
        """How many pictures of each prompt the protocol asks for."""
        ...

    def items(self) -> list[Item]:
        """All prompts in the benchmark's order.

        Raises:
            DataError: the prompt file is missing, or is not the pinned one.
        """
        ...

    def answers(self, pictures: Sequence[Picture]) -> list[Answer]:
        """Raw answers about some pictures, JSON-able; the only place where models run."""
        ...

    def verdicts(self, pictures: Sequence[Picture], answers: Sequence[Answer]) -> list[Verdict]:
        """Pure: what the answers mean for each picture."""
        ...

    def summary(self, pictures: Sequence[Picture], verdicts: Sequence[Verdict]) -> Summary:
        """Pure: tasks and total by the benchmark's own rule."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Prompt file's sha256, variant, detectors and judges with the hash of their weights."""
        ...
