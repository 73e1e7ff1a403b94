"""Pictures people already have: every published way to name them, and nothing guessed."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from t2i_align.cli import build_app
from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Item, Picture
from t2i_align.evaluate.benchmarks import BENCHMARKS
from t2i_align.evaluate.layouts import OWN, layouts, located, pictures_in
from t2i_align.evaluate.pictures import given_folder, plan
from t2i_align.evaluate.run import Request, run
from t2i_align.evaluate.work import Job, Worker
from t2i_align.scenes.grammar import fixed_prompts, scene_for
from t2i_align.scenes.render import render
from tests.unit.test_question_benchmarks import graph_file

RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def read_as(worker: Worker) -> tuple[str, dict[tuple[str, int], str]]:
    """The layout's name, and the file of every picture that is there."""
    layout, pictures = worker.located
    assert layout is not None
    there = [p for p in pictures if p.file.is_file()]
    named = {(p.item.id, p.number): str(p.file.relative_to(worker.job.pictures)) for p in there}
    return layout.name, named


def items(*ids: str) -> list[Item]:
    return [Item(i, f"prompt {i}", "t") for i in ids]


# --- one benchmark after the other, with prompt files of its form


def test_compbench_by_prompt_and_running_number(tmp_path: Path) -> None:
    """The k-th picture of a prompt is that of its k-th smallest number, as numbers, not as text."""
    prompts = tmp_path / "p"
    prompts.mkdir()
    (prompts / "color_val.txt").write_text("a red car\nA blue dog.\n")
    (prompts / "texture_val.txt").write_text("a red car\n")
    first = ["a red car_000009.png", "a red car_000010.png", "a red car_2.png"]
    second = ["A blue dog._000000.png", "A blue dog._000001.png", "A blue dog._000003.png"]
    options: dict[str, Any] = {"prompts": str(prompts), "categories": ["color"], "pictures": 3}
    alone = touch(tmp_path / "alone", *(f"samples/{n}" for n in (*first, *second)))
    name, found = read_as(Worker(Job("t2i_compbench", options, alone)))
    assert name == "samples"
    order = [first[2], first[0], first[1], *second]
    keys = [(f"color_{k:05d}", n) for k in range(2) for n in range(3)]
    assert found == dict(zip(keys, (f"samples/{n}" for n in order), strict=True))
    both = touch(tmp_path / "both", *(f"color/samples/{n}" for n in (*first, *second)))
    touch(both, *(f"texture/samples/a red car_{n:06d}.png" for n in range(3)))
    options["categories"] = ["color", "texture"]
    name, more = read_as(Worker(Job("t2i_compbench", options, both)))
    assert {k: v.partition("/")[2] for k, v in more.items() if k[0] != "texture_00000"} == found
    assert more["texture_00000", 2] == "texture/samples/a red car_000002.png"
    # two categories in one folder cannot be told apart: the prompt is in both
    layout, pictures = Worker(Job("t2i_compbench", options, alone)).located
    assert layout is None and not any(p.file.is_file() for p in pictures)


def test_hpsv2_by_style_and_index(tmp_path: Path) -> None:
    styles = ("anime", "concept-art", "paintings", "photo")
    for style in styles:
        (tmp_path / f"{style}.json").write_text(json.dumps(["a", "b"]))
    given = touch(tmp_path / "g", *(f"{s}/{k:05d}.jpg" for s in styles for k in range(2)))
    name, found = read_as(Worker(Job("hpsv2_bench", {"prompts": str(tmp_path)}, given)))
    assert name == "styles" and len(found) == 8
    assert found["concept-art-00001", 0] == "concept-art/00001.jpg"


@pytest.mark.parametrize("folder", ["image/", ""])
def test_geneval_plus_plus_by_line_from_one(tmp_path: Path, folder: str) -> None:
    """1.jpg is the first prompt, whose id is 00000, with the folder above or the one itself."""
    rows = [{"tag": "t", "prompt": f"p{k}", "include": []} for k in range(11)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    given = touch(tmp_path / "g", *(f"{folder}{k}.jpg" for k in range(1, 12)))
    options = {"prompts": str(tmp_path / "p.jsonl")}
    name, found = read_as(Worker(Job("geneval_plus_plus", options, given)))
    assert name == "lines"
    assert found == {(f"{k:05d}", 0): f"{folder}{k + 1}.jpg" for k in range(11)}


def test_dpg_grids_and_single_pictures(tmp_path: Path) -> None:
    prompts = graph_file(tmp_path / "q.csv", "vrd_{}")
    ids = [i.id for i in Worker(Job("dpg_bench", {"prompts": prompts}, tmp_path)).benchmark.items()]
    given = touch(tmp_path / "g", *(f"{i}.png" for i in ids[1:]), f"{ids[0]}.jpg")
    for options in ({"grid": True}, {"images_per_prompt": 1}):
        worker = Worker(Job("dpg_bench", {"prompts": prompts, **options}, given))
        name, found = read_as(worker)
        assert name == "flat" and len(found) == len(ids)
        assert found[ids[0], 0] == f"{ids[0]}.jpg"
    with pytest.raises(DataError, match=r"(?s)one picture a prompt; 4 are asked for.*grid=true"):
        _ = Worker(Job("dpg_bench", {"prompts": prompts}, given)).located


# --- what all benchmarks read


def test_geneval_folders_with_four_digits_five_or_none(tmp_path: Path) -> None:
    """The released script writes five; metadata of another prompt are refused in this layout."""
    given = tmp_path
    for width in (4, 5, 1):
        spelled, given = f"{{:0{width}d}}", tmp_path / str(width)
        touch(given, *(f"00000/samples/{spelled.format(k)}.png" for k in range(3)))
        layout, pictures = located(plan(items("00000"), 3, given), given, "geneval")
        assert layout is not None and layout.name == "folders"
        assert all(p.file.is_file() and int(p.file.stem) == p.number for p in pictures)
    touch(given, "00000/samples/0001.png")
    (given / "00000" / "samples" / "00001.png").touch()
    with pytest.raises(DataError, match="are one picture's files"):
        located(plan(items("00000"), 3, given), given, "geneval")
    (tmp_path / "m" / "00000").mkdir(parents=True)
    touch(tmp_path / "m", "00000/samples/0000.png")
    (tmp_path / "m" / "00000" / "metadata.jsonl").write_text('{"prompt": "another"}\n')
    with pytest.raises(DataError, match="says 'another', the benchmark's prompt 00000 is"):
        located(plan(items("00000"), 1, tmp_path / "m"), tmp_path / "m", "geneval")


@pytest.mark.parametrize("padded", [True, False])
def test_numbered_names_of_padded_and_plain_ids(tmp_path: Path, padded: bool) -> None:
    ids = [f"{k:05d}" for k in range(12)]
    names = {(i, k): f"{i if padded else int(i)}_{k}.png" for i in ids for k in range(4)}
    given = touch(tmp_path, *names.values())
    layout, pictures = located(plan(items(*ids), 4, given), given, "unigenbench")
    assert layout is not None and layout.name == "numbered"
    assert {(p.item.id, p.number): p.file.name for p in pictures} == names


def test_a_picture_may_be_of_any_kind_but_not_of_two(tmp_path: Path) -> None:
    given = touch(tmp_path, "a.png", "b.JPG", "c.v2.webp", "d.txt", "e.jpeg")
    asked = plan(items("a", "b", "c.v2", "d", "e"), 1, given)
    _, pictures = located(asked, given, "drawbench")
    there = [p.file.name for p in pictures if p.file.is_file()]
    assert there == ["a.png", "b.JPG", "c.v2.webp", "e.jpeg"]
    touch(given, "e.png")
    with pytest.raises(DataError, match=r"e\.jpeg and e\.png are one picture's files"):
        located(asked, given, "drawbench")


def test_mixtures_are_refused_by_name(tmp_path: Path) -> None:
    asked = plan(items("a", "b"), 2, tmp_path)
    touch(tmp_path, "a/samples/0000.png", "b_1.png")
    with pytest.raises(
        DataError, match=r"two ways: <id>/samples/0000\.png \(0000\.png\) and <id>_"
    ):
        located(asked, tmp_path, "geneval")
    (tmp_path / "b_1.png").rename(tmp_path / "stranger.png")
    layout, _ = located(asked, tmp_path, "geneval")
    assert layout is not None and layout.name == "folders"


def literal(name: str, picture: Picture) -> list[str]:
    """The names of a picture in each common layout, by hand."""
    i, n = picture.item.id, picture.number
    short = i.lstrip("0") or "0"
    return {
        "folders": [f"{i}/samples/{n:04d}", f"{i}/samples/{n:05d}", f"{i}/samples/{n}"],
        "flat": [i, short],
        "numbered": [f"{i}_{n}", f"{short}_{n}"],
    }[name]


def test_random_folders_against_a_literal_reading(tmp_path: Path) -> None:
    """500 folders: some of the pictures, in one spelling each, among files of others."""
    rng = random.Random(0)
    for trial in range(500):
        given = tmp_path / str(trial)
        count = rng.choice((1, 3))
        asked = plan(items(*(f"{k:05d}" for k in range(rng.randint(1, 4)))), count, given)
        name = rng.choice(
            ("folders", "numbered", "flat") if count == 1 else ("folders", "numbered")
        )
        kept = rng.sample(asked, rng.randint(1, len(asked)))
        expected = {}
        for picture in kept:
            spelling = rng.choice(literal(name, picture))
            ending = rng.choice((".png", ".jpg", ".jpeg", ".webp"))
            expected[picture.item.id, picture.number] = given / f"{spelling}{ending}"
        touch(given, "other.png", "x/y/z.png", *(str(f) for f in expected.values()))
        layout, pictures = located(asked, given, "geneval")
        assert layout is not None and layout.name == name
        there = {(p.item.id, p.number): p.file for p in pictures if p.file.is_file()}
        assert there == expected
        shutil.rmtree(given)


def test_folders_are_read_three_deep(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b/c.jpg", "b/c/d.png", "b/c/d/e.png", ".hidden.png", ".png", "t.txt")
    assert sorted(pictures_in(tmp_path)) == [".hidden", "a", "b/c", "b/c/d"]
    assert given_folder(tmp_path) == tmp_path
    touch(tmp_path, "images/q.png")
    assert given_folder(tmp_path) == tmp_path / "images"
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(DataError, match="holds no pictures"):
            given_folder(nothing)


def test_layouts_are_of_benchmarks_that_exist() -> None:
    assert set(OWN) <= set(BENCHMARKS)
    for name in BENCHMARKS:
        patterns = [layout.pattern for layout in layouts(name)]
        assert len(set(patterns)) == len(patterns) and patterns[0] == "<id>/samples/0000.png"


# --- end to end


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve right pictures of the scenes, named <id>.png."""
    folder = tmp_path_factory.mktemp("flat")
    rng = np.random.default_rng(0)
    for k, (metadata, _) in enumerate(fixed_prompts(2, 0, held_out=True)):
        Image.fromarray(render(scene_for(metadata, rng), rng)).save(folder / f"{k:05d}.png")
    return folder


def test_the_verb_says_how_it_read_them(flat: Path, tmp_path: Path) -> None:
    """Verdicts are those of the folder layout; pictures are found again by page and replay."""
    page = tmp_path / "page.html"
    args = ["eval", "scenes", "--per-task", "2", "--images", str(flat), "--report", str(page)]
    done = RUNNER.invoke(build_app(), [*args, "--out", str(tmp_path / "o")])
    assert done.exit_code == 0, done.output
    assert re.search(r"pictures read as\W+<id>\.png", done.stdout) and "1.000" in done.stdout
    known = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert known["layout"] == "<id>.png" and known["images_found"] == 12
    assert page.read_text().count('<article class="pair">') == 12
    for k in range(12):
        target = tmp_path / "f" / f"{k:05d}" / "samples" / "0000.png"
        target.parent.mkdir(parents=True)
        shutil.copy(flat / f"{k:05d}.png", target)
    quiet = Console(file=io.StringIO())
    request = Request("scenes", tmp_path / "p", {"per_task": 2}, images=tmp_path / "f")
    assert run(request, quiet)["overall"] == known["overall"]
    answers = tmp_path / "o" / "answers.jsonl"
    replay = Request("scenes", tmp_path / "r", answers=answers)
    again = run(replay, quiet)
    assert again["overall"] == known["overall"] and again["pictures"] == str(flat)


def test_a_folder_of_other_names_says_what_is_read(flat: Path, tmp_path: Path) -> None:
    other = tmp_path / "g"
    other.mkdir()
    shutil.copy(flat / "00000.png", other / "first.png")
    request = Request("scenes", tmp_path / "o", {"per_task": 2}, images=other)
    with pytest.raises(DataError, match=r"(?s)no picture of 'scenes'.*<id>\.png; <id>_<number>"):
        run(request, Console(file=io.StringIO()))
