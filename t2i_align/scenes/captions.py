"""Preference between captions, in two forms; verdicts are the exact judge's.

*One picture, two captions* (TDPO, TKTO): a right picture of a pair file under its prompt and under
a false caption, the nearest training prompt of the same task that the judge finds wrong of this
picture: fewest words changed, ties by a coin. So one thing of it is wrong: a colour, a class, a
relation or a number.

*Two pictures, each under its own caption* (DCPO): the right picture of a pair under its prompt, the
wrong one under what it does show, the nearest training prompt, of any task, that is true of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from t2i_align.data.rows import local_path
from t2i_align.errors import DataError
from t2i_align.evaluate.metrics.geneval import evaluate
from t2i_align.progress import progress
from t2i_align.scenes.detect import detect
from t2i_align.scenes.grammar import Metadata, flat_prompts
from t2i_align.scenes.pairs import decoded

COLUMNS = ["caption", "jpg_0", "jpg_1", "correct_0", "correct_1", "ranking_id"]


def words_apart(a: str, b: str) -> int:
    """Places at which two prompts have other words; other lengths count every place beyond."""
    x, y = a.split(), b.split()
    return sum(u != v for u, v in zip(x, y, strict=False)) + abs(len(x) - len(y))


def nearest(
    picture: np.ndarray,
    prompt: str,
    candidates: Sequence[Metadata],
    rng: np.random.Generator,
    *,
    true: bool,
) -> str | None:
    """The candidate closest to ``prompt`` that is true, or false, of the picture.

    None when there is none, or when it is ``prompt`` itself (compression may tip a close verdict).

    Args:
        picture: ``(h, w, 3)`` uint8.
        prompt: what the picture was drawn for.
        candidates: prompts to choose from.
        rng: decides between equally close ones.
        true: which verdict is looked for.
    """
    found = [part.detection for part in detect(Image.fromarray(picture))]
    order = rng.permutation(len(candidates))
    distance = [words_apart(prompt, candidates[i]["prompt"]) for i in order]
    for place in np.argsort(distance, kind="stable"):
        metadata = candidates[int(order[place])]
        if evaluate(found, None, metadata).correct == true:
            return None if metadata["prompt"] == prompt else metadata["prompt"]
    return None


def caption_rows(
    pairs: Sequence[dict[str, Any]], seed: int, *, own: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of a file for the source ``captions``, in one of the two forms above.

    Args:
        pairs: rows of a pair file.
        seed: of the coin.
        own: two pictures, each under its own caption.

    Raises:
        DataError: a pair of a prompt that is not of the training side.
    """
    everything = flat_prompts(held_out=False)
    tag_of = {m["prompt"]: m["tag"] for m in everything}
    for row in pairs:
        if row["caption"] not in tag_of:
            raise DataError(
                f"'{row['caption']}' is no training prompt of the world",
                "use a file of `t2i-align scenes pairs` without --held-out",
            )
        tag = tag_of[row["caption"]]
        if own:
            yield from own_captions(row, everything, seed)
        else:
            yield from two_captions(row, [m for m in everything if m["tag"] == tag], seed)


def two_captions(
    row: dict[str, Any], candidates: Sequence[Metadata], seed: int
) -> Iterator[dict[str, Any]]:
    """``image``, ``prompt``, ``negative_prompt``, ``id`` for every right picture of a pair."""
    for side in ("0", "1"):
        if not row[f"correct_{side}"]:
            continue
        rng = np.random.default_rng([seed, row["ranking_id"], int(side)])
        picture = decoded(row, f"jpg_{side}")
        negative = nearest(picture, row["caption"], candidates, rng, true=False)
        if negative is not None:
            image, name = row[f"jpg_{side}"], f"{row['ranking_id']}-{side}"
            made = {"id": name, "image": image, "prompt": row["caption"]}
            yield made | {"negative_prompt": negative}


def own_captions(
    row: dict[str, Any], candidates: Sequence[Metadata], seed: int
) -> Iterator[dict[str, Any]]:
    """Both images, ``chosen_prompt``, ``rejected_prompt``, ``id`` for a pair with one right."""
    if row["correct_0"] == row["correct_1"]:
        return
    right, wrong = ("0", "1") if row["correct_0"] else ("1", "0")
    rng = np.random.default_rng([seed, row["ranking_id"], int(wrong)])
    shown = nearest(decoded(row, f"jpg_{wrong}"), row["caption"], candidates, rng, true=True)
    if shown is not None:
        yield {
            "id": str(row["ranking_id"]),
            "image_chosen": row[f"jpg_{right}"],
            "image_rejected": row[f"jpg_{wrong}"],
            "chosen_prompt": row["caption"],
            "rejected_prompt": shown,
        }


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """Rows of a pair file.

    Raises:
        DataError: it is missing, no parquet, or of other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=COLUMNS).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"--pairs: {path} is no readable parquet with the columns {', '.join(COLUMNS)}",
            "make one with `t2i-align scenes pairs`",
        ) from error


def build_captions(files: Sequence[Path], out: Path, seed: int, *, own: bool = False) -> int:
    """Write a parquet file that the source ``captions`` reads; returns its rows.

    Args:
        files: pair files of own samples; ``bundled/scenes/pairs.parquet`` is one.
        out: new parquet file.
        seed: of the coin.
        own: two pictures a row, each under its own caption.

    Raises:
        DataError: a file cannot be used, or nothing came of it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = [row for file in files for row in read_pairs(local_path(str(file)))]
    rows = []
    with progress(Console(stderr=True), "pairs", len(pairs)) as bar:
        for row in pairs:
            rows += caption_rows([row], seed, own=own)
            bar.advance(1)
    if not rows:
        wanted = "pair has one right picture" if own else "picture is right"
        raise DataError(f"no {wanted} in {len(pairs)} pairs", "use pairs of a trained model")
    pq.write_table(pa.Table.from_pylist(rows), out, compression="zstd")
    return len(rows)
