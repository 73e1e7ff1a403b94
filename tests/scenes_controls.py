"""Negative controls of the exact judge: pictures in which nothing of the world is to be found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from t2i_align.scenes.render import PALETTE, random_ground

Mask = np.ndarray
SUPER = 4
WIDE = 64 * SUPER


def canvas(mask: Mask, rng: np.random.Generator) -> np.ndarray:
    """A soft mask ``(64, 64)`` in a palette colour on a random ground."""
    color = np.array(list(PALETTE.values())[int(rng.integers(10))], float)
    ground = np.array(random_ground(rng), float)
    alpha = mask[..., None]
    image = ground * (1 - alpha) + color * alpha + rng.normal(0, 1.5, (64, 64, 1))
    return image.clip(0, 255).round().astype(np.uint8)


def small(image: Image.Image) -> Mask:
    """A drawing at four times the size to a soft mask."""
    return np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS), float) / 255


def blob(rng: np.random.Generator) -> Mask:
    """A random smooth blob, from round to ragged, 18 to 46 px across."""
    angle = np.linspace(0, 2 * np.pi, 256)
    rough = rng.uniform(0, 1)
    radius = 1 + rough * sum(
        rng.normal(0, 0.35 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 7)
    )
    radius = np.clip(radius, 0.25, None)
    x, y = radius * np.cos(angle), radius * np.sin(angle) * rng.uniform(0.6, 1)
    turn = rng.uniform(0, np.pi)
    x, y = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    scale = rng.uniform(18, 46) / 2 / max(np.abs(x).max(), np.abs(y).max())
    points = [
        ((32 + a * scale) * SUPER, (32 + b * scale) * SUPER) for a, b in zip(x, y, strict=True)
    ]
    image = Image.new("L", (WIDE, WIDE))
    ImageDraw.Draw(image).polygon(points, fill=255)
    return small(image)


def shape(rng: np.random.Generator) -> Mask:
    """A plain shape of no class: polygon, star, disc, ring, cross, rectangle, half disc."""
    half, middle = rng.uniform(20, 46) / 2 * SUPER, WIDE / 2
    image = Image.new("L", (WIDE, WIDE))
    draw = ImageDraw.Draw(image)
    box = (middle - half, middle - half, middle + half, middle + half)
    kind = int(rng.integers(8))
    if kind < 3:
        corners, depth = ((3, 1.0), (5, 0.45), (4, 1.0))[kind]
        turn = rng.uniform(-0.2, 0.2) - np.pi / 2
        number = corners * (2 if depth < 1 else 1)
        reach = [half * (depth if i % 2 and depth < 1 else 1) for i in range(number)]
        angles = [turn + 2 * np.pi * i / number for i in range(number)]
        points = [
            (middle + r * np.cos(a), middle + r * np.sin(a))
            for r, a in zip(reach, angles, strict=True)
        ]
        draw.polygon(points, fill=255)
    elif kind == 3:
        draw.ellipse(box, fill=255)
    elif kind == 4:
        draw.ellipse(box, fill=255)
        draw.ellipse(tuple(middle + (v - middle) / 2 for v in box), fill=0)  # type: ignore[arg-type]
    elif kind == 5:
        third = half / 3
        draw.rectangle((middle - half, middle - third, middle + half, middle + third), fill=255)
        draw.rectangle((middle - third, middle - half, middle + third, middle + half), fill=255)
    elif kind == 6:
        tall = half * rng.uniform(0.45, 1)
        draw.rectangle((middle - half, middle - tall, middle + half, middle + tall), fill=255)
    else:
        draw.pieslice(box, 180, 360, fill=255)
    return small(image)


def letter(rng: np.random.Generator) -> Mask:
    """A bold letter or digit: glyphs of another set."""
    image = Image.new("L", (WIDE, WIDE))
    font = ImageFont.load_default(int(rng.uniform(24, 54) * SUPER))
    text = "ABCDEFGHJKLMNOPQRSTUVWXYZ0123456789&?#@"[int(rng.integers(39))]
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font, stroke_width=3)
    place = (WIDE / 2 - (left + right) / 2, WIDE / 2 - (top + bottom) / 2)
    weight = int(rng.integers(0, 8))
    draw.text(place, text, font=font, fill=255, stroke_width=weight, stroke_fill=255)
    return small(image)


CONTROLS: dict[str, Callable[[np.random.Generator], Mask]] = {
    "blobs": blob,
    "shapes": shape,
    "letters": letter,
}
