"""Pictures for training the world's vision-language model, with the truth about them.

Scenes show no held-out combination. Clean renders know their truth. A judge must also read what
generators paint, so a share passes the autoencoder, a blur or JPEG (truth unchanged), and a share
is broken on purpose (warped, smeared into a blob, half recoloured, rubbed out) and read again by
the exact judge, whose word is the truth of it. Model samples come with the exact judge's verdict on
their caption.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy import ndimage as scipy_ndimage
from torch import Tensor

from t2i_align.errors import DataError
from t2i_align.scenes.detect import detect
from t2i_align.scenes.grammar import COLORS, RELATED, flat_prompts, held_color
from t2i_align.scenes.questions import (
    Seen,
    pick,
    things_in,
    training_side,
)
from t2i_align.scenes.render import (
    CLASSES,
    PALETTE,
    SIDE,
    SIZES,
    Scene,
    Thing,
    place,
    random_ground,
    render,
    stamp,
)

ndimage: Any = scipy_ndimage  # its stubs are narrower than its functions
PATCH = 8
GRID = SIDE // PATCH
SOFT_SHARE, BROKEN_SHARE = 0.35, 0.2
# counts by class of a training picture, and how often such pictures come
LAYOUTS: dict[tuple[int, ...], int] = {
    (1,): 14,
    (1, 1): 38,
    (2,): 8,
    (3,): 8,
    (4,): 8,
    (1, 1, 1): 10,
    (2, 1): 8,
    (3, 1): 3,
    (2, 2): 3,
}


@dataclass(frozen=True)
class Pictures:
    """Pictures with what is in them.

    Args:
        images: ``(N, 3, 64, 64)`` uint8.
        seen: what is in each.
        maps: ``(N, 64, 3)`` int64: class and colour number of the object that covers most of each
            patch (one past the last where nothing does), and 1 where an object's centre lies.
        captions: N entries, (caption, the exact verdict) of a model sample, else None.
    """

    images: Tensor
    seen: list[tuple[Seen, ...]]
    maps: Tensor
    captions: Sequence[tuple[str, bool] | None]

    def __len__(self) -> int:
        """N."""
        return len(self.seen)


def training_scene(rng: np.random.Generator) -> Scene:
    """A random scene that shows no held-out combination."""
    weights = np.array(list(LAYOUTS.values()), float)
    while True:
        layout = tuple(LAYOUTS)[int(rng.choice(len(LAYOUTS), p=weights / weights.sum()))]
        things = arranged(kinds_of(layout, rng), rng)
        if things is not None:
            return Scene(things, random_ground(rng))


def kinds_of(layout: tuple[int, ...], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Classes and colours of the training side for a layout.

    Things of one class share their colour half of the time.
    """
    while True:
        kinds = []
        for number, i in zip(layout, rng.permutation(len(CLASSES)), strict=False):
            free = [c for c in COLORS if not held_color(c, CLASSES[i])]
            one = pick(free, rng) if rng.random() < 0.5 else None
            kinds += [(CLASSES[i], one or pick(free, rng)) for _ in range(number)]
        if training_side([Seen(cls, color, (0, 0, 0, 0)) for cls, color in kinds]):
            return kinds


def arranged(kinds: list[tuple[str, str]], rng: np.random.Generator) -> tuple[Thing, ...] | None:
    """Places; two things are small half of the time, so that relations have room."""
    small = len(kinds) == 2 and rng.random() < 0.5
    return place(kinds, rng, RELATED if small else SIZES[len(kinds)])


def patch_map(masks: Sequence[np.ndarray], seen: Sequence[Seen]) -> np.ndarray:
    """``(64, 3)`` of :class:`Pictures`, from full-size bool masks of the things."""
    out = np.empty((GRID * GRID, 3), np.int64)
    out[:] = len(CLASSES), len(COLORS), 0
    if not masks:
        return out
    stack = np.stack(masks).reshape(-1, GRID, PATCH, GRID, PATCH)
    area = stack.sum((2, 4)).reshape(len(masks), -1)
    owner, most = area.argmax(0), area.max(0)
    kinds = np.array([(CLASSES.index(s.cls), COLORS.index(s.color)) for s in seen])
    out[most >= 8, :2] = kinds[owner[most >= 8]]
    for thing in seen:
        x, y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
        column, row = (int(np.clip(v // PATCH, 0, GRID - 1)) for v in (x, y))
        out[row * GRID + column, 2] = 1
    return out


def masks_of(scene: Scene) -> list[np.ndarray]:
    """Full-size bool masks of the things of a scene."""
    out = []
    for thing, seen in zip(scene.things, things_in(scene), strict=True):
        alpha = stamp(thing.cls, thing.size, round(thing.angle))
        canvas = Image.new("L", (SIDE, SIDE))
        canvas.paste(alpha, (int(seen.box[0]), int(seen.box[1])))
        out.append(np.asarray(canvas) > 100)
    return out


def look(image: np.ndarray) -> tuple[tuple[Seen, ...], np.ndarray]:
    """What the exact judge accepts in a picture, and its patch map."""
    found = [part.detection for part in detect(image) if part.accepted]
    seen = tuple(Seen(d.cls, str(d.color), d.box) for d in found)
    masks = [d.mask.decode() for d in found if d.mask is not None]
    return seen, patch_map(masks, seen)


def break_thing(image: np.ndarray, box: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """A picture with one thing warped, smeared, half recoloured or rubbed out."""
    x0, y0, x1, y1 = (int(np.clip(v, 0, SIDE)) for v in box)
    inside = np.zeros((SIDE, SIDE))
    inside[max(y0 - 2, 0) : y1 + 2, max(x0 - 2, 0) : x1 + 2] = 1
    how = int(rng.integers(4))
    if how == 0:
        return warped(image, inside, rng)
    out = image.astype(np.float32)
    weight = ndimage.gaussian_filter(inside, 1.0)[..., None]
    if how == 1:
        soft = ndimage.gaussian_filter(out, (rng.uniform(2, 4), rng.uniform(2, 4), 0))
        return (out + weight * (soft - out)).astype(np.uint8)
    ground = np.median(out[:2].reshape(-1, 3), 0)
    far = np.linalg.norm(out - ground, axis=-1, keepdims=True) > 34
    part = blotches(rng)[..., None] * weight * far
    if how == 2:
        hue = np.asarray(PALETTE[pick(COLORS, rng)], np.float32)
        return (out + part * (hue - out)).astype(np.uint8)
    return (out + part * (ground - out)).astype(np.uint8)


def blotches(rng: np.random.Generator) -> np.ndarray:
    """A smooth random mask ``(64, 64)`` in [0, 1], about half of it 1."""
    noise = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), rng.uniform(3, 7))
    return (0.5 + noise / noise.std() * 2).clip(0, 1)


def warped(image: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture bent by a smooth random field where ``inside`` is 1."""
    window = ndimage.gaussian_filter(inside, 2)
    field = ndimage.gaussian_filter(
        rng.normal(size=(2, SIDE, SIDE)), (0, *2 * (rng.uniform(2, 5),))
    )
    field *= rng.uniform(2, 7) / field.std() * window
    grid = np.indices((SIDE, SIDE)) + field
    bent = [ndimage.map_coordinates(image[..., c], grid, order=1, mode="nearest") for c in range(3)]
    return np.stack(bent, -1)


def soften(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A blur or a JPEG round trip, weak enough to leave the truth as it is."""
    picture = Image.fromarray(image)
    if rng.random() < 0.5:
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.0)))))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=int(rng.integers(50, 95)))
    return np.asarray(Image.open(stream))


@torch.inference_mode()
def through(vae: Any, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures ``(n, 64, 64, 3)`` after the autoencoder, a little noise added to the latents."""
    out = []
    for start in range(0, len(images), 64):
        x = torch.from_numpy(images[start : start + 64]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x).latent_dist.mean.float()
            z = z + torch.from_numpy(rng.normal(0, 0.1, z.shape)).float()
            y = vae.decode(z).sample.float()
        out.append(((y + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(out)


def draw_pictures(num: int, seed: int, vae: Any, tick: Callable[[int], None]) -> Pictures:
    """Renders of training scenes, some softened, some broken.

    Args:
        num: pictures.
        seed: of everything.
        vae: a diffusers AutoencoderKL of the world, or None to leave that step out.
        tick: told how many more pictures are done.
    """
    rng = np.random.default_rng([seed, 7])
    parts = []
    for start in range(0, num, 256):
        parts.append(draw_block(min(256, num - start), rng, vae))
        tick(len(parts[-1]))
    return joined(parts)


def draw_block(num: int, rng: np.random.Generator, vae: Any) -> Pictures:
    """Some pictures of :func:`draw_pictures`."""
    scenes = [training_scene(rng) for _ in range(num)]
    images = np.stack([render(scene, rng) for scene in scenes])
    broken = np.flatnonzero(rng.random(num) < BROKEN_SHARE)
    for i in broken:
        boxes = [thing.box for thing in things_in(scenes[i])]
        for box in boxes if rng.random() < 0.3 else [pick(boxes, rng)]:
            images[i] = break_thing(images[i], box, rng)
    coded = np.flatnonzero(rng.random(num) < SOFT_SHARE)
    if vae is not None and len(coded):
        images[coded] = through(vae, images[coded], rng)
    for i in np.flatnonzero(rng.random(num) < SOFT_SHARE):
        images[i] = soften(images[i], rng)
    seen = [things_in(scene) for scene in scenes]
    maps = [patch_map(masks_of(s), t) for s, t in zip(scenes, seen, strict=True)]
    for i in broken:
        seen[i], maps[i] = look(images[i])
    kept = [i for i in range(num) if training_side(seen[i])]
    return pack_pictures(
        [images[i] for i in kept], [seen[i] for i in kept], [maps[i] for i in kept]
    )


def pack_pictures(
    images: Sequence[np.ndarray],
    seen: Sequence[tuple[Seen, ...]],
    maps: Sequence[np.ndarray],
    captions: Sequence[tuple[str, bool] | None] | None = None,
) -> Pictures:
    """Lists as :class:`Pictures`."""
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    said = [None] * len(images) if captions is None else list(captions)
    return Pictures(stack, list(seen), torch.from_numpy(np.stack(maps)), said)


def joined(parts: Sequence[Pictures]) -> Pictures:
    """Several lots as one."""
    return Pictures(
        torch.cat([p.images for p in parts]),
        [s for p in parts for s in p.seen],
        torch.cat([p.maps for p in parts]),
        [c for p in parts for c in p.captions],
    )


def read_samples(path: Path, limit: int, tick: Callable[[int], None]) -> Pictures:
    """A model's samples with the exact verdict on their caption, from a file of scenes pairs.

    Rows with a held-out caption and pictures that show a held-out combination are left out.

    Args:
        path: parquet with the columns of ``t2i-align scenes pairs``.
        limit: most pictures to read, from the start of the file.
        tick: told how many more pictures are done.

    Raises:
        DataError: columns are missing, a picture is broken, or nothing usable is left.
    """
    import pyarrow.parquet as pq

    from t2i_align.scenes.pairs import decoded

    file = pq.ParquetFile(path)
    missing = {"caption", "jpg_0", "jpg_1", "correct_0", "correct_1"} - set(file.schema_arrow.names)
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(sorted(missing))}",
            "build it with `t2i-align scenes pairs`",
        )
    known = {m["prompt"] for m in flat_prompts(held_out=False)}
    rows = [r for batch in file.iter_batches(batch_size=256) for r in batch.to_pylist()]
    found = []
    for row in rows[: (limit + 1) // 2]:
        for k in (0, 1) if row["caption"] in known else ():
            image = decoded(row, f"jpg_{k}")
            seen, grid = look(image)
            if training_side(seen):
                found.append((image, seen, grid, (row["caption"], bool(row[f"correct_{k}"]))))
        tick(2)
    if not found:
        raise DataError(f"{path}: no sample of a training prompt", "use pairs of training prompts")
    return pack_pictures(*map(list, zip(*found, strict=True)))
