"""Aspect buckets: the list by hand, the choice by its definition, the cache by size."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_builders import FakeGenerator, build_in, image_bytes, item, list_source, pair
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from t2i_align.contract import Encoded, Media
from t2i_align.data.buckets import (
    BucketOptions,
    Buckets,
    faults,
    generated,
    make_buckets,
    split_variant,
    variant_at,
)
from t2i_align.data.images import fit, image_size, open_image
from t2i_align.data.records import Item, Record
from t2i_align.errors import ModelError, RecipeError
from t2i_align.recipe import load_recipe
from tests.recipe_files import write_recipe

TINY = make_buckets(BucketOptions(step=8), 32, 8)


# -- the list


def test_the_list_at_1024_by_hand() -> None:
    """Eq. (1) with step 64: 1024^2 // 832 // 64 = 19 steps = 1216, and so on.

    (1280, 768) is not in it though it fits: 1344 x 768 is larger and fits, too.
    """
    half = [(768, 1344), (832, 1216), (896, 1152), (960, 1088)]
    expected = [*half, (1024, 1024), *((w, h) for h, w in reversed(half))]
    assert generated(BucketOptions(), 1024) == expected


def test_wider_limits_give_the_slender_ones() -> None:
    sizes = generated(BucketOptions(max_aspect=4.0), 1024)
    assert sizes[0] == (512, 2048) and sizes[-1] == (2048, 512) and len(sizes) == 17
    narrow = generated(BucketOptions(max_aspect=4.0, min_side=704, max_side=1472), 1024)
    assert narrow[0] == (704, 1472) and set(narrow) < set(sizes)


@given(
    steps=st.integers(1, 12),
    step=st.sampled_from([8, 16, 64]),
    max_aspect=st.floats(1.0, 4.0),
)
def test_what_every_list_holds(steps: int, step: int, max_aspect: float) -> None:
    """Multiples of the step within the area, none inside another, the square, mirror images."""
    resolution = steps * step
    sizes = generated(BucketOptions(step=step, max_aspect=max_aspect), resolution)
    assert (resolution, resolution) in sizes
    assert {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % step == w % step == 0 and h * w <= resolution**2
        assert max(h, w) <= max_aspect * min(h, w) and max(h, w) <= 2 * resolution
        others = [s for s in sizes if s != (h, w)]
        assert not any(h <= other[0] and w <= other[1] for other in others)


@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_the_nearest_in_log_aspect(height: int, width: int) -> None:
    """Eq. (2), written out, and transposing a picture transposes its bucket."""
    buckets = make_buckets(BucketOptions(), 1024, 8)
    h, w = buckets.nearest((height, width))
    apart = abs(math.log(height / width) - math.log(h / w))
    for a, b in buckets.sizes:
        assert apart <= abs(math.log(height / width) - math.log(a / b)) + 1e-9
    assert buckets.beyond((height, width)) == (max(height, width) / min(height, width) > 2)
    turned = buckets.nearest((width, height))
    assert abs(abs(math.log(turned[0] / turned[1])) - abs(math.log(h / w))) < 1e-9


def test_equal_aspects_take_the_larger_bucket_and_own_lists_bound_themselves() -> None:
    made = make_buckets(BucketOptions(sizes=[(512, 512), (1024, 1024), (832, 1216)]), 1024, 8)
    assert made.nearest((300, 300)) == (1024, 1024)
    assert made.nearest((300, 500)) == (832, 1216)
    assert made.beyond((300, 500)) and made.beyond((500, 300))
    assert not made.beyond((800, 1000))


@pytest.mark.parametrize(
    ("options", "resolution", "unit", "key", "message"),
    [
        ({"step": 8}, 64, 16, "step", "got 8, not a multiple of 16 pixels"),
        ({"step": 64}, 1000, 8, "step", "resolution 1000 is not a multiple of it"),
        ({"min_side": 100}, 512, 8, "min_side", "got 100, not a multiple of step 64"),
        ({"max_side": 700}, 512, 8, "max_side", "got 700, not a multiple of step 64"),
        ({"min_side": 640}, 512, 8, "", "sides from 640 to 1024 leave out the square"),
        ({"sizes": [(64, 60)]}, 64, 8, "sizes[0]", "got 64 x 60, not multiples of 8 pixels"),
        ({"sizes": [(64, 64), (64, 72)]}, 64, 8, "sizes[1]", "4,608 pixels, more than resolution"),
    ],
)
def test_what_is_wrong_is_named(
    options: dict[str, Any], resolution: int, unit: int, key: str, message: str
) -> None:
    given_options = BucketOptions(**options)
    found = faults(given_options, resolution, unit)
    assert found[0][0] == "model.aspect_buckets" + (f".{key}" if key else "")
    assert message in found[0][1] and found[0][2]
    with pytest.raises(ModelError, match=r"model\.aspect_buckets"):
        make_buckets(given_options, resolution, unit)


def test_the_recipe_says_it_before_the_run(tmp_path: Path) -> None:
    """All at once, with the line, and a list beside what would have generated one is refused."""
    recipe = write_recipe(tmp_path)

    def problems(*edits: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, edits)
        return str(caught.value)

    said = problems("model.aspect_buckets={step: 96}")
    assert "model.aspect_buckets.step: got 96, but resolution 512 is not a multiple" in said
    said = problems("model.aspect_buckets={sizes: [[64, 64]], step: 8}")
    assert "sizes is the whole list, so step has nothing to say" in said
    assert "names a bucket twice" in problems("model.aspect_buckets={sizes: [[64, 64], [64, 64]]}")
    said = problems("model.aspect_buckets={}", "data.curriculum={}")
    assert "data.curriculum: a curriculum says which pairs come when" in said
    said = problems(
        "model.aspect_buckets={}",
        "objective={type: diffusion_dro}",
        "rollout={num_inference_steps: 5}",
    )
    assert "model.aspect_buckets: needs stored records; diffusion_dro trains on samples" in said
    loaded = load_recipe(recipe, ["model.aspect_buckets={sizes: [[512, 512], [384, 640]]}"])
    plain = load_recipe(recipe)
    assert loaded.fingerprint() != plain.fingerprint()
    assert loaded.to_dict()["model"]["aspect_buckets"]["sizes"] == [[512, 512], [384, 640]]


def test_names_of_variants() -> None:
    for size, variant, name in [
        ((), "", ""),
        ((), "flip", "flip"),
        ((832, 1216), "", "832x1216"),
        ((832, 1216), "flip", "832x1216+flip"),
    ]:
        assert variant_at(size, variant) == name
        assert split_variant(name) == (size or None, variant)


# -- the size of a file


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_true_size_is_that_of_the_opened_image(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (12, 7)).save(file, kind, exif=exif)
    opened = open_image(file.getvalue())
    assert image_size(file.getvalue()) == (opened.height, opened.width)
    assert (opened.height > opened.width) == (orientation in (6, 8))


# -- the cache


class Fitting(FakeGenerator):
    """Fits pictures to buckets and remembers what it was asked."""

    def __init__(self, buckets: Buckets | None = TINY, **settings: Any) -> None:
        super().__init__(**settings)
        self.buckets = buckets
        self.asked: list[str] = []

    def load_media(self, media: Media, variant: str) -> Encoded:
        self.loads += 1
        self.asked.append(variant)
        size, name = split_variant(variant)
        image = open_image(media.data)
        pixels, found = fit(image, size or 32, "random", media.meta["key"], name == "flip")
        facts = {"original": found.original_size, "target": found.target_size}
        return Encoded({"pixels": pixels}, {k: list(v) for k, v in facts.items()})


def fitting(**settings: Any) -> Any:
    return Fitting(**settings)


def picture(seed: int, height: int, width: int) -> Item:
    return Item(Media("image", image_bytes(seed, (width, height))), f"prompt {seed}")


def record(name: str, *sizes: tuple[int, int], seed: int, **facts: Any) -> Record:
    items = tuple(picture(seed + i, *size) for i, size in enumerate(sizes))
    layout: Any = "pair" if len(items) == 2 and "ranks" not in facts else "ranked"
    return Record(name, layout, items, **facts)


SQUARE, TALL, WIDE = (20, 20), (36, 20), (20, 36)
TALL_BUCKET, WIDE_BUCKET = (40, 24), (24, 40)


def test_tiny_buckets() -> None:
    """32 x 32 in steps of 8: 40 x 24 = 960 of 1024 pixels."""
    assert set(TINY.sizes) == {(32, 32), TALL_BUCKET, WIDE_BUCKET}


def test_a_record_has_the_bucket_of_its_winner(tmp_path: Path) -> None:
    build = build_in(tmp_path)
    records = [
        record("a", TALL, WIDE, seed=0),
        record("b", WIDE, TALL, seed=10),
        record("c", SQUARE, WIDE, seed=20),
    ]
    made = build(records, fitting())
    assert [made.manifest[i].size for i in range(3)] == [[40, 24], [24, 40], [32, 32]]
    assert made.report.buckets == {"40x24": 1, "24x40": 1, "32x32": 1}
    batch = made.batch([(0, 0)], run_seed=0, coupling="time+noise", empty_prompts=0.0)
    assert batch.sample.state["x0"].shape == (2, *TALL_BUCKET)
    assert [m["original"] for m in batch.sample.meta] == [list(TALL), list(WIDE)]
    assert [m["target"] for m in batch.sample.meta] == [list(TALL_BUCKET)] * 2


def test_of_a_list_the_best_item_decides_and_singles_have_their_own(tmp_path: Path) -> None:
    build = build_in(tmp_path)
    ranked = record("g", SQUARE, WIDE, TALL, seed=0, ranks=(1, 0, 2))
    assert build([ranked], fitting(), "groups").manifest[0].size == list(WIDE_BUCKET)
    singles = build([record("p", TALL, WIDE, seed=5)], fitting(), "items").manifest
    assert [singles[i].size for i in range(2)] == [list(TALL_BUCKET), list(WIDE_BUCKET)]


def test_pictures_beyond_the_buckets_are_cropped_and_counted(tmp_path: Path) -> None:
    made = build_in(tmp_path)([record("long", (20, 90), WIDE, seed=0), pair(9)], fitting())
    assert made.manifest[0].size == list(WIDE_BUCKET) and made.report.beyond_aspect == 1


def test_one_picture_in_two_buckets_is_two_entries(tmp_path: Path) -> None:
    """Three pictures; the square one is the loser of a tall and of a wide winner: four entries."""
    build = build_in(tmp_path)
    shared = picture(7, *SQUARE)
    records = [
        Record("a", "pair", (picture(0, *TALL), shared)),
        Record("b", "pair", (picture(1, *WIDE), shared)),
        Record("c", "pair", (picture(0, *TALL), shared)),
    ]
    generator = fitting()
    made = build(records, generator)
    assert generator.loads == len(made.media) == 4
    loser = [
        made.batch([(i, 0)], run_seed=0, coupling="none", empty_prompts=0.0).sample.state["x0"][1]
        for i in range(2)
    ]
    assert [tuple(x.shape) for x in loser] == [TALL_BUCKET, WIDE_BUCKET]


def test_other_buckets_encode_only_what_is_new(tmp_path: Path) -> None:
    """A warm cache reads nothing; without the wide bucket its record moves to the square one."""
    build = build_in(tmp_path)
    records = [record("a", TALL, TALL, seed=0), record("b", WIDE, WIDE, seed=10)]
    first = build(records, fitting())
    again = fitting()
    untouchable = list_source(records, fail_at=0, error=AssertionError("source was read"))
    second = build(untouchable, again)
    assert again.loads == 0 and second.report.buckets == first.report.buckets
    assert second.identity() == first.identity()
    fewer = fitting(buckets=replace(TINY, sizes=((32, 32), TALL_BUCKET)))
    third = build(records, fewer)
    assert fewer.asked == ["32x32", "32x32"]
    assert third.identity() != first.identity()


def test_a_lost_entry_is_encoded_again_at_its_size(tmp_path: Path) -> None:
    build = build_in(tmp_path)
    records = [record("a", TALL, WIDE, seed=0)]
    build(records, fitting(variants=("", "flip")))
    (shard,) = (tmp_path / "cache" / "v1").glob("media-*/shard-*.safetensors")
    shard.unlink()
    generator = fitting(variants=("", "flip"))
    build(records, generator)
    assert sorted(generator.asked) == ["40x24", "40x24", "40x24+flip", "40x24+flip"]


def test_without_buckets_keys_and_manifests_are_as_they_were(tmp_path: Path) -> None:
    """No size in a key, no column in the file, and the same identity as a generator of old."""
    build = build_in(tmp_path)
    old = build([pair(0)], fake := FakeGenerator())
    new = build([pair(0)], generator := fitting(buckets=None))
    assert fake.loads == 2 and generator.loads == 0
    assert not any("@" in key for key in new.media.keys())
    assert "size" not in new.manifest.table.schema.names and new.manifest.sizes() is None
    assert new.identity() == old.identity() and new.manifest[0].size == []
    assert len(list((tmp_path / "cache" / "v1" / "manifests").glob("*.arrow"))) == 1


def test_a_broken_winner_is_skipped_with_its_reason(tmp_path: Path) -> None:
    bad = Item(Media("image", b"no image"), "p")
    made = build_in(tmp_path)([Record("x", "pair", (bad, item(1))), pair(3)], fitting())
    assert made.report.num_skipped == 1 and "not an image" in made.report.skipped[0][1]
    assert sum(made.report.buckets.values()) == len(made) == 1


def test_a_mixed_batch_is_a_programming_mistake(tmp_path: Path) -> None:
    records = [record("a", TALL, TALL, seed=0), record("b", WIDE, WIDE, seed=10)]
    made = build_in(tmp_path)(records, fitting())
    picks: Sequence[tuple[int, int]] = [(0, 0), (1, 0)]
    with pytest.raises(ValueError, match="several buckets"):
        made.batch(picks, run_seed=0, coupling="none", empty_prompts=0.0)


def test_seeds_of_a_record_do_not_know_its_bucket(tmp_path: Path) -> None:
    """The same record, bucketed and not: equal noise and time seeds, draw by draw."""
    records = [record("a", TALL, WIDE, seed=0)]
    plain = build_in(tmp_path / "p")(records, fitting(buckets=None))
    fitted = build_in(tmp_path / "f")(records, fitting())
    for draw in range(3):
        one, two = (
            made.batch([(0, draw)], run_seed=4, coupling="time", empty_prompts=0.5)
            for made in (plain, fitted)
        )
        assert torch.equal(one.seeds.time, two.seeds.time)
        assert torch.equal(one.seeds.noise, two.seeds.noise)
        assert torch.equal(one.sample.cond["text"], two.sample.cond["text"])


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", 8),
        ("stabilityai/stable-diffusion-3-medium-diffusers", 16),
    ],
)
def test_a_patch_of_the_network_counts(name: str, unit: int) -> None:
    """SD3's tokens are squares of 2 latent pixels, so 16 pixels; a U-Net has latent pixels, 8."""
    from t2i_align.generators.diffusers_family import DiffusersGenerator
    from t2i_align.generators.diffusers_options import DiffusersOptions

    def buckets(step: int) -> Buckets | None:
        asked = BucketOptions(step=step)
        options = DiffusersOptions(name_or_path=name, resolution=512, aspect_buckets=asked)
        return DiffusersGenerator(options, "meta").buckets

    made = buckets(unit)
    assert made is not None and all(side % unit == 0 for size in made.sizes for side in size)
    if unit == 16:
        with pytest.raises(ModelError, match=r"step: got 8, not a multiple of 16 pixels"):
            buckets(8)
