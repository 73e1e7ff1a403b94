"""Wrong pictures put right: the correct scene that lies nearest to a model's wrong sample.

What the exact judge finds in a picture (places, sizes, colours, ground) is kept, and the things of
the prompt are put there. All ways to do so are rendered and judged; of the correct ones the one
with the smallest pixel distance to the sample is taken. A pair of a sample and its repair differs
where the sample is wrong and hardly anywhere else, so a preference for the repair speaks of the
mistake and not of ground, place or colour, which two random pictures of a prompt never share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from t2i_align.evaluate.metrics.geneval import evaluate
from t2i_align.scenes.detect import Part, detect, detections, ground_of
from t2i_align.scenes.grammar import COLORS, RELATED, Metadata, is_related
from t2i_align.scenes.render import SIDE, SIZES, Scene, Thing, extent, overlap, render
from t2i_align.scenes.score import required

TRIES = 24  # draws of what the picture does not say
ENOUGH = 5  # draws after which the best found so far is taken
ORDERS = 12  # ways a draw to put things in places
MOST = 4  # places taken over, largest first


@dataclass(frozen=True)
class Place:
    """Where something is, and what it looks like."""

    center: tuple[float, float]
    size: float
    color: str


def places_of(parts: Sequence[Part]) -> list[Place]:
    """Places of the largest parts of a picture."""
    found = []
    for part in parts[:MOST]:
        x1, y1, x2, y2 = part.detection.box
        size = max(x2 - x1, y2 - y1)
        found.append(Place(((x1 + x2) / 2, (y1 + y2) / 2), size, str(part.detection.color)))
    return found


def filled(places: Sequence[Place], num: int, rng: np.random.Generator) -> list[Place]:
    """At least ``num`` places, the missing ones at random."""
    made = list(places)
    while len(made) < num:
        x, y = rng.uniform(14, SIDE - 14, 2)
        color = COLORS[int(rng.integers(len(COLORS)))]
        made.append(Place((float(x), float(y)), float(rng.integers(18, 31)), color))
    return made


def put(
    cls: str,
    color: str | None,
    place: Place,
    sizes: tuple[int, int],
    blur: float,
    rng: np.random.Generator,
) -> Thing:
    """A thing at a place, its size within the world's, moved a little and kept inside."""
    size = int(np.clip(round(place.size + rng.integers(-1, 2)), *sizes))
    angle = float(rng.integers(-9, 10))
    halves = (side / 2 + 1 for side in extent(cls, size, angle))
    x, y = (
        float(np.clip(at + rng.normal(0, blur), half, SIDE - half))
        for at, half in zip(place.center, halves, strict=True)
    )
    return Thing(cls, color or place.color, (x, y), size, angle)


def apart(things: Sequence[Thing]) -> bool:
    """Whether no two things come too close."""
    boxes = []
    for thing in things:
        (x, y), (width, height) = thing.center, extent(thing.cls, thing.size, thing.angle)
        boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    return not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))


def arrangements(
    parts: Sequence[Part], metadata: Metadata, blur: float, rng: np.random.Generator
) -> Iterator[tuple[Thing, ...]]:
    """Some ways to put the things of a prompt where a picture has things."""
    wanted = required(metadata)
    sizes = RELATED if metadata["tag"] == "position" else SIZES[len(wanted)]
    places = filled(places_of(parts), len(wanted), rng)
    orders = list(itertools.permutations(places, len(wanted)))
    for k in rng.permutation(len(orders))[:ORDERS]:
        things = tuple(
            put(cls, color, place, sizes, blur, rng)
            for (cls, color), place in zip(wanted, orders[k], strict=True)
        )
        if apart(things) and is_related(metadata, things):
            yield things


def repaired(
    image: Image.Image, metadata: Metadata, rng: np.random.Generator
) -> Image.Image | None:
    """The nearest correct scene that was found, None where none was.

    Args:
        image: 64 x 64 picture that is wrong for the prompt.
        metadata: of the prompt.
        rng: of what the picture does not say (angles, missing places), and of the texture.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    red, green, blue = (int(v) for v in ground_of(pixels))
    parts = detect(image)
    best: tuple[float, np.ndarray | None] = (float("inf"), None)
    for attempt in range(TRIES):
        blur = 0.75 * min(attempt, 8)  # the first draw stays where the picture has things
        for things in arrangements(parts, metadata, blur, rng):
            made = render(Scene(things, (red, green, blue)), rng)
            distance = float(((made - pixels) ** 2).mean())
            if distance < best[0] and evaluate(detections(made), None, metadata).correct:
                best = (distance, made)
        if best[1] is not None and attempt >= ENOUGH:
            break
    return None if best[1] is None else Image.fromarray(best[1])
