"""``scenes pairs`` stopped and continued: the same file, nothing drawn twice, no other's parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from t2i_align.catalog import find_root
from t2i_align.errors import DataError
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.rollout.generate import load_weights
from t2i_align.scenes import pairs
from t2i_align.scenes.grammar import sample_prompts
from t2i_align.scenes.pairs import PairSettings, batch_rows, build_pairs, decoded

SETTINGS = PairSettings(3, samples=2, winners="repairs", seed=3, batch=1)
QUIET = Console(quiet=True)
BUNDLED = [
    ("pairs", "samples", 700, 5),
    ("pairs_repairs", "repairs", 1450, 7),
    ("pairs_repairs", "repairs", 1450, 8),
]
ID_OF_SEED = 10_000_000  # what sets the ids of two calls apart in one file
SIDES = ("jpg_0", "jpg_1")


@pytest.fixture(scope="module")
def base() -> DiffusersGenerator:
    """The bundled model."""
    generator = DiffusersGenerator(
        DiffusersOptions(name_or_path="bundled/scenes_sdxl", resolution=64)
    )
    load_weights(generator, None, None)
    return generator


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The starts of the batches that were drawn; the third one is as Ctrl-C, once."""
    starts: list[int] = []
    real = pairs.draw_samples

    def draw(
        generator: DiffusersGenerator, items: Sequence[Any], start: int, settings: PairSettings
    ) -> list[list[Image.Image]]:
        starts.append(start // settings.samples)
        if len(starts) == 3:
            raise KeyboardInterrupt
        return real(generator, items, start, settings)

    monkeypatch.setattr(pairs, "draw_samples", draw)
    return starts


def test_continued_is_the_same_file(
    base: DiffusersGenerator, drawn: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "pairs.parquet"
    with pytest.raises(KeyboardInterrupt):
        build_pairs(base, out, SETTINGS, QUIET)
    assert not out.exists() and len(list(tmp_path.glob("pairs.parquet.parts-*/*"))) == 2
    counts = build_pairs(base, out, SETTINGS, QUIET)
    assert drawn == [0, 1, 2, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.parquet"], "the parts are gone"
    whole = tmp_path / "whole.parquet"
    assert build_pairs(base, whole, SETTINGS, QUIET) == counts and counts["pairs"] > 0
    assert whole.read_bytes() == out.read_bytes()


def test_parts_of_other_settings_or_weights_are_not_taken(
    base: DiffusersGenerator, drawn: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "pairs.parquet"
    with pytest.raises(KeyboardInterrupt):
        build_pairs(base, out, SETTINGS, QUIET)
    build_pairs(base, out, replace(SETTINGS, guidance=2.0), QUIET)
    assert drawn == [0, 1, 2, 0, 1, 2]
    weight = next(base.module.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1e-3)
    try:
        build_pairs(base, out, SETTINGS, QUIET)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert drawn == [0, 1, 2, 0, 1, 2, 0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "winners", "num", "seed"), BUNDLED)
def test_the_bundled_pairs_are_what_their_command_draws(
    base: DiffusersGenerator, name: str, winners: Any, num: int, seed: int
) -> None:
    """The first batch again; another machine may round a picture differently."""
    settings = PairSettings(num, winners=winners, seed=seed)
    items = sample_prompts(num, seed, held_out=False)[: settings.batch]
    made = {r["ranking_id"]: r for r in batch_rows(base, items, 0, settings)}
    rows = pq.read_table(find_root() / "datasets" / "scenes" / f"{name}.parquet").to_pylist()
    offset = ID_OF_SEED * seed if winners == "repairs" else 0
    held = {r["ranking_id"] - offset: r for r in rows}
    shared = [k for k in made if k in held]
    assert len(shared) > 0.8 * len(made) > 0
    for k in shared:
        assert made[k]["caption"] == held[k]["caption"]
        apart = [np.abs(decoded(made[k], x) - decoded(held[k], x).astype(float)) for x in SIDES]
        assert max(float(a.mean()) for a in apart) < 6


def test_pictures_that_say_nothing_are_an_error(
    base: DiffusersGenerator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def grey(*_: Any) -> list[list[Image.Image]]:
        return [[Image.new("RGB", (64, 64), "grey")] * 2]

    monkeypatch.setattr(pairs, "draw_samples", grey)
    with pytest.raises(DataError, match="no pair in 6 pictures: all of a prompt are alike"):
        build_pairs(base, tmp_path / "a.parquet", replace(SETTINGS, winners="samples"), QUIET)
    assert not (tmp_path / "a.parquet").exists()
