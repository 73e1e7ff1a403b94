"""Captions by the exact judge: false ones of right pictures, true ones of wrong pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_builders import source
from PIL import Image

from t2i_align.errors import DataError
from t2i_align.scenes.captions import build_captions, caption_rows, nearest, words_apart
from t2i_align.scenes.grammar import Metadata, prompts, scene_for
from t2i_align.scenes.pairs import encoded, verdicts
from t2i_align.scenes.render import render

TRAINING = {m["prompt"]: m for items in prompts(held_out=False).values() for m in items}


def picture(metadata: Metadata, seed: int = 0) -> np.ndarray:
    """A correct render."""
    rng = np.random.default_rng(seed)
    return render(scene_for(metadata, rng), rng)


def pair(metadata: Metadata, number: int, *, correct_1: bool = False) -> dict[str, Any]:
    """A row of a pair file whose first picture is right."""
    image = encoded(Image.fromarray(picture(metadata, number)))
    facts = {"caption": metadata["prompt"], "jpg_0": image, "jpg_1": image}
    return facts | {"correct_0": True, "correct_1": correct_1, "ranking_id": number}


def test_words_apart() -> None:
    assert words_apart("a photo of a red car", "a photo of a blue car") == 1
    assert words_apart("a photo of a car", "a photo of two red cars") == 3


def test_every_false_caption_is_a_near_training_prompt_that_is_false() -> None:
    """Eight prompts of each task: the judge finds the picture right and the caption wrong."""
    chosen = [m for items in prompts(held_out=False).values() for m in items[:: len(items) // 8]]
    rows = list(caption_rows([pair(m, k) for k, m in enumerate(chosen)], seed=0))
    assert len(rows) >= 0.95 * len(chosen)
    for row in rows:
        image = Image.open(io.BytesIO(row["image"])).convert("RGB")
        true, false = TRAINING[row["prompt"]], TRAINING[row["negative_prompt"]]
        assert verdicts([image], true)[0][0] and not verdicts([image], false)[0][0]
        assert true["tag"] == false["tag"]
    assert np.mean([words_apart(r["prompt"], r["negative_prompt"]) for r in rows]) < 2


def test_a_true_caption_is_passed_over_for_the_next_one() -> None:
    """Of a red car "a photo of a car" is true as well, so a farther caption is taken."""
    red, car, bird = (TRAINING[f"a photo of a {x}"] for x in ("red car", "car", "bird"))
    image = picture(red)
    rng = np.random.default_rng(0)
    assert nearest(image, red["prompt"], [red, car, bird], rng, true=False) == bird["prompt"]
    assert nearest(image, red["prompt"], [red, car], rng, true=False) is None
    assert nearest(image, bird["prompt"], [bird, car], rng, true=False) is None, "not right itself"


def test_the_wrong_picture_of_a_pair_gets_the_nearest_caption_that_is_true(tmp_path: Path) -> None:
    """Winners of eight prompts of each task under them, losers under what they show."""
    by_task = prompts(held_out=False)
    wanted = [m for items in by_task.values() for m in items[:: len(items) // 8]]
    shown = [m for items in by_task.values() for m in items[3 :: len(items) // 8]]
    pairs = []
    for k, (m, other) in enumerate(zip(wanted, shown, strict=False)):
        drawn = Image.fromarray(picture(other, 100 + k))
        if not verdicts([drawn], m)[0][0]:
            pairs.append(
                pair(m, k) | {"jpg_0": encoded(drawn), "correct_0": False, "correct_1": True}
            )
    rows = list(caption_rows(pairs, seed=0, own=True))
    assert len(rows) >= 0.9 * len(pairs) >= 20
    for row in rows:
        right, wrong = (
            Image.open(io.BytesIO(row[f"image_{side}"])).convert("RGB")
            for side in ("chosen", "rejected")
        )
        true, own = TRAINING[row["chosen_prompt"]], TRAINING[row["rejected_prompt"]]
        assert verdicts([right], true)[0][0] and not verdicts([wrong], true)[0][0]
        assert verdicts([wrong], own)[0][0]
    file, out = tmp_path / "pairs.parquet", tmp_path / "own.parquet"
    equal = pair(wanted[0], 999, correct_1=True)  # two right pictures prefer nothing
    pq.write_table(pa.Table.from_pylist([*pairs, equal]), file)
    assert build_captions([file], out, 0, own=True) == len(rows)
    winner, loser = next(iter(source("captions", path=str(out)))).items
    assert (winner.prompt, loser.prompt) == (rows[0]["chosen_prompt"], rows[0]["rejected_prompt"])
    assert winner.media.data == rows[0]["image_chosen"]


def test_both_pictures_of_a_pair_are_used_and_the_source_reads_the_file(tmp_path: Path) -> None:
    single = prompts(held_out=False)["colors"]
    rows = [pair(single[0], 0, correct_1=True), pair(single[1], 1)]
    pairs = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), pairs)
    out = tmp_path / "captions.parquet"
    assert build_captions([pairs], out, 0) == 3
    records = list(source("captions", path=str(out)))
    assert [r.id for r in records] == ["0-0", "0-1", "1-0"]
    for record in records:
        good, bad = record.items
        assert good.media is bad.media or good.media.data == bad.media.data
        assert good.prompt != bad.prompt
    assert build_captions([pairs], tmp_path / "again.parquet", 0) == 3
    assert (tmp_path / "again.parquet").read_bytes() == out.read_bytes()


def test_files_that_are_no_pairs_are_named(tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), other)
    for path in (tmp_path / "none.parquet", other):
        with pytest.raises(DataError, match=r"--pairs: .*is no readable parquet with the columns"):
            build_captions([path], tmp_path / "out.parquet", 0)
    wrong = tmp_path / "wrong.parquet"
    row = pair(prompts(held_out=False)["colors"][0], 0) | {"correct_0": False}
    pq.write_table(pa.Table.from_pylist([row]), wrong)
    with pytest.raises(DataError, match="no picture is right in 1 pairs"):
        build_captions([wrong], tmp_path / "out.parquet", 0)
    assert not (tmp_path / "out.parquet").exists()


def test_held_out_pairs_are_refused() -> None:
    held = prompts(held_out=True)["colors"][0]
    with pytest.raises(DataError, match="is no training prompt"):
        list(caption_rows([pair(held, 0)], seed=0))
