"""What the world's dual encoder learns from: groups of two pictures and a few prompts.

    render group   a scene that fulfils a training prompt, and its damaged twin: one thing of
                   another class or colour, gone, or added, colours or places exchanged, or two
                   such scenes mixed by a soft random mask (blends, bleeding colours, holes), or
                   warped
    sample group   two samples of a model on a training prompt (scenes/pairs.py)
    prompts        the group's own, prompts that differ from it in one fact, and one at random

Every (picture, prompt) gets the exact judge's answer y = (verdict + graded score) / 2, which orders
pictures as the judge does: a right one above 1/2, a wrong one below. Only training prompts occur.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2i_align.evaluate.metrics.geneval import evaluate
from t2i_align.scenes.detect import Part, detect
from t2i_align.scenes.grammar import (
    COLORS,
    RELATIONS,
    Metadata,
    flat_prompts,
    sample_prompts,
    scene_for,
)
from t2i_align.scenes.render import (
    CLASSES,
    GAP,
    SIDE,
    Scene,
    Thing,
    extent,
    overlap,
    render,
)
from t2i_align.scenes.score import graded_score

NUM_TEXTS = 6  # own, four that differ in one fact, one at random
CELLS = 4  # a side of the map on which the trunk is told what lies where
NONE = len(CLASSES)
CHUNK = 250
Key = tuple[str, tuple[tuple[str, str | None, int], ...], str | None]


@dataclass(frozen=True)
class Pool:
    """G groups.

    Args:
        images: ``(G, 2, 64, 64, 3)`` uint8.
        texts: ``(G, NUM_TEXTS)`` int64, places in :func:`vocabulary`; the first is the own prompt.
        targets: ``(G, 2, NUM_TEXTS)`` float32, y of the module.
        classes: ``(G, 2, CELLS, CELLS)`` int64, class at each cell, NONE where there is none.
        colors: the same of colours, -100 where there is none.
    """

    images: np.ndarray
    texts: np.ndarray
    targets: np.ndarray
    classes: np.ndarray
    colors: np.ndarray

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.images)

    def take(self, index: np.ndarray | slice) -> Pool:
        """Some of the groups."""
        return Pool(*(getattr(self, f.name)[index] for f in fields(self)))


def joined(pools: Sequence[Pool]) -> Pool:
    """Several pools as one."""
    return Pool(*(np.concatenate([getattr(p, f.name) for p in pools]) for f in fields(Pool)))


@cache
def vocabulary() -> list[Metadata]:
    """Every training prompt, in a fixed order."""
    return flat_prompts(held_out=False)


@cache
def places() -> dict[Key, int]:
    """Place in the vocabulary by facts."""
    return {key_of(m): i for i, m in enumerate(vocabulary())}


@cache
def by_task() -> list[list[int]]:
    """Places in the vocabulary by task."""
    tags = [m["tag"] for m in vocabulary()]
    return [[i for i, t in enumerate(tags) if t == tag] for tag in dict.fromkeys(tags)]


def key_of(metadata: Metadata) -> Key:
    """The facts of a prompt: task, (class, colour, count) of each clause, relation."""
    clauses = metadata["include"]
    nouns = tuple((c["class"], c.get("color"), c["count"]) for c in clauses)
    relation = clauses[1]["position"][0] if metadata["tag"] == "position" else None
    return metadata["tag"], nouns, relation


def edited(key: Key, rng: np.random.Generator) -> Key:
    """A prompt's facts with one of them changed; may be no prompt at all."""
    tag, nouns, relation = key
    which = int(rng.integers(len(nouns)))
    cls, color, count = nouns[which]
    ways = {
        "class": lambda: (str(rng.choice(CLASSES)), color, count),
        "color": lambda: (cls, str(rng.choice(COLORS)), count),
        "count": lambda: (cls, color, count + int(rng.choice((-1, 1)))),
    }
    names = ["class", *(["color"] if color else []), *(["count"] if tag == "counting" else [])]
    names += ["task"] + (["swap", "swap"] if len(nouns) == 2 and tag != "two_object" else [])
    names += ["relation"] if relation else []
    way = str(rng.choice(names))
    if way == "relation":
        return tag, nouns, str(rng.choice(RELATIONS))
    if way == "swap":
        (a, p, n), (b, q, m) = nouns
        return tag, ((b, p, n), (a, q, m)), relation
    if way == "task":
        return (
            ("two_object" if len(nouns) == 2 else "single_object"),
            tuple((c, None, 1) for c, _, _ in nouns),
            None,
        )
    changed = ways[way]()
    return tag, tuple(changed if i == which else n for i, n in enumerate(nouns)), relation


def texts_for(metadata: Metadata, rng: np.random.Generator) -> list[int]:
    """Places of the prompts a group is asked about."""
    key = key_of(metadata)
    found = [places()[key]]
    for _ in range(100):
        other = places().get(edited(key, rng))
        if other is not None and other not in found:
            found.append(other)
        if len(found) == NUM_TEXTS - 1:
            break
    while len(found) < NUM_TEXTS:
        tasks = by_task()
        one = int(rng.choice(tasks[int(rng.integers(len(tasks)))]))
        found += [] if one in found else [one]
    return found


def answers(parts: Sequence[Part], texts: Sequence[int]) -> list[float]:
    """The answers y of one picture under prompts."""
    seen = [p.detection for p in parts]
    items = [vocabulary()[t] for t in texts]
    return [(evaluate(seen, None, m).correct + graded_score(parts, m)) / 2 for m in items]


def cells(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Class and colour of the accepted parts at the cells of their centres."""
    classes = np.full((CELLS, CELLS), NONE)
    colors = np.full((CELLS, CELLS), -100)
    for part in parts:
        if part.accepted:
            x1, y1, x2, y2 = part.detection.box
            at = tuple(min(CELLS - 1, int(v * CELLS / (2 * SIDE))) for v in (y1 + y2, x1 + x2))
            classes[at] = CLASSES.index(part.detection.cls)
            colors[at] = COLORS.index(part.detection.color or "")
    return classes, colors


def group(metadata: Metadata, pair: Sequence[np.ndarray], rng: np.random.Generator) -> Pool:
    """One group of two pictures, judged."""
    parts = [detect(image) for image in pair]
    texts = texts_for(metadata, rng)
    marks = [cells(p) for p in parts]
    return Pool(
        np.stack(pair)[None],
        np.array([texts]),
        np.array([[answers(p, texts) for p in parts]], np.float32),
        np.stack([m[0] for m in marks])[None],
        np.stack([m[1] for m in marks])[None],
    )


def altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene with one fact changed."""
    things = list(scene.things)
    i = int(rng.integers(len(things)))
    way = str(rng.choice(("class", "color", "remove", "add", "colors", "mirror")))
    if way == "class":
        things[i] = replace(things[i], cls=str(rng.choice(CLASSES)))
    elif way == "color":
        things[i] = replace(things[i], color=str(rng.choice(COLORS)))
    elif way == "remove":
        del things[i]
    elif way == "add":
        things += added(things, rng)
    elif way == "colors":
        colors = [t.color for t in things]
        things = [replace(t, color=colors[k - 1]) for k, t in enumerate(things)]
    else:
        x, y = rng.integers(2, size=2)
        things = [replace(t, center=flipped(t.center, x > 0, y > 0)) for t in things]
    return replace(scene, things=tuple(things))


def flipped(center: tuple[float, float], x: bool, y: bool) -> tuple[float, float]:
    """A place mirrored across the middle."""
    return (SIDE - center[0] if x else center[0], SIDE - center[1] if y else center[1])


def added(things: Sequence[Thing], rng: np.random.Generator) -> list[Thing]:
    """One more thing of a class that is there or any, where there is room; else none."""
    names = [*CLASSES, *([t.cls for t in things] * 10)]
    boxes = [box_of(t) for t in things]
    for _ in range(40):
        x, y = rng.uniform(11, SIDE - 11, 2)
        name, color = str(rng.choice(names)), str(rng.choice(COLORS))
        thing = Thing(name, color, (x, y), int(rng.integers(18, 26)))
        if not any(overlap(box_of(thing), b) for b in boxes):
            return [thing]
    return []


def box_of(thing: Thing) -> tuple[float, float, float, float]:
    """Box of a thing, half the gap smaller on each side."""
    width, height = (side - GAP for side in extent(thing.cls, thing.size, thing.angle))
    x, y = thing.center
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def field(rng: np.random.Generator, knots: int = 4) -> np.ndarray:
    """A smooth random field ``(64, 64)`` of about unit variance."""
    coarse = Image.fromarray(rng.normal(size=(knots, knots)).astype(np.float32))
    return 1.5 * np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def warped(image: np.ndarray, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """A picture bent by smooth displacements of about ``amplitude`` pixels."""
    from scipy.ndimage import map_coordinates

    at = np.mgrid[:SIDE, :SIDE] + amplitude * np.stack([field(rng, 6), field(rng, 6)])
    bands = [map_coordinates(image[..., c], at, order=1, mode="nearest") for c in range(3)]
    return np.stack(bands, -1)


def damaged(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The twin of a scene: altered, mixed with the altered one, or bent; ``(64, 64, 3)`` uint8."""
    kind = rng.random()
    image = render(scene if kind < 0.2 else altered(scene, rng), rng)
    if kind > 0.6:
        weight = 1 / (1 + np.exp(-4 * (field(rng) + rng.normal(0, 0.5))))[..., None]
        image = weight * image + (1 - weight) * render(scene, rng)
        image = np.clip(np.round(image), 0, 255).astype(np.uint8)
    if kind < 0.2 or rng.random() < 0.3:
        image = warped(image, rng.uniform(0.5, 4), rng)
    return image


def render_chunk(job: tuple[int, int, int]) -> Pool:
    """``num`` render groups of one chunk: (num, seed, chunk number)."""
    num, seed, number = job
    rng = np.random.default_rng([seed, number, 7])
    made = []
    for item in sample_prompts(num, int(rng.integers(2**31)), held_out=False):
        scene = scene_for(item, rng)
        made.append(group(item, (render(scene, rng), damaged(scene, rng)), rng))
    return joined(made)


def render_pools(num: int, seed: int, workers: int) -> Iterator[Pool]:
    """Chunks of render groups, the same for any number of workers."""
    sizes = [min(CHUNK, num - start) for start in range(0, num, CHUNK)]
    jobs = [(size, seed, i) for i, size in enumerate(sizes)]
    if workers < 2:
        yield from map(render_chunk, jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(render_chunk, jobs)


def sample_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of pair files on training prompts, others left out."""
    import pyarrow.parquet as pq

    known = {m["prompt"] for m in vocabulary()}
    rows: list[dict[str, Any]] = []
    for file in files:
        rows += pq.read_table(file, columns=["caption", "jpg_0", "jpg_1"]).to_pylist()
    return [r for r in rows if r["caption"] in known]


def sample_pools(rows: Sequence[dict[str, Any]], seed: int) -> Iterator[Pool]:
    """One group a row, judged anew.

    Raises:
        DataError: a picture is broken.
    """
    from t2i_align.scenes.pairs import decoded
    from t2i_align.scenes.parse import parse

    for number, row in enumerate(rows):
        rng = np.random.default_rng([seed, number, 8])
        pair = [decoded(row, key) for key in ("jpg_0", "jpg_1")]
        yield group(parse(row["caption"]), pair, rng)
