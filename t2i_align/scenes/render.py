"""Pictures of the embedded world: 1 to 4 flat icons on a plain ground, 64 x 64.

A scene is data (which class, colour, place, size, angle); rendering it is deterministic given the
generator that textures the ground. Icons are alpha masks of the catalogue folder
``datasets/scenes/icons`` (their licence beside them).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from t2i_align.catalog import find_root

CLASSES = (
    "umbrella",
    "airplane",
    "bowl",
    "tie",
    "bottle",
    "tv",
    "car",
    "elephant",
    "bird",
    "bed",
)
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (250, 138, 22),
    "yellow": (250, 222, 36),
    "green": (34, 150, 56),
    "blue": (36, 84, 214),
    "purple": (122, 46, 166),
    "pink": (250, 142, 190),
    "brown": (112, 66, 32),
    "black": (18, 18, 18),
    "white": (246, 246, 246),
}
SIDE = 64
GAP = 2  # pixels between boxes
SIZES = {1: (36, 46), 2: (25, 30), 3: (23, 27), 4: (21, 25)}  # longest side by number of things


@dataclass(frozen=True)
class Thing:
    """One icon of a scene.

    Args:
        cls: class name.
        color: palette name.
        center: (x, y) in pixels.
        size: longest side in pixels before rotation.
        angle: degrees.
    """

    cls: str
    color: str
    center: tuple[float, float]
    size: int
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Things on a ground of one colour."""

    things: tuple[Thing, ...]
    ground: tuple[int, int, int] = (138, 138, 138)


@cache
def icon(cls: str) -> Image.Image:
    """The alpha mask of a class, longest side 128."""
    path = find_root() / "datasets" / "scenes" / "icons" / f"{cls}.png"
    return Image.open(path).convert("L")


@cache
def stamp(cls: str, size: int, angle: int) -> Image.Image:
    """An icon scaled to ``size`` and rotated by whole degrees, cropped to its support."""
    mask = icon(cls)
    if angle:
        mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    scale = size / 128
    width, height = (max(1, round(side * scale)) for side in mask.size)
    mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    rows, columns = np.nonzero(np.asarray(mask) > 40)
    left, top = int(columns.min()), int(rows.min())
    return mask.crop((left, top, int(columns.max()) + 1, int(rows.max()) + 1))


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """``(64, 64, 3)`` uint8; ``rng`` textures the ground and jitters colours slightly."""
    noise = rng.normal(0, 1.5, (SIDE, SIDE, 1)).astype(np.float32)
    slope = rng.normal(0, 3, 2)
    line = np.linspace(-1, 1, SIDE, dtype=np.float32)
    ramp = slope[0] * line[:, None] + slope[1] * line[None, :]
    image = np.asarray(scene.ground, np.float32) + ramp[..., None] + noise
    for thing in scene.things:
        mask = stamp(thing.cls, thing.size, round(thing.angle))
        left = round(thing.center[0] - mask.width / 2)
        top = round(thing.center[1] - mask.height / 2)
        color = np.asarray(PALETTE[thing.color], np.float32) + rng.normal(0, 4, 3)
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + mask.width, SIDE), min(top + mask.height, SIDE)
        alpha = np.asarray(mask, np.float32)[y0 - top : y1 - top, x0 - left : x1 - left, None] / 255
        part = image[y0:y1, x0:x1]
        image[y0:y1, x0:x1] = part * (1 - alpha) + color * alpha
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def extent(cls: str, size: int, angle: float) -> tuple[int, int]:
    """Width and height of a stamp."""
    return stamp(cls, size, round(angle)).size


def random_ground(rng: np.random.Generator) -> tuple[int, int, int]:
    """A mid grey with a slight tint, apart from every palette colour."""
    grey = rng.integers(120, 161)
    r, g, b = (int(np.clip(grey + rng.integers(-7, 8), 0, 255)) for _ in range(3))
    return r, g, b


def place(
    kinds: list[tuple[str, str]], rng: np.random.Generator, sizes: tuple[int, int]
) -> tuple[Thing, ...] | None:
    """Random places for (class, colour) things, boxes at least GAP apart; None when none was found.

    Args:
        kinds: one to four things.
        rng: source of places, sizes and angles.
        sizes: smallest and largest longest side.
    """
    for attempt in range(400):
        shrink = attempt // 100
        boxes: list[tuple[float, float, float, float]] = []
        things: list[Thing] = []
        for cls, color in kinds:
            size = int(rng.integers(sizes[0], sizes[1] + 1)) - shrink
            angle = float(rng.integers(-9, 10))
            width, height = extent(cls, size, angle)
            x = rng.uniform(1 + width / 2, SIDE - 1 - width / 2)
            y = rng.uniform(1 + height / 2, SIDE - 1 - height / 2)
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            if any(overlap(box, b) for b in boxes):
                break
            boxes.append(box)
            things.append(Thing(cls, color, (x, y), size, angle))
        else:
            return tuple(things)
    return None


def overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    """Whether two boxes come closer than GAP."""
    apart = a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]
    return not apart
