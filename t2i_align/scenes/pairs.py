"""Preference pairs: a model's own samples on training prompts, labelled by the exact judge.

For each prompt K samples are drawn and judged. The best against the worst by (verdict, graded
score) makes a pair; where they agree in the verdict and differ by at most ``TIE`` in graded score,
the pair is kept as a tie (label 0.5), so that consumers have to handle ties. With renders as
winners, a correct render stands against the best and the worst sample, where they are wrong; with
repairs as winners, every wrong sample stands against itself put right (``repair.py``). Columns are
Pick-a-Pic's; pictures are AVIF with colour at full resolution, of which 64 px take some 400 bytes
in a parquet file. (Half the resolution, as in WebP, takes 60 % of the energy of coloured edges, and
a policy trained on such files loses sharpness; docs/scenes.md.)
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from rich.console import Console

from t2i_align.contract import MediaError
from t2i_align.data.cache import tensors_sha256
from t2i_align.data.images import open_image
from t2i_align.errors import DataError
from t2i_align.evaluate.metrics.geneval import evaluate
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.process.seeds import derive
from t2i_align.progress import progress
from t2i_align.rollout.generate import sample_images
from t2i_align.scenes.detect import detect
from t2i_align.scenes.grammar import Metadata, sample_prompts, scene_for
from t2i_align.scenes.parts import Parts
from t2i_align.scenes.render import render
from t2i_align.scenes.repair import repaired
from t2i_align.scenes.score import graded_score

TIE = 0.08
STORED: dict[str, Any] = {
    "quality": 65,
    "subsampling": "4:4:4",
    "speed": 2,
    "max_threads": 1,
    "advanced": {"tune": "psnr"},  # of the same size as tuned to ssim, with cleaner colours
}


def encoded(image: Image.Image, *, lossless: bool = False) -> bytes:
    """A small file that keeps 94 % of the energy of coloured edges and 99.7 % of the contrast.

    Args:
        image: to store.
        lossless: a file seven times as large that keeps all of it.
    """
    stream = io.BytesIO()
    if lossless:
        image.save(stream, "WEBP", lossless=True)
    else:
        image.save(stream, "AVIF", **STORED)
    return stream.getvalue()


def decoded(row: Mapping[str, Any], key: str) -> np.ndarray:
    """A picture ``(h, w, 3)`` uint8 of a row of a pair file.

    Args:
        row: with ``caption`` and ``key``.
        key: ``jpg_0`` or ``jpg_1``.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        return np.asarray(open_image(row[key] or b""))
    except MediaError as error:
        raise DataError(
            f"{key} of the pair '{row['caption']}': {error}",
            "build the file again with `t2i-align scenes pairs`",
        ) from error


def verdicts(images: Sequence[Image.Image], metadata: Metadata) -> list[tuple[bool, float]]:
    """(GenEval's verdict, graded score) of pictures of one prompt."""
    out = []
    for image in images:
        parts = detect(image)
        correct = evaluate([p.detection for p in parts], None, metadata).correct
        out.append((correct, graded_score(parts, metadata)))
    return out


def pair_of(
    images: Sequence[Image.Image], metadata: Metadata, number: int, *, lossless: bool = False
) -> dict[str, Any] | None:
    """One row: best and worst picture in random order, or None where all are hopeless.

    Verdicts are those of the files, so that a reader of the row comes to the same.
    """
    files = [encoded(image, lossless=lossless) for image in images]
    scores = verdicts([open_image(file) for file in files], metadata)
    order = sorted(range(len(images)), key=lambda i: scores[i])
    worst, best = order[0], order[-1]
    tie = scores[best][0] == scores[worst][0] and scores[best][1] - scores[worst][1] <= TIE
    if scores[best][1] == 0:
        return None
    flip = derive(0, metadata["prompt"], number, "pair order") % 2 == 1
    first, second = (worst, best) if flip else (best, worst)
    label = 0.5 if tie else float(first == best)
    return {
        "caption": metadata["prompt"],
        "jpg_0": files[first],
        "jpg_1": files[second],
        "label_0": label,
        "label_1": 1 - label,
        "has_label": True,
        "ranking_id": number,
        "score_0": scores[first][1],
        "score_1": scores[second][1],
        "correct_0": scores[first][0],
        "correct_1": scores[second][0],
    }


def every_pair(
    images: Sequence[Image.Image], metadata: Metadata, number: int, *, lossless: bool
) -> list[dict[str, Any] | None]:
    """A row for every two pictures that differ."""
    pairs = itertools.combinations(images, 2)
    numbers = itertools.count(1000 * number)
    rows = [pair_of(p, metadata, next(numbers), lossless=lossless) for p in pairs]
    return [r for r in rows if r is not None and r["label_0"] != 0.5]


def render_pairs(
    images: Sequence[Image.Image], metadata: Metadata, number: int, settings: PairSettings
) -> list[dict[str, Any] | None]:
    """A correct render over the best and the worst picture, where they are wrong."""
    scores = verdicts(images, metadata)
    order = sorted(range(len(images)), key=lambda i: scores[i])
    rows = []
    for k in dict.fromkeys((order[0], order[-1])):
        if not scores[k][0]:
            rng = np.random.default_rng([settings.seed, number, k, 2])
            truth = Image.fromarray(render(scene_for(metadata, rng), rng))
            both, place = [truth, images[k]], 1000 * number + 500 + k
            rows.append(pair_of(both, metadata, place, lossless=settings.lossless))
    return rows


def repair_pairs(
    images: Sequence[Image.Image], metadata: Metadata, number: int, settings: PairSettings
) -> list[dict[str, Any] | None]:
    """Every wrong picture put right, over itself."""
    rows = []
    for k, (image, (correct, _)) in enumerate(zip(images, verdicts(images, metadata), strict=True)):
        truth = None
        if not correct:
            truth = repaired(image, metadata, np.random.default_rng([settings.seed, number, k, 3]))
        place, lossless = 1000 * number + 700 + k, settings.lossless
        row = truth and pair_of([truth, image], metadata, place, lossless=lossless)
        if row and row["correct_0"] != row["correct_1"]:  # a file may turn a verdict at the edge
            rows.append(row)
    return rows


def rows_of(
    images: Sequence[Image.Image], metadata: Metadata, number: int, settings: PairSettings
) -> list[dict[str, Any] | None]:
    """Every row of one prompt's pictures."""
    rows: list[dict[str, Any] | None] = []
    if settings.winners in ("samples", "both") and settings.pairing == "all":
        rows += every_pair(images, metadata, number, lossless=settings.lossless)
    elif settings.winners in ("samples", "both"):
        rows.append(pair_of(images, metadata, 1000 * number, lossless=settings.lossless))
    if settings.winners in ("renders", "both"):
        rows += render_pairs(images, metadata, number, settings)
    if settings.winners == "repairs":
        rows += repair_pairs(images, metadata, number, settings)
    return rows


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made.

    Args:
        num_prompts: prompts drawn, tasks evenly.
        samples: pictures of each prompt.
        winners: own samples, renders over wrong samples, both kinds of pairs, or wrong samples put
            right over themselves.
        pairing: of a prompt's own samples; ``all`` leaves ties out.
        held_out: prompts of the held-out side: for measuring judges, never for training.
        seed: of prompts and noise.
        guidance: of sampling.
        batch: prompts at once.
        lossless: pictures are stored as they are, in files seven times as large.
    """

    num_prompts: int
    samples: int = 4
    winners: Literal["samples", "renders", "both", "repairs"] = "samples"
    pairing: Literal["best_worst", "all"] = "best_worst"
    held_out: bool = False
    seed: int = 0
    guidance: float = 3.0
    batch: int = 16
    lossless: bool = False


def draw_samples(
    generator: DiffusersGenerator, items: Sequence[Metadata], start: int, settings: PairSettings
) -> list[list[Image.Image]]:
    """``samples`` pictures of each prompt; ``start`` numbers the first of all pictures."""
    part = [m for m in items for _ in range(settings.samples)]
    seeds = [derive(settings.seed, m["prompt"], start + i, "pairs") for i, m in enumerate(part)]
    texts = [m["prompt"] for m in part]
    pictures = sample_images(
        generator, texts, seeds, num_steps=20, guidance=settings.guidance, bf16=True
    )
    return [pictures[i : i + settings.samples] for i in range(0, len(part), settings.samples)]


def batch_rows(
    generator: DiffusersGenerator, items: Sequence[Metadata], start: int, settings: PairSettings
) -> list[dict[str, Any]]:
    """Rows of the prompts ``items``, the first of which is number ``start``."""
    drawn = draw_samples(generator, items, start * settings.samples, settings)
    rows: list[dict[str, Any] | None] = []
    for number, (metadata, images) in enumerate(zip(items, drawn, strict=True), start):
        rows += rows_of(images, metadata, number, settings)
    return [row for row in rows if row is not None]


def identity_of(generator: DiffusersGenerator, settings: PairSettings) -> dict[str, Any]:
    """Everything the pairs depend on: settings, model and the weights that draw."""
    drawn = {"text": dict(generator.text_key()), "media": dict(generator.media_key())}
    return asdict(settings) | drawn | {"weights": tensors_sha256(generator.module.state_dict())}


def build_pairs(
    generator: DiffusersGenerator, path: Path, settings: PairSettings, console: Console
) -> dict[str, float]:
    """Sample, judge, write parquet; what a stopped call has done is not done again.

    Returns:
        counts: pairs, ties, and the share of right pictures.

    Raises:
        DataError: no pair came of it.
    """
    items = sample_prompts(settings.num_prompts, settings.seed, held_out=settings.held_out)
    parts = Parts(path, identity_of(generator, settings))
    kept: list[dict[str, Any]] = []
    with progress(console, "prompts", len(items)) as bar:
        for start in range(0, len(items), settings.batch):
            part = items[start : start + settings.batch]
            rows = parts.read(start)
            if rows is None:
                rows = batch_rows(generator, part, start, settings)
                parts.write(start, rows)
            kept += rows
            bar.advance(len(part))
    if not kept:
        own = settings.winners == "samples"
        why = "all of a prompt are alike" if own else "none is wrong and can be put right"
        raise DataError(
            f"no pair in {len(items) * settings.samples} pictures: {why}",
            "draw for more prompts, or take winners of another kind",
        )
    parts.finish(kept)
    right = np.mean([r[k] for r in kept for k in ("correct_0", "correct_1")])
    ties = sum(r["label_0"] == 0.5 for r in kept)
    return {"pairs": len(kept), "ties": ties, "right": float(right)}
