"""Repairs: right for the prompt, nearest to the wrong picture, and reproducible."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from t2i_align.scenes.grammar import Metadata, sample_prompts, scene_for
from t2i_align.scenes.pairs import PairSettings, decoded, rows_of, verdicts
from t2i_align.scenes.parse import parse
from t2i_align.scenes.render import Scene, Thing, render
from t2i_align.scenes.repair import repaired

GROUND = (140, 138, 136)


def picture(*things: Thing) -> Image.Image:
    return Image.fromarray(render(Scene(things, GROUND), np.random.default_rng(7)))


def distance(a: Image.Image, b: Image.Image) -> float:
    x, y = (np.asarray(i, np.float32) for i in (a, b))
    return float(((x - y) ** 2).mean())


def wrong_pictures(num: int) -> list[tuple[Metadata, Image.Image]]:
    """Scenes of one training prompt, asked under another of the same task."""
    found = []
    for k, metadata in enumerate(sample_prompts(2 * num, 3, held_out=False)):
        rng = np.random.default_rng([5, k])
        other = sample_prompts(1, 100 + k, held_out=False)[0]
        image = Image.fromarray(render(scene_for(other, rng), rng))
        if not verdicts([image], metadata)[0][0]:
            found.append((metadata, image))
    return found[:num]


def test_only_the_wrong_thing_changes() -> None:
    """A bed where a bird was asked for: the car stays where and what it is."""
    car, bed = Thing("car", "red", (18, 18), 27), Thing("bed", "blue", (45, 46), 27)
    image = picture(car, bed)
    metadata = parse("a photo of a red car and a blue bird")
    found = repaired(image, metadata, np.random.default_rng(0))
    assert found is not None
    assert verdicts([found], metadata)[0][0]
    upper, lower = (0, 0, 34, 32), (30, 32, 64, 64)
    assert distance(found.crop(upper), image.crop(upper)) < 500
    assert distance(found.crop(lower), image.crop(lower)) > 1000


def test_a_relation_is_turned_by_exchanging_the_two() -> None:
    """Both places stay taken; what stands in them is exchanged."""
    left, right = Thing("tv", "green", (16, 32), 24), Thing("bird", "red", (47, 32), 24)
    metadata = parse("a photo of a tv right of a bird")
    found = repaired(picture(left, right), metadata, np.random.default_rng(0))
    assert found is not None
    assert verdicts([found], metadata)[0][0]
    moved = np.abs(np.asarray(found, int) - np.asarray(GROUND)).sum(-1) > 60
    rows, columns = np.nonzero(moved)
    assert abs(rows.mean() - 32) < 5
    assert columns.min() < 12
    assert columns.max() > 50


def test_repairs_are_right_and_nearer_than_random_scenes() -> None:
    nearer = 0
    pictures = wrong_pictures(12)
    for k, (metadata, image) in enumerate(pictures):
        found = repaired(image, metadata, np.random.default_rng([1, k]))
        if found is None:
            continue  # four things where the picture has one or two large ones
        assert verdicts([found], metadata)[0][0]
        rng = np.random.default_rng([2, k])
        others = [Image.fromarray(render(scene_for(metadata, rng), rng)) for _ in range(9)]
        nearer += distance(found, image) < np.median([distance(o, image) for o in others])
    assert nearer >= 10


def test_a_repair_is_a_function_of_picture_prompt_and_generator() -> None:
    metadata, image = wrong_pictures(1)[0]
    a, b, c = (repaired(image, metadata, np.random.default_rng(s)) for s in (4, 4, 5))
    assert a is not None
    assert b is not None
    assert c is not None
    assert distance(a, b) == 0
    assert distance(a, c) > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_for_every_wrong_picture_and_none_for_right_ones(seed: int) -> None:
    (metadata, wrong), *_ = wrong_pictures(1)
    rng = np.random.default_rng(seed)
    right = Image.fromarray(render(scene_for(metadata, rng), rng))
    settings = PairSettings(1, 3, "repairs", seed=seed)
    rows = rows_of([right, wrong, wrong], metadata, 4, settings)
    assert [r["ranking_id"] for r in rows if r] == [4701, 4702]
    for row in rows:
        assert row is not None
        winner = int(row["label_1"] == 1)
        assert row[f"correct_{winner}"]
        assert not row[f"correct_{1 - winner}"]
        assert distance(Image.fromarray(decoded(row, f"jpg_{1 - winner}")), wrong) < 150
