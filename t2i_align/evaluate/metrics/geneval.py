"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): is everything the prompt names in the picture?

The verdict is a pure function of (detections, image, metadata); the image serves the colour
classifier only. Rules follow the released evaluator (djghosh13/geneval,
evaluation/evaluate_images.py and summary_scores.py, commit af4902f):

    keep       score > threshold in float32 (the counting task has its own, for every class);
               best first, at most ``max_objects`` a class; overlapping ones only if asked
    include    the best ``count`` of a class must exist, then have the colour, then stand in the
               relation to every member of an earlier clause; lower-ranked ones neither rescue
               nor hurt
    exclude    fewer than ``count`` of a class may be kept

    relation of box a to box b, per axis:  c = centre(a) - centre(b),  w = size(a) + size(b)
    (1)  s = sign(c) max(|c| - t w, 0)            boxes that nearly coincide have no relation
    (2)  d = s / ||c||                            by the length of the offset before shrinking
    (3)  left of: d_x < -1/2, right of: d_x > 1/2, above: d_y < -1/2, below: d_y > 1/2

Two relations hold near a diagonal and either satisfies a prompt. The released code prints them in
the order of a Python set; here they are sorted. Equal scores keep the order they came in (there:
whatever numpy's sort does).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
from pydantic import Field

from t2i_align.errors import DataError
from t2i_align.evaluate.detections import Box, Detection
from t2i_align.options import Options

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
RELATIONS = ("left of", "right of", "above", "below")

ColorOf = Callable[[Any, Detection, str], str]


class GenEvalOptions(Options):
    """Options of the GenEval verdict, with the released defaults."""

    threshold: float = Field(
        default=0.3, ge=0, lt=1, description="a kept detection scores more than this"
    )
    counting_threshold: float = Field(
        default=0.9, ge=0, lt=1, description="the same in the counting task, for every class"
    )
    max_objects: int = Field(default=16, ge=1, description="detections kept of a class")
    max_overlap: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="a detection whose IoU with a better one of its class reaches this is "
        "dropped; 1 keeps all",
    )
    position_threshold: float = Field(
        default=0.1, ge=0, description="share of the summed sizes by which an offset is shrunk"
    )


DEFAULTS = GenEvalOptions()


@dataclass(frozen=True)
class Clause:
    """One demand of a prompt.

    Args:
        cls: class name.
        count: how many.
        color: which of :data:`COLORS`, or None.
        position: relation and index of the earlier clause it refers to, or None.
    """

    cls: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows its prompt.

    Args:
        correct: no reason speaks against it.
        reasons: what is wrong, a line for each failed clause.
        kept: detections above the threshold by class, best first, with the colours asked for.
    """

    correct: bool
    reasons: tuple[str, ...]
    kept: dict[str, list[Detection]]


def read_clauses(metadata: Mapping[str, Any]) -> tuple[list[Clause], list[Clause]]:
    """The include and exclude clauses of a prompt's metadata.

    Raises:
        DataError: a clause says something that this evaluator would ignore or trip over.
    """
    include: list[Clause] = []
    for index, record in enumerate(metadata.get("include", ())):
        where = f"include clause {index} of {metadata.get('prompt', '')!r}"
        include.append(_clause(record, where, index))
    exclude = [
        _clause(record, f"exclude clause {index} of {metadata.get('prompt', '')!r}", None)
        for index, record in enumerate(metadata.get("exclude", ()))
    ]
    return include, exclude


def _clause(record: Mapping[str, Any], where: str, index: int | None) -> Clause:
    """One clause; ``index`` is its place among the include clauses, None for exclude."""
    allowed = ["class", "count"] + ([] if index is None else ["color", "position"])
    unknown = sorted(set(record) - set(allowed))
    if unknown:
        raise DataError(f"{where}: unknown {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    name, count, color = record.get("class"), record.get("count"), record.get("color")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: class is the name of a class, got {name!r}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise DataError(f"{where}: count is a whole number >= 1, got {count!r}")
    if color is not None and color not in COLORS:
        raise DataError(f"{where}: color {color!r}; allowed: {', '.join(COLORS)}")
    position = record.get("position")
    return Clause(name, count, color, None if position is None else _place(position, where, index))


def _place(position: Any, where: str, index: int | None) -> tuple[str, int]:
    """Relation and target of a clause, the target an earlier clause."""
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise DataError(f"{where}: position is [relation, index], got {position!r}")
    relation, target = position
    if relation not in RELATIONS:
        raise DataError(f"{where}: relation {relation!r}; allowed: {', '.join(RELATIONS)}")
    if not isinstance(target, int) or isinstance(target, bool):
        raise DataError(f"{where}: the index of a position is a whole number, got {target!r}")
    if not 0 <= target < (index or 0):
        raise DataError(
            f"{where}: position points to clause {target}, which does not come earlier",
            "put the clause it refers to before it and count from 0",
        )
    return relation, target


def relations(a: Box, b: Box, threshold: float = 0.1) -> frozenset[str]:
    """Where box ``a`` lies relative to box ``b``: none, one or two of :data:`RELATIONS`.

    Eq. (1) to (3) of the module; ``threshold`` is t.
    """
    offset, shrunk = [], []
    for low, high in ((0, 2), (1, 3)):
        c = (a[low] + a[high]) / 2 - (b[low] + b[high]) / 2
        w = abs(a[high] - a[low]) + abs(b[high] - b[low])
        offset.append(c)
        shrunk.append(math.copysign(max(abs(c) - threshold * w, 0.0), c))  # (1)
    if max(abs(s) for s in shrunk) < 1e-3:
        return frozenset()
    d_x, d_y = (s / math.hypot(*offset) for s in shrunk)  # (2)
    holds = (d_x < -0.5, d_x > 0.5, d_y < -0.5, d_y > 0.5)  # (3)
    return frozenset(name for name, true in zip(RELATIONS, holds, strict=True) if true)


def overlap(a: Box, b: Box) -> float:
    """Intersection over union with GenEval's inclusive pixels: a side is x2 - x1 + 1."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def keep(
    detections: Iterable[Detection], tag: str, options: GenEvalOptions = DEFAULTS
) -> dict[str, list[Detection]]:
    """The detections that count, by class, best first; classes with none do not appear."""
    threshold = options.counting_threshold if tag == "counting" else options.threshold
    by_class: dict[str, list[Detection]] = {}
    for detection in detections:
        if np.float32(detection.score) > np.float32(threshold):
            by_class.setdefault(detection.cls, []).append(detection)
    return {name: _best(found, options) for name, found in by_class.items()}


def _best(found: list[Detection], options: GenEvalOptions) -> list[Detection]:
    """Best first, at most ``max_objects``, and then none that overlaps a better one."""
    ranked = sorted(found, key=lambda d: float(np.float32(d.score)), reverse=True)
    ranked = ranked[: options.max_objects]
    if options.max_overlap == 1:
        return ranked
    kept: list[Detection] = []
    for detection in ranked:
        if all(overlap(detection.box, better.box) < options.max_overlap for better in kept):
            kept.append(detection)
    return kept


def evaluate(
    detections: Iterable[Detection],
    image: Any,
    metadata: Mapping[str, Any],
    options: GenEvalOptions = DEFAULTS,
    color_of: ColorOf | None = None,
) -> Verdict:
    """Does the image show what its prompt asks for?

    Args:
        detections: everything the detector found, in any order.
        image: handed to ``color_of`` untouched; None will do where nothing asks for a colour.
        metadata: ``{"tag", "include", "exclude", "prompt"}`` of a GenEval prompt.
        options: thresholds.
        color_of: answers (image, detection, class) with one of :data:`COLORS`; asked only about
            the detections a colour clause looks at. None: the colours stored in the detections.

    Raises:
        DataError: the metadata is malformed, or a colour is needed and not known.
    """
    if not isinstance(metadata.get("tag"), str):
        raise DataError(f"metadata needs a tag (the task's name), got {metadata.get('tag')!r}")
    include, exclude = read_clauses(metadata)
    kept = keep(detections, metadata["tag"], options)
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for clause in include:
        found = kept.get(clause.cls, [])[: clause.count]
        reason = _too_few(clause, found)
        if reason is None and clause.color is not None:
            found = [_colored(d, image, color_of) for d in found]
            kept[clause.cls][: clause.count] = found
            reason = _wrong_color(clause, found)
        if reason is None and clause.position is not None:
            reason = _misplaced(clause, clause.position, found, groups, options.position_threshold)
        reasons += [] if reason is None else [reason]
        groups.append(found if reason is None else None)
    for clause in exclude:
        number = len(kept.get(clause.cls, []))
        if number >= clause.count:
            reasons.append(f"expected {clause.cls}<{clause.count}, found {number}")
    return Verdict(not reasons, tuple(reasons), kept)


def _too_few(clause: Clause, found: Sequence[Detection]) -> str | None:
    if len(found) >= clause.count:
        return None
    return f"expected {clause.cls}>={clause.count}, found {len(found)}"


def _colored(detection: Detection, image: Any, color_of: ColorOf | None) -> Detection:
    """The detection with its colour, asked for or stored."""
    what = f"the {detection.cls} at {list(detection.box)} (score {detection.score:.3f})"
    color = detection.color if color_of is None else color_of(image, detection, detection.cls)
    if color is None:
        raise DataError(
            f"{what} has no stored colour and its prompt asks for one",
            "pass color_of, or detections of an evaluation of the same prompt",
        )
    if color not in COLORS:
        raise DataError(f"the colour of {what} is {color!r}; allowed: {', '.join(COLORS)}")
    return replace(detection, color=color)


def _wrong_color(clause: Clause, found: Sequence[Detection]) -> str | None:
    seen = [detection.color for detection in found]
    right = seen.count(clause.color)
    if right >= clause.count:
        return None
    histogram = ", ".join(f"{seen.count(color)} {color}" for color in COLORS if color in seen)
    wanted = f"{clause.color} {clause.cls}>={clause.count}"
    return f"expected {wanted}, found {right} {clause.color}; and {histogram}"


def _misplaced(
    clause: Clause,
    position: tuple[str, int],
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    threshold: float,
) -> str | None:
    """The first pair that does not stand in the relation."""
    relation, index = position
    targets = groups[index]
    if targets is None:
        return f"no target for {clause.cls} to be {relation}"
    for subject in found:
        for target in targets:
            actual = relations(subject.box, target.box, threshold)
            if relation not in actual:
                seen = " and ".join(sorted(actual))
                return f"expected {clause.cls} {relation} target, found {seen} target"
    return None


class TaskSummary(TypedDict):
    """One task: share of right images, how many of how many."""

    mean: float
    correct: int
    count: int


class Summary(TypedDict):
    """What :func:`summary` returns; shares are between 0 and 1."""

    num_images: int
    num_prompts: int
    images: float
    prompts: float
    tasks: dict[str, TaskSummary]
    overall: float
    missing: list[str]


def summary(rows: Iterable[Mapping[str, Any]]) -> Summary:
    """GenEval's numbers from one row an image.

    ``images`` is the share of right images, ``prompts`` that of prompts with at least one right
    image, ``overall`` the plain mean over the tasks present; ``missing`` names the others of the
    six, without which the overall is another number than GenEval's.

    Args:
        rows: ``tag``, ``correct`` (bool) and ``metadata`` (the prompt's, a JSON string or a
            mapping; images with equal metadata are of one prompt).

    Raises:
        DataError: there is no row, or ``correct`` is not a bool.
    """
    tasks: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    for number, row in enumerate(rows):
        correct, metadata = row["correct"], row["metadata"]
        if not isinstance(correct, bool | np.bool_):
            raise DataError(f"row {number}: correct is true or false, got {correct!r}")
        key = metadata if isinstance(metadata, str) else json.dumps(metadata, sort_keys=True)
        prompts[key] = prompts.get(key, False) or bool(correct)
        tasks.setdefault(row["tag"], []).append(bool(correct))
    if not tasks:
        raise DataError("no verdict to summarise", "evaluate at least one image first")
    names = [*(t for t in TASKS if t in tasks), *(t for t in tasks if t not in TASKS)]
    images = [correct for verdicts in tasks.values() for correct in verdicts]
    return Summary(
        num_images=len(images),
        num_prompts=len(prompts),
        images=sum(images) / len(images),
        prompts=sum(prompts.values()) / len(prompts),
        tasks={name: _task(tasks[name]) for name in names},
        overall=sum(_task(tasks[name])["mean"] for name in names) / len(names),
        missing=[name for name in TASKS if name not in tasks],
    )


def _task(verdicts: Sequence[bool]) -> TaskSummary:
    right, count = sum(verdicts), len(verdicts)
    return TaskSummary(mean=right / count, correct=right, count=count)
