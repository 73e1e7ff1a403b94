"""Preference pairs: a model's own samples on training prompts, labelled by the exact judge.

For each prompt K samples are drawn and judged. The best against the worst by (verdict, graded
score) makes a pair; where they agree in the verdict and differ by at most ``TIE`` in graded score,
the pair is kept as a tie (label 0.5), so that consumers have to handle ties. Columns are
Pick-a-Pic's.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from t2i_align.data.media_io import to_image
from t2i_align.evaluate.metrics.geneval import evaluate
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.process.seeds import derive
from t2i_align.scenes.detect import detect
from t2i_align.scenes.grammar import Metadata, sample_prompts
from t2i_align.scenes.score import graded_score

TIE = 0.08


def encoded(image: Image.Image) -> bytes:
    """A small JPEG with full chroma."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=93, subsampling=0)
    return stream.getvalue()


def verdicts(images: Sequence[Image.Image], metadata: Metadata) -> list[tuple[bool, float]]:
    """(GenEval's verdict, graded score) of pictures of one prompt."""
    out = []
    for image in images:
        parts = detect(image)
        correct = evaluate([p.detection for p in parts], None, metadata).correct
        out.append((correct, graded_score(parts, metadata)))
    return out


def pair_of(
    images: Sequence[Image.Image], metadata: Metadata, number: int
) -> dict[str, Any] | None:
    """One row: best and worst sample in random order, or None where all are hopeless."""
    scores = verdicts(images, metadata)
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
        "jpg_0": encoded(images[first]),
        "jpg_1": encoded(images[second]),
        "label_0": label,
        "label_1": 1 - label,
        "has_label": True,
        "ranking_id": number,
        "score_0": scores[first][1],
        "score_1": scores[second][1],
        "correct_0": scores[first][0],
        "correct_1": scores[second][0],
    }


def build_pairs(
    generator: DiffusersGenerator,
    path: Path,
    *,
    num_prompts: int,
    console: Console,
    samples: int = 4,
    seed: int = 0,
    guidance: float = 3.0,
    batch: int = 16,
) -> dict[str, float]:
    """Sample, judge, write parquet.

    Args:
        generator: policy loaded.
        path: parquet file to write.
        num_prompts: training prompts drawn, tasks evenly.
        console: for progress.
        samples: pictures of each prompt.
        seed: of prompts and noise.
        guidance: of sampling.
        batch: prompts at once.

    Returns:
        counts: pairs, ties, and the share of right samples.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    items = sample_prompts(num_prompts, seed, held_out=False)
    rows: list[dict[str, Any]] = []
    for start in track(range(0, num_prompts, batch), "pairs", console=console):
        part = [m for m in items[start : start + batch] for _ in range(samples)]
        seeds = [
            derive(seed, m["prompt"], start * samples + i, "pairs") for i, m in enumerate(part)
        ]
        with torch.autocast(generator.device.type, torch.bfloat16):
            inputs = generator.prepare_sampling(
                [m["prompt"] for m in part], num_steps=20, guidance=guidance
            )
            rolled = generator.rollout(inputs, torch.tensor(seeds), "policy")
            pictures = [to_image(m) for m in generator.decode(rolled.sample)]
        for i in range(0, len(part), samples):
            row = pair_of(pictures[i : i + samples], part[i], start + i // samples)
            rows += [] if row is None else [row]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none")
    right = np.mean([r[k] for r in rows for k in ("correct_0", "correct_1")])
    ties = sum(r["label_0"] == 0.5 for r in rows)
    return {"pairs": len(rows), "ties": ties, "right": float(right)}
