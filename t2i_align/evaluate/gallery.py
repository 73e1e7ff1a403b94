"""Pictures of a comparison: which are shown, and what a page needs to know of each.

Chosen by position only. Of each task the first N; of those whose verdict changed the first ones,
one task after the other in turn, so that no task crowds out the rest. Both numbers are halved until
the pictures fit into ``MAX_BYTES``. Small PNG files are shown as they are; larger pictures are
shrunk, their boxes stay in the pixels of the original.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.errors import DataError
from t2i_align.evaluate.compare import value_of
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.geneval import DEFAULTS
from t2i_align.evaluate.provenance import read_object

PER_TASK = 24
CHANGED = 60
MAX_BYTES = 5_500_000  # of all pictures as base64
FONT = 0.072  # of a box's label, relative to the picture's width
ADVANCE = 0.66  # width of a letter relative to the font, estimated
SMALL = 256  # a PNG of at most this side is shown as it is
SHOWN = 384  # side of a picture that is shrunk
SHRUNK_BYTES = 30_000  # of such a picture, estimated

Rows = Sequence[dict[str, Any]]
Folders = tuple[Path, Path]


@dataclass(frozen=True)
class Chosen:
    """Positions of the pairs that are shown.

    Args:
        tasks: by task.
        changed: of ``repaired`` and ``broken`` pairs.
    """

    tasks: dict[str, list[int]]
    changed: dict[str, list[int]]

    @property
    def every(self) -> list[int]:
        """Each position once, one entry for each place it is shown at."""
        return [k for part in (self.tasks, self.changed) for ks in part.values() for k in ks]


@dataclass(frozen=True)
class Box:
    """A detection as it is drawn, in pixels of the picture.

    Args:
        x: left edge.
        y: upper edge.
        width: of the box.
        height: of the box.
        label: colour, class and score.
        counted: whether GenEval keeps it.
        text: where the label starts, left end of its base line.
    """

    x: float
    y: float
    width: float
    height: float
    label: str
    counted: bool
    text: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """One picture with its verdict.

    Args:
        side: ``before`` or ``after``.
        uri: the picture as a data address.
        size: width and height in pixels.
        correct: the verdict; of benchmarks that only give scores None.
        reason: why it is wrong; empty when it is right.
        graded: graded score in [0, 1].
        boxes: detections, those that count last, so that they lie on top.
    """

    side: str
    uri: str
    size: tuple[int, int]
    correct: bool | None
    reason: str
    graded: float
    boxes: tuple[Box, ...]

    @property
    def font(self) -> float:
        """Size of the labels in pixels of the picture."""
        return round(FONT * self.size[0], 2)

    @property
    def said(self) -> str:
        """The verdict in a word."""
        return {True: "right", False: "wrong", None: "scored"}[self.correct]

    @property
    def seen(self) -> str:
        """The detections in words."""
        words = [b.label + ("" if b.counted else " (not counted)") for b in reversed(self.boxes)]
        return ", ".join(words) or "nothing"


@dataclass(frozen=True)
class Pair:
    """One prompt and noise before and after."""

    number: int
    task: str
    prompt: str
    change: str
    sides: tuple[Picture, Picture]


def change_of(before: dict[str, Any], after: dict[str, Any]) -> str:
    """``repaired``, ``broken``, or which verdict stayed; of scores the direction, or ``equal``."""
    first, second = value_of(before), value_of(after)
    if first != second:
        return "repaired" if second > first else "broken"
    return {True: "right", False: "wrong", None: "equal"}[after["correct"]]


def in_turn(numbers: Iterable[int], rows: Rows, limit: int) -> list[int]:
    """The first ``limit`` numbers, one of each task in turn, then in order of position."""
    queues: dict[str, list[int]] = defaultdict(list)
    for k in numbers:
        queues[rows[k]["tag"]].append(k)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues.values()))
    return sorted(itertools.islice((k for k in turns if k is not None), limit))


def choose(folders: Folders, before: Rows, after: Rows, max_bytes: int = MAX_BYTES) -> Chosen:
    """Which pairs are shown.

    Args:
        folders: of the evaluations.
        before: their result rows.
        after: the same prompts in the same order.
        max_bytes: of all pictures as base64; one pair a task and kind is shown whatever its size.
    """
    tasks: dict[str, list[int]] = defaultdict(list)
    kinds: dict[str, list[int]] = defaultdict(list)
    for k, pair in enumerate(zip(before, after, strict=True)):
        tasks[before[k]["tag"]].append(k)
        kinds[change_of(*pair)].append(k)
    per_task, limit = PER_TASK, CHANGED
    while True:
        chosen = Chosen(
            {t: ks[:per_task] for t, ks in tasks.items()},
            {kind: in_turn(kinds[kind], before, limit) for kind in ("repaired", "broken")},
        )
        files = (
            picture_file(folder, rows[k])
            for k in chosen.every
            for folder, rows in zip(folders, (before, after), strict=True)
        )
        if sum(map(shown_bytes, files)) * 4 / 3 <= max_bytes or per_task == 1:
            return chosen
        per_task, limit = max(1, per_task // 2), max(1, limit // 2)


def pairs_of(
    folders: Folders, before: Rows, after: Rows, numbers: Iterable[int]
) -> dict[int, Pair]:
    """Pairs by position.

    Args:
        folders: of the evaluations.
        before: their result rows.
        after: the same prompts in the same order.
        numbers: positions, repeated ones are read once.

    Raises:
        DataError: a picture is missing, lies outside its folder or cannot be read.
    """
    return {
        k: Pair(
            k,
            before[k]["tag"],
            before[k]["prompt"],
            change_of(before[k], after[k]),
            (picture(folders[0], before[k], "before"), picture(folders[1], after[k], "after")),
        )
        for k in dict.fromkeys(numbers)
    }


def picture_file(folder: Path, row: dict[str, Any]) -> Path:
    """The file of a result row.

    Raises:
        DataError: it is missing or lies outside the folder.
    """
    root = picture_root(folder)
    file = root / row["filename"]
    if not file.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{folder}: results.jsonl names {row['filename']!r}, outside its folder")
    if not file.is_file():
        raise DataError(f"picture {file} is missing", "run `t2i-align eval` into the folder again")
    return file


def picture_root(folder: Path) -> Path:
    """What the pictures' names of an evaluation are relative to."""
    elsewhere = read_object(folder / "protocol.json").get("pictures")
    return Path(elsewhere) if isinstance(elsewhere, str) else folder


def shown_bytes(file: Path) -> int:
    """About how many bytes a picture has on a page."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            kept = image.format == "PNG" and max(image.size) <= SMALL
    except (UnidentifiedImageError, OSError):
        kept = True  # said by whoever shows it
    return file.stat().st_size if kept else SHRUNK_BYTES


def picture(folder: Path, row: dict[str, Any], side: str) -> Picture:
    """What the page needs of one result row."""
    uri, size = address(picture_file(folder, row))
    found = [Detection.from_dict(d) for d in row.get("detections", ())]
    name = "counting_threshold" if row["tag"] == "counting" else "threshold"
    protocol = read_object(folder / "protocol.json").get("protocol", {})
    threshold = protocol.get(name, DEFAULTS.model_dump()[name])
    boxes = boxes_of(found, threshold, size)
    correct = row["correct"]
    return Picture(
        side,
        uri,
        size,
        None if correct is None else bool(correct),
        "; ".join(row["reason"].splitlines()),
        float(row["graded"]),
        tuple(sorted(boxes, key=lambda b: b.counted)),
    )


def address(file: Path) -> tuple[str, tuple[int, int]]:
    """A picture as a data address, shrunk where it is large, and its size in pixels.

    Raises:
        DataError: it is neither PNG, JPEG nor WebP.
    """
    from PIL import Image, UnidentifiedImageError

    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
            size, kind = image.size, image.format
            if kind != "PNG" or max(size) > SMALL:
                small = image.convert("RGB")
                small.thumbnail((SHOWN, SHOWN))
                stream = io.BytesIO()
                small.save(stream, "JPEG", quality=88)
                data, kind = stream.getvalue(), "JPEG"
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"picture {file} is no PNG, JPEG or WebP file") from error
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}", size


def boxes_of(found: Sequence[Detection], threshold: float, size: tuple[int, int]) -> list[Box]:
    """Detections as they are drawn; labels keep clear of each other where there is room.

    Args:
        found: detections.
        threshold: what counts scores more; only that has a label.
        size: width and height of the picture.
    """
    boxes: list[Box] = []
    for detection in found:
        labels = [b for b in boxes if b.counted]
        boxes.append(box_of(detection, detection.score > threshold, size, labels))
    return boxes


def box_of(
    found: Detection, counted: bool, size: tuple[int, int], others: Sequence[Box] = ()
) -> Box:
    """A detection with a label that stays inside the picture: above its box, else below, else in.

    Args:
        found: the detection.
        counted: whether the benchmark keeps it.
        size: width and height of the picture.
        others: whose labels are there already.
    """
    x1, y1, x2, y2 = found.box
    label = " ".join(p for p in (found.color, found.cls, f"{found.score:.2f}") if p)
    font = FONT * size[0]
    left = max(0.0, min(x1, size[0] - ADVANCE * font * len(label)))
    lines = [y1 - 0.3 * font] if y1 >= font * 1.2 else []
    lines += [y2 + 0.95 * font] if y2 + 1.1 * font <= size[1] else []
    lines += [y1 + 1.1 * font, (y1 + y2) / 2, y2 - 0.3 * font]
    made = [
        Box(x1, y1, x2 - x1, y2 - y1, label, counted, (round(left, 2), round(line, 2)))
        for line in lines
    ]
    return next((b for b in made if not any(_collide(b, o, font) for o in others)), made[0])


def _collide(a: Box, b: Box, font: float) -> bool:
    """Whether two labels lie over each other."""
    first, second = (min((a, b), key=lambda x: x.text), max((a, b), key=lambda x: x.text))
    return second.text[0] - first.text[0] < ADVANCE * font * len(first.label) and (
        abs(a.text[1] - b.text[1]) < font
    )
