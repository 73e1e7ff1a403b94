"""``eval scenes`` and ``compare``: right pictures score 1, only what differs is counted."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from t2i_align.catalog import find_root
from t2i_align.cli import build_app
from t2i_align.errors import DataError
from t2i_align.evaluate.compare import compare, table
from t2i_align.evaluate.run import Request, run
from t2i_align.scenes import grammar
from t2i_align.scenes.detect import detect
from t2i_align.scenes.pairs import PairSettings, decoded, encoded, pair_of, rows_of, verdicts
from t2i_align.scenes.render import Scene, Thing, render
from t2i_align.scenes.score import graded_score
from tests import evaluations
from tests.evaluations import picture_path
from tests.tiny import pipeline_folder

PER_TASK = 12


def quiet() -> Console:
    return Console(file=io.StringIO())


def truth(metadata: grammar.Metadata, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(render(grammar.scene_for(metadata, rng), rng))


def evaluation(out: Path, wrong: set[int]) -> Path:
    """An evaluation of true renders, some replaced by an empty ground."""
    rng = np.random.default_rng(1)

    def draw(number: int, metadata: grammar.Metadata) -> Image.Image:
        image = truth(metadata, rng)
        return Image.fromarray(render(Scene(()), rng)) if number in wrong else image

    evaluations.evaluation(out, PER_TASK, draw)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("eval")
    return evaluation(root / "a", set(range(0, 72, 2))), evaluation(root / "b", {0, 1})


def test_true_renders_score_one_and_empty_pictures_zero(folders: tuple[Path, Path]) -> None:
    for folder, share in zip(folders, (0.5, 70 / 72), strict=True):
        found = json.loads((folder / "summary.json").read_text())
        assert found["overall"]["mean"] == pytest.approx(share)
        assert found["images"] == 72 and len(found["tasks"]) == 6
        assert found["overall"]["low"] <= share <= found["overall"]["high"]
    row = json.loads((folders[0] / "results.jsonl").read_text().splitlines()[0])
    assert row["reason"].startswith("expected") and row["detections"] == []


def test_compare_counts_pairs(folders: tuple[Path, Path]) -> None:
    """36 wrong before, 2 after: 0 stays wrong, 1 breaks, 35 are repaired."""
    result = compare(*folders)
    overall = result["overall"]
    assert (overall["win"], overall["tie"], overall["lose"]) == (35, 36, 1)
    assert overall["difference"]["mean"] == pytest.approx(34 / 72)
    assert overall["difference"]["low"] > 0.3 and overall["mcnemar_p"] < 1e-8
    assert result["graded"]["difference"]["mean"] > 0.3
    rows = table(result)
    assert rows[-1]["task"] == "overall" and rows[-1]["win/tie/lose"] == "35/36/1"
    assert overall["mcnemar_p"] == 37 * 2 / 2**36
    told = CliRunner().invoke(build_app(), ["compare", *map(str, folders)]).stdout
    assert told.splitlines()[-1] == (
        "McNemar's exact test, which takes pictures as independent: p = 1.1e-09"
    )
    same = compare(folders[0], folders[0])["overall"]
    assert same["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_unlike_runs_are_not_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = evaluations.protocol_of(PER_TASK) | {"guidance_scale": 7.0}
    (tmp_path / "protocol.json").write_text(json.dumps({"protocol": other}))
    with pytest.raises(DataError, match=r"guidance_scale: 3\.0 and 7\.0"):
        compare(folders[0], tmp_path)
    with pytest.raises(DataError, match=r"no results\.jsonl"):
        (tmp_path / "protocol.json").write_text((folders[0] / "protocol.json").read_text())
        compare(folders[0], tmp_path)


def test_missing_pictures_are_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    request = Request("scenes", tmp_path / "out", {"per_task": PER_TASK}, images=tmp_path)
    (tmp_path / "images" / "00000" / "samples").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no picture of 'scenes'"):
        run(request, quiet())
    (tmp_path / "images" / "00000" / "samples" / "0000.png").touch()
    with pytest.raises(DataError, match="71 of 72 pictures are missing"):
        run(request, quiet())
    for source in folders[0].rglob("*.png"):
        file = tmp_path / source.relative_to(folders[0])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.read_bytes()[:200])
    with pytest.raises(DataError, match=r"(?s)0000\.png: cannot decode.*delete it and run again"):
        run(request, quiet())


def test_graded_scores_order_near_misses() -> None:
    """Right > wrong colour > one missing; a surplus object and a wrong relation cost."""
    rng = np.random.default_rng(2)

    def score(things: list[tuple[str, str, tuple[float, float]]], item: grammar.Metadata) -> float:
        scene = Scene(tuple(Thing(c, k, at, 24) for c, k, at in things))
        return graded_score(detect(render(scene, rng)), item)

    item = {
        "tag": "color_attr",
        "prompt": "",
        "include": [
            {"class": "car", "count": 1, "color": "red"},
            {"class": "bed", "count": 1, "color": "blue"},
        ],
    }
    car, bed = ("car", "red", (16.0, 16.0)), ("bed", "blue", (46.0, 46.0))
    right = score([car, bed], item)
    wrong_color = score([("car", "green", car[2]), bed], item)
    missing = score([bed], item)
    surplus = score([car, bed, ("tie", "pink", (46.0, 15.0))], item)
    assert right > 0.6 and right > wrong_color > missing > 0
    assert right > surplus > 0
    relation = item | {
        "tag": "position",
        "include": [
            {"class": "bed", "count": 1},
            {"class": "car", "count": 1, "position": ["above", 0]},
        ],
    }
    below = relation | {
        "include": [relation["include"][0], relation["include"][1] | {"position": ["below", 0]}]
    }
    assert score([car, bed], relation) == pytest.approx(2 * score([car, bed], below), rel=0.05)


def test_pairs_prefer_the_right_picture_and_keep_ties() -> None:
    rng = np.random.default_rng(3)
    prompts = grammar.prompts(held_out=False)
    item, other = prompts["colors"][0], prompts["two_object"][0]
    good, bad = truth(item, rng), truth(other, rng)
    assert verdicts([good], item)[0][0] and not verdicts([bad], item)[0][0]
    rows = [pair_of([bad, good, bad], item, n) for n in range(20)]
    assert {r["label_0"] for r in rows if r} == {0.0, 1.0}  # the order is random
    for r in rows:
        assert r is not None
        winner = "0" if r["label_0"] == 1 else "1"
        assert r[f"correct_{winner}"] and r[f"score_{winner}"] > 0.5
    tie = pair_of([good, good], item, 0)
    assert tie is not None and tie["label_0"] == 0.5
    assert (
        pair_of([bad, bad], prompts["colors"][0] | {"include": [{"class": "tv", "count": 1}]}, 0)
        is None
    )


def test_renders_stand_over_wrong_pictures_only() -> None:
    rng = np.random.default_rng(4)
    prompts = grammar.prompts(held_out=False)
    item, other = prompts["counting"][0], prompts["position"][0]
    good, bad = truth(item, rng), truth(other, rng)
    settings = PairSettings(1, winners="renders")
    assert rows_of([good, good], item, 0, settings) == []
    (row,) = rows_of([good, bad, good], item, 0, settings)
    assert row is not None
    winner = "0" if row["label_0"] == 1 else "1"
    loser = "1" if winner == "0" else "0"
    assert row[f"correct_{winner}"] and not row[f"correct_{loser}"]
    held = np.asarray(Image.open(io.BytesIO(row[f"jpg_{loser}"])).convert("RGB"), float)
    assert np.abs(held - np.asarray(bad, float)).mean() < 2  # AVIF
    assert len(rows_of([good, bad, good], item, 0, replace(settings, winners="both"))) == 2
    every = replace(settings, winners="samples", pairing="all")
    names = [r["ranking_id"] for r in rows_of([good, bad, bad], item, 7, every) if r]
    assert len(set(names)) == len(names)


def test_both_kinds_of_pairs_are_the_one_and_the_other() -> None:
    rng = np.random.default_rng(5)
    items = [side[1] for side in grammar.prompts(held_out=False).values()]
    seen = 0
    for number, item in enumerate(items):  # renders of other prompts stand for wrong samples
        images = [truth(m, rng) for m in (item, *items[:3])]
        for pairing in ("best_worst", "all"):
            settings = PairSettings(1, winners="both", pairing=pairing, seed=number)
            kinds = [replace(settings, winners=kind) for kind in ("samples", "renders")]
            own, renders = (rows_of(images, item, number, kind) for kind in kinds)
            assert rows_of(images, item, number, settings) == own + renders
            seen += bool(own and renders)
    assert seen > 6


def test_lossless_pairs_hold_what_was_drawn() -> None:
    """Of every kind of pair; the other files are near, not equal."""
    rng = np.random.default_rng(6)
    prompts = grammar.prompts(held_out=False)
    item, other = prompts["colors"][1], prompts["colors"][7]
    good, bad = truth(item, rng), truth(other, rng)
    kinds: list[dict[str, Any]] = [{"winners": k} for k in ("samples", "renders", "repairs")]
    kinds.append({"pairing": "all"})
    for kind in kinds:
        for lossless in (True, False):
            settings = PairSettings(1, **kind, lossless=lossless)
            (row,) = rows_of([good, bad], item, 0, settings)
            assert row is not None
            loser = decoded(row, "jpg_0" if row["label_0"] == 0 else "jpg_1")
            assert np.array_equal(loser, np.asarray(bad)) == lossless


def coloured_edges(image: Image.Image) -> float:
    """Energy of the differences between neighbours, brightness taken out."""
    pixels = np.asarray(image.convert("RGB"), float)
    colour = pixels - pixels.mean(2, keepdims=True)
    return sum(float(np.square(np.diff(colour, axis=axis)).sum()) for axis in (0, 1))


def test_pair_files_keep_the_edges_of_colours() -> None:
    rng = np.random.default_rng(7)
    images = [
        truth(item[k], rng) for k in (0, 1) for item in grammar.prompts(held_out=False).values()
    ]
    before = np.array([coloured_edges(image) for image in images])
    kept = [coloured_edges(Image.open(io.BytesIO(encoded(image)))) for image in images]
    assert np.mean(kept / before) > 0.9
    assert np.mean([len(encoded(image)) for image in images]) < 1000


def test_pictures_survive_the_pair_file_and_broken_ones_are_named() -> None:
    item = grammar.prompts(held_out=False)["colors"][0]
    image = truth(item, np.random.default_rng(6))
    row = {"caption": "a photo of a red car", "jpg_0": encoded(image), "jpg_1": None}
    found = decoded(row, "jpg_0")
    assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(row["jpg_0"])).convert("RGB")))
    assert verdicts([Image.fromarray(found)], item)[0][0] == verdicts([image], item)[0][0]
    for data, why in ((None, "empty file"), (b"text", "not an image"), (row["jpg_0"][:90], "")):
        with pytest.raises(DataError, match=rf"jpg_1 of the pair 'a photo of a red car': {why}"):
            decoded(row | {"jpg_1": data}, "jpg_1")


FOLDER = find_root() / "datasets" / "scenes"


@pytest.mark.parametrize(("name", "repairs"), [("pairs", False), ("pairs_repairs", True)])
def test_bundled_pairs_are_small_honest_and_of_training_prompts(name: str, repairs: bool) -> None:
    assert sum(f.stat().st_size for f in FOLDER.glob("*.parquet")) <= 4e6
    rows = pq.read_table(FOLDER / f"{name}.parquet").to_pylist()
    train = {m["prompt"]: m for items in grammar.prompts(held_out=False).values() for m in items}
    assert {r["caption"] for r in rows} <= set(train)
    ties = [r for r in rows if r["label_0"] == 0.5]
    assert len(ties) < 0.1 * len(rows)
    assert (len(ties) > 0) is not repairs
    assert len({r["ranking_id"] for r in rows}) == len(rows)
    agreed = []
    for row in rows[:: len(rows) // 60]:
        pictures = [Image.open(io.BytesIO(row[f"jpg_{k}"])).convert("RGB") for k in (0, 1)]
        found = verdicts(pictures, train[row["caption"]])
        agreed += [found[k][0] == row[f"correct_{k}"] for k in (0, 1)]
        if row["label_0"] == 1:
            assert (row["correct_0"], row["score_0"]) >= (row["correct_1"], row["score_1"])
        if repairs:
            assert row["correct_0"] != row["correct_1"]
    assert np.mean(agreed) > (0.999 if repairs else 0.95)  # a file may turn a verdict at the edge


def test_the_verb_runs_resumes_and_refuses(tmp_path: Path) -> None:
    model = pipeline_folder("sdxl", tmp_path / "sdxl")
    command = [sys.executable, "-m", "t2i_align", "eval", "scenes", "--per-task", "2"]
    command += ["--num-inference-steps", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--model", str(model)], capture_output=True, text=True)
    assert done.returncode == 0 and "overall" in done.stdout, done.stderr
    kept = picture_path(tmp_path / "out", 3).read_bytes()
    picture_path(tmp_path / "out", 2).unlink()
    again = subprocess.run([*command, "--model", str(model)], capture_output=True, text=True)
    assert again.returncode == 0 and picture_path(tmp_path / "out", 3).read_bytes() == kept
    other = subprocess.run(
        [*command, "--model", str(model), "--seed", "5"], capture_output=True, text=True
    )
    assert other.returncode == 3 and "another model or protocol" in other.stderr
