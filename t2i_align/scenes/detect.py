"""The exact judge: what is in a picture of the world, found without learning.

    ground      median of the border, then of the pixels near it
    foreground  pixels far from the ground; connected parts, split by colour, loose ones rejoined
    colour      nearest palette colour of the part's core
    shape       soft mask, normalised to 32 x 32, against stamps of every class in several sizes
                and angles: overlap = sum min / sum max, best over one-pixel shifts
    none        a part is an object only where its overlap passes its class's threshold and leads
                the runner-up; thresholds were set with negative controls (blobs, foreign shapes,
                letters), see ``datasets/scenes/README.md``

An accepted part gets a GenEval score above 0.9, any other part one below 0.3, so both of GenEval's
thresholds agree with the judge's own verdict and nothing is hidden from the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage as scipy_ndimage

from t2i_align.evaluate.detections import RLE, Detection
from t2i_align.scenes.render import CLASSES, PALETTE, stamp

ndimage: Any = scipy_ndimage  # its stubs are narrower than its functions
GRID = 32
INNER = 28
MIN_AREA = 14
CONTRAST = 34.0
NAMES = tuple(PALETTE)
COLORS = np.array([PALETTE[c] for c in NAMES], np.float32)
ANGLES = (-10, -5, 0, 5, 10)
SIZES = (22, 27, 40)
MARGIN = 0.02
LEEWAY = {"bowl": 0.0}  # how much better a plain shape must fit to overrule a class; 0.08 else
# overlap a part must pass, and the overlap that negative controls reach (their 99th percentile or
# more)
THRESHOLDS = {
    "umbrella": 0.64,
    "airplane": 0.59,
    "bowl": 0.86,
    "tie": 0.74,
    "bottle": 0.73,
    "tv": 0.65,
    "car": 0.57,
    "elephant": 0.765,
    "bird": 0.7,
    "bed": 0.56,
}
FLOORS = {
    "umbrella": 0.60,
    "airplane": 0.55,
    "bowl": 0.82,
    "tie": 0.72,
    "bottle": 0.70,
    "tv": 0.62,
    "car": 0.52,
    "elephant": 0.74,
    "bird": 0.68,
    "bed": 0.50,
}
# RGB to (luma, chroma, chroma), chroma weighted down: JPEG and the autoencoder keep luma sharper
SHARP = np.array(
    [
        [0.299, -0.169 * 0.35, 0.5 * 0.35],
        [0.587, -0.331 * 0.35, -0.419 * 0.35],
        [0.114, 0.5 * 0.35, -0.081 * 0.35],
    ],
    np.float32,
)
FULL = 0.95  # overlap that counts as perfect in graded scores


@dataclass(frozen=True)
class Part:
    """One part of the foreground with its best reading.

    Args:
        detection: class, score, box, mask and colour.
        overlap: of the best class.
        graded: 0 where negative controls end (:data:`FLOORS`), 1 at :data:`FULL`.
        accepted: whether it counts as an object.
    """

    detection: Detection
    overlap: float
    graded: float
    accepted: bool


def plain_shapes() -> list[np.ndarray]:
    """Masks of the class "none".

    Rectangles, ellipses and domes of several proportions and angles.
    """
    masks = []
    for kind in ("rectangle", "ellipse", "dome"):
        for share in (0.35, 0.45, 0.55, 0.7, 0.85, 1.0):
            image = Image.new("L", (160, 160))
            draw = ImageDraw.Draw(image)
            tall = 64 * share
            box = (16, 80 - tall, 144, 80 + tall)
            if kind == "rectangle":
                draw.rectangle(box, fill=255)
            elif kind == "ellipse":
                draw.ellipse(box, fill=255)
            else:
                draw.pieslice((16, 80 - tall, 144, 80 + 3 * tall), 180, 360, fill=255)
            for angle in (-10, 0, 10, 90) if kind != "dome" else (-10, 0, 10):
                turned = image.rotate(angle, Image.Resampling.BICUBIC)
                masks.append(normalised(np.asarray(turned, np.float32) / 255))
    return masks


@cache
def templates() -> tuple[np.ndarray, np.ndarray]:
    """Normalised masks ``(N, GRID, GRID)`` and their class numbers ``(N,)``, 10 for none."""
    masks, labels = [], []
    for number, cls in enumerate(CLASSES):
        for size in SIZES:
            for angle in ANGLES:
                alpha = np.asarray(stamp(cls, size, angle), np.float32) / 255
                masks.append(normalised(steep(alpha)))
                labels.append(number)
    for mask in plain_shapes():
        masks.append(mask)
        labels.append(len(CLASSES))
    return np.stack(masks), np.array(labels)


def steep(alpha: np.ndarray) -> np.ndarray:
    """Sharpen a soft mask around one half, so that blurred edges and halos weigh little."""
    return ((alpha - 0.25) * 2).clip(0, 1)


def normalised(mask: np.ndarray) -> np.ndarray:
    """A soft mask cropped to its box, longest side scaled to INNER, centred on GRID x GRID."""
    rows, columns = np.nonzero(mask > 0.3)
    crop = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = INNER / max(crop.shape)
    height, width = (max(1, round(side * scale)) for side in crop.shape)
    image = Image.fromarray((crop * 255).clip(0, 255).astype(np.uint8))
    small = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    out = np.zeros((GRID, GRID), np.float32)
    top, left = (GRID - height) // 2, (GRID - width) // 2
    out[top : top + height, left : left + width] = small
    return out


def overlaps(mask: np.ndarray) -> np.ndarray:
    """Best soft overlap with each class and with none ``(11,)``, over sizes, angles and shifts."""
    bank, labels = templates()
    query = normalised(mask)
    both = bank.sum((1, 2)) + query.sum()  # of the smaller and the larger, wherever it is moved
    best = np.zeros(len(CLASSES) + 1, np.float32)
    low = np.zeros(len(bank), np.float32)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            moved = np.roll(query, (dy, dx), (0, 1))
            np.maximum(low, np.minimum(bank, moved).sum((1, 2)), out=low)
    np.maximum.at(best, labels, low / (both - low))  # which rises with the smaller
    return best


def ground_of(image: np.ndarray) -> np.ndarray:
    """Colour of the ground ``(3,)``."""
    border = np.concatenate(
        [image[:2], image[-2:], image[:, :2].swapaxes(0, 1), image[:, -2:].swapaxes(0, 1)], 1
    )
    middle = np.median(border.reshape(-1, 3), 0)
    near = image[np.abs(image - middle).max(-1) < 24]
    return np.median(near, 0) if len(near) > 50 else middle


def color_of(core: np.ndarray) -> tuple[str, float]:
    """Nearest palette name of a part's core pixels ``(n, 3)``, and the distance."""
    middle = np.median(core, 0)
    distance = np.linalg.norm(COLORS - middle, axis=1)
    return NAMES[int(distance.argmin())], float(distance.min())


def split(image: np.ndarray, far: np.ndarray) -> list[np.ndarray]:
    """Connected parts of the foreground, those of several colours cut by colour; bool masks."""
    found, count = ndimage.label(far, np.ones((3, 3)))
    nearest = np.linalg.norm(image[..., None, :] - COLORS, axis=-1).argmin(-1)
    parts = []
    for number in range(1, count + 1):
        mask = found == number
        if mask.sum() >= MIN_AREA:
            parts += cut(image, mask, nearest)
    return parts


def cut(image: np.ndarray, mask: np.ndarray, nearest: np.ndarray) -> list[np.ndarray]:
    """A part as one piece, or one piece a colour where two solid pieces of different colour touch.

    Smeared edges (blur, chroma subsampling) are thin and vanish under erosion; touching objects do
    not.
    """
    solid = [c for c in np.unique(nearest[mask]) if chunky(mask & (nearest == c), mask)]
    if len(solid) < 2:
        return [mask]
    major = np.array(solid)
    owner = major[np.linalg.norm(image[..., None, :] - COLORS[major], axis=-1).argmin(-1)]
    pieces = []
    for color in major:
        sub, number = ndimage.label(mask & (owner == color), np.ones((3, 3)))
        pieces += [p for k in range(number) if (p := sub == k + 1).sum() >= MIN_AREA]
    return pieces


def chunky(piece: np.ndarray, whole: np.ndarray) -> bool:
    """Whether a piece is large and thick enough to be an object of its own."""
    return piece.sum() > 0.15 * whole.sum() and ndimage.binary_erosion(piece).sum() >= 10


def join(image: np.ndarray, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Give loose bits (a car's wheel, a bed's pillow) back to the larger part beside them."""
    parts = sorted(parts, key=lambda m: -int(m.sum()))
    kept: list[np.ndarray] = []
    for mask in parts:
        name = color_of(image[mask])[0]
        for place, larger in enumerate(kept):
            rows, columns = np.nonzero(larger)
            reach = max(1, round(0.06 * (max(np.ptp(rows), np.ptp(columns)) + 1)))
            near = ndimage.binary_dilation(larger, np.ones((3, 3)), iterations=reach)
            small = mask.sum() < 0.35 * larger.sum()
            if small and (near & mask).any() and color_of(image[larger])[0] == name:
                kept[place] = larger | mask
                break
        else:
            kept.append(mask)
    return kept


def detect(image: Image.Image | np.ndarray) -> list[Part]:
    """Every part of a picture, largest first, with its best class and whether it is accepted."""
    array = np.asarray(image, np.float32)[..., :3]
    ground = ground_of(array)
    far = np.linalg.norm(array - ground, axis=-1) > CONTRAST
    return [reading(array, ground, mask) for mask in join(array, split(array, far))]


def reading(image: np.ndarray, ground: np.ndarray, mask: np.ndarray) -> Part:
    """The best reading of one part."""
    core = ndimage.binary_erosion(mask)
    core = core if core.sum() >= 6 else mask
    name, _ = color_of(image[core])
    offset = (image - ground) @ SHARP
    axis = np.median(offset[core], 0)
    alpha = (offset @ axis / max(float(axis @ axis), 1e-6)).clip(0, 1)
    soft = steep(alpha) * ndimage.binary_dilation(mask, np.ones((3, 3)))
    shares = overlaps(soft if (soft > 0.3).any() else mask.astype(np.float32))
    order = [int(i) for i in np.argsort(shares[:-1])]
    best, lead = order[-1], float(shares[order[-1]] - shares[order[-2]])
    plain = bool(shares[-1] > shares[best] + LEEWAY.get(CLASSES[best], 0.08))
    cls, share = CLASSES[best], float(shares[best])
    floor = FLOORS[cls]
    graded = 0.0 if plain else float(np.clip((share - floor) / (FULL - floor), 0, 1))
    accepted = share >= THRESHOLDS[cls] and lead >= MARGIN and not plain
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    score = 0.92 + 0.08 * graded if accepted else 0.29 * graded
    found = Detection(cls, score, tuple(float(v) for v in box), RLE.encode(mask), name)  # type: ignore[arg-type]
    return Part(found, share, graded, accepted)


def detections(image: Image.Image | np.ndarray) -> list[Detection]:
    """What GenEval's evaluator is given."""
    return [part.detection for part in detect(image)]
