"""The report says what ``compare`` says, shows the pictures as they are, and loads nothing."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2i_align.errors import DataError, StorageError
from t2i_align.evaluate import gallery
from t2i_align.evaluate.aggregate import Interval, bootstrap_mean
from t2i_align.evaluate.compare import compare, read_rows, table
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.figures import Bar, bars, curves, smooth
from t2i_align.evaluate.pages import Section
from t2i_align.evaluate.provenance import eval_command, recipe_yaml, sha256
from t2i_align.evaluate.report import (
    bar_rows,
    build_report,
    headline,
    read_extras,
    read_run,
)
from t2i_align.evaluate.sampling import defaults
from t2i_align.evaluate.settings import read_settings
from t2i_align.scenes import grammar
from t2i_align.scenes.render import Scene, render
from tests import evaluations
from tests.evaluations import picture_path

PER_TASK = 4
NUM = 24
WRONG = set(range(0, NUM, 2)), {0, 1, 7}  # before and after: 0 stays wrong, 1 and 7 break
ATTACK = "<script>alert(1)</script>\"'><img src=x>"
VOID = {"meta", "img", "input", "br", "link"}


def evaluation(out: Path, wrong: set[int], weights: Path) -> Path:
    """True renders, some replaced by an empty ground; one prompt is an attack on the page."""
    rng = np.random.default_rng(1)

    def draw(number: int, metadata: grammar.Metadata) -> Image.Image:
        scene = Scene(()) if number in wrong else grammar.scene_for(metadata, rng)
        return Image.fromarray(render(scene, rng))

    facts = {"model": "truth", "lora": None, "denoiser": str(weights)}
    rows = evaluations.evaluation(out, PER_TASK, draw, facts)
    rows[3]["prompt"] = ATTACK
    rows[3]["reason"] = ATTACK
    rows[3]["detections"] = [{"class": ATTACK, "score": 0.95, "box": [1, 30, 20, 40]}]
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    (root / "run" / "unet").mkdir(parents=True)
    (root / "run" / "unet" / "x.safetensors").write_bytes(b"weights")
    for name, wrong in zip("ab", WRONG, strict=True):
        evaluation(root / name, wrong, root / "run" / "unet")
    metrics = [
        {"step": k, "loss": None if k == 3 else 1 / k, "rewards/margins": k / 10, "lr": 1.0}
        for k in range(1, 9)
    ]
    lines = "".join(json.dumps(m) + "\n" for m in metrics)
    (root / "run" / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')
    summary = {"format": 1, "steps": 8, "seconds": {"train": 12.5}, "exported": ["unet"]}
    (root / "run" / "summary.json").write_text(json.dumps(summary))
    recipe = {"seed": 3, "model": {"lora": None, "name_or_path": ATTACK}}
    (root / "run" / "run.json").write_text(json.dumps({"recipe": recipe}))
    return root


class Page(HTMLParser):
    """Elements, text and the pictures of each card; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.cards: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        assert len(given) == len(attrs), f"repeated attribute in {tag}"
        self.seen.append((tag, given))
        if tag == "article":
            sections = [a["id"] for t, a in self.open if t == "section" and "id" in a]
            self.cards.append({"class": given["class"], "at": sections[-1], "text": "", "img": []})
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "img":
            self.cards[-1]["img"].append(given)
        if tag not in VOID:
            self.open.append((tag, given))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        inside = [t for t, _ in self.open]
        if "style" not in inside:
            self.text += data
        if inside and inside[-1] in ("th", "td"):
            self.rows[-1][-1] += data
        if "article" in inside:
            self.cards[-1]["text"] += data

    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.seen if "id" in a]


def built(root: Path, **options: Any) -> str:
    out = root / "out" / "report.html"
    assert build_report(root / "a", root / "b", out, **options) == out
    assert [f.name for f in out.parent.iterdir()] == ["report.html"]
    return out.read_text()


@pytest.fixture(scope="module")
def html(root: Path) -> str:
    return built(
        root, runs=[root / "run"], extras=[Section("Other", "a\n\n<b>", [{"x": 0.123456}])]
    )


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_tags_nest_ids_are_unique_and_every_local_link_has_its_target(page: Page) -> None:
    assert len(set(page.ids())) == len(page.ids())
    links = [a[k] for _, a in page.seen for k in ("href", "xlink:href") if k in a]
    clips = [c for _, a in page.seen for c in re.findall(r"url\(#(.*?)\)", " ".join(a.values()))]
    assert links and clips and {c for c in clips} <= set(page.ids())
    assert {link.removeprefix("#") for link in links} <= set(page.ids())


def test_nothing_is_loaded_and_nothing_runs(page: Page, html: str) -> None:
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.seen}
    for _, attributes in page.seen:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        for address in re.findall(r"url\(([^)]*)\)", " ".join(attributes.values())):
            assert address.startswith("#")
    policy = next(a["content"] for t, a in page.seen if a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_picture_is_the_file(page: Page, root: Path) -> None:
    shown = 0
    for card in page.cards:
        number = int(re.findall(r"picture (\d+)", card["text"])[0])
        for folder, attributes in zip("ab", card["img"], strict=True):
            head, _, data = attributes["src"].partition(",")
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            truth = Image.open(picture_path(root / folder, number))
            assert head == "data:image/png;base64" and image.format == "PNG"
            assert np.array_equal(np.asarray(image), np.asarray(truth))
            assert attributes["alt"].startswith(("before, ", "after, "))
            shown += 1
    assert shown == 2 * (NUM + 11 + 2)


def test_the_numbers_are_those_of_compare(page: Page, root: Path) -> None:
    result = compare(root / "a", root / "b")
    overall, d = result["overall"], result["overall"]["difference"]
    text = " ".join(page.text.split())
    assert f"{overall['before']:.3f} → {overall['after']:.3f}" in text
    assert f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" in text
    assert "11 / 11 / 2" in text and f"pictures a side, held-out prompts{NUM}" in text
    for row in table(result):
        assert list(row.values()) in page.rows
    assert "The interval lies above 0" in text


def test_repaired_and_broken_are_the_wins_and_losses(page: Page, root: Path) -> None:
    overall = compare(root / "a", root / "b")["overall"]
    for name, count in (("repaired", overall["win"]), ("broken", overall["lose"])):
        cards = [c for c in page.cards if c["at"] == name]
        assert len(cards) == count and {c["class"] for c in cards} == {f"pair {name}"}
        among_tasks = [c for c in page.cards if c["at"] == "pictures"]
        assert sum(c["class"] == f"pair {name}" for c in among_tasks) == count
    assert "Wrong before, right after: all 11." in page.text


def test_untrusted_text_stays_text(page: Page, html: str) -> None:
    assert "<script" not in html and "<img src=x" not in html
    (card,) = [c for c in page.cards if c["at"] == "pictures" and "picture 3" in c["text"]]
    assert card["text"].count(ATTACK) == 1 + 2 + 2 * 2  # prompt, reasons, box titles and labels
    assert ATTACK in card["img"][0]["alt"] and ATTACK in page.text.partition("Training")[2]
    assert "a" in page.text and "<b>" in page.text


def test_curves_recipe_hashes_and_commands_are_there(page: Page, root: Path) -> None:
    assert "training" in page.ids() and "run0-figure_1" in page.ids()
    assert sha256(root / "a" / "results.jsonl") in page.text
    assert sha256(root / "run" / "unet" / "x.safetensors") in page.text
    assert "before: denoiser, after: denoiser, trained by run" in page.text
    assert "seconds, train" in page.text and "0.1235" in page.text
    assert f"t2i-align compare {root}/a {root}/b\n" in page.text


def test_without_runs_there_is_no_training_section(root: Path) -> None:
    page = Page(built(root))
    assert "training" not in page.ids() and not [i for i in page.ids() if i.startswith("run")]
    assert "t2i-align train" not in page.text


def test_a_run_without_metrics_has_a_recipe_and_no_curves(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text((root / "run" / "run.json").read_text())
    run = read_run(tmp_path, "run0")
    assert run.figure is None and run.recipe.startswith("seed: 3\n")
    with pytest.raises(DataError, match=r"empty holds no training run \(neither run\.json nor"):
        read_run(tmp_path / "empty", "run0")


def test_equal_inputs_give_an_equal_file(root: Path, html: str) -> None:
    extras = [Section("Other", "a\n\n<b>", [{"x": 0.123456}])]
    assert built(root, runs=[root / "run"], extras=extras) == html


def test_a_failed_report_leaves_the_old_one(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    with pytest.raises(DataError, match="nothere holds no training run"):
        build_report(root / "a", root / "b", out, runs=[tmp_path / "nothere"])
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
    with pytest.raises(StorageError, match=r"(?s)cannot write .*choose another --out"):
        build_report(root / "a", root / "b", out / "below.html")


@pytest.mark.parametrize(
    ("low", "high", "sign", "words"),
    [
        (0.01, 0.1, "up", "lies above 0: the model after is better"),
        (-0.1, -0.01, "down", "lies below 0: the model after is worse"),
        (-0.1, 0.1, "even", "includes 0: these pictures do not show"),
        (0.0, 0.1, "even", "includes 0"),
        (0.0, 0.0, "even", "includes 0"),
    ],
)
def test_the_conclusion_follows_from_the_interval(
    low: float, high: float, sign: str, words: str
) -> None:
    line = {"before": 0.4, "after": 0.5, "win": 1, "tie": 2, "lose": 3, "mcnemar_p": 0.5}
    line["difference"] = {"mean": 0.1, "low": low, "high": high}  # type: ignore[assignment]
    said = headline({"overall": line, "graded": line}, {"held_out": False}, 6)
    assert said["sign"] == sign and words in said["conclusion"] and not said["held_out"]


def test_bars_are_the_bootstrap_of_each_side(root: Path) -> None:
    before, after = read_rows(root / "a"), read_rows(root / "b")
    made = bar_rows(before, after, compare(root / "a", root / "b"))
    assert [b.name for b in made] == [*grammar.TASKS, "overall"]
    rows = [r for r in after if r["tag"] == "position"]
    assert made[4].after == bootstrap_mean(
        [r["correct"] for r in rows], [r["prompt"] for r in rows]
    )
    for side in ("before", "after"):
        means = [getattr(b, side).mean for b in made]
        assert means[-1] == pytest.approx(np.mean(means[:-1]))


def test_a_straight_line_is_its_own_smoothing() -> None:
    """The window is symmetric everywhere, so the mean of a line over it is its middle value."""
    line = [3.0 - 0.5 * k for k in range(20)]
    for window in (1, 4, 7, 50):
        assert smooth(line, window) == pytest.approx(line)
    assert smooth([0, 0, 3, 0, 0], 3) == [0, 1, 1, 1, 0]


def test_figures_keep_names_as_text_and_the_pages_colours() -> None:
    value = Interval(0.5, 0.4, 0.6)
    made = bars([Bar("$a$ <b>", value, value, value), Bar("overall", value, value, value)], "n")
    assert "$a$ &lt;b&gt;</text>" in made and "var(--before)" in made and "var(--after)" in made
    assert not re.search(r"#[0-9a-f]{6}|<style|http", made)
    assert curves([{"step": 1, "loss": 1.0}, {"step": 2, "lr": 1.0}], "n") is None
    drawn = curves([{"step": k, "rewards/margins": k} for k in range(4)], "n") or ""
    assert "reward margin</text>" in drawn and "loss</text>" not in drawn


def test_a_label_stays_inside_the_picture() -> None:
    """Above its box; below where there is no room above; inside where there is neither."""
    font = gallery.FONT * 64
    for box, place in (((2, 30, 60, 60), "above"), ((40, 0, 64, 40), "below")):
        made = gallery.box_of(Detection("bottle", 0.97, box, None, "purple"), True, (64, 64))
        x, y = made.text
        assert made.label == "purple bottle 0.97" and x >= 0
        assert x + gallery.ADVANCE * font * len(made.label) <= 64 + 0.01
        assert (y < box[1]) if place == "above" else (box[3] < y <= 64)
    inside = gallery.box_of(Detection("bed", 0.97, (0, 0, 64, 64)), True, (64, 64)).text
    assert 0 < inside[1] < 64


def test_labels_keep_clear_of_each_other() -> None:
    """Boxes side by side, whose labels above them would lie over each other."""
    tie = Detection("tie", 0.97, (3, 20, 21, 51), None, "purple")
    bed = Detection("bed", 0.98, (32, 23, 60, 40), None, "black")
    weak = Detection("car", 0.1, (3, 20, 21, 51))
    first, unseen, second = gallery.boxes_of([tie, weak, bed], 0.3, (64, 64))
    assert first == gallery.box_of(tie, True, (64, 64)) and not unseen.counted
    assert gallery.box_of(bed, True, (64, 64)).text[1] == pytest.approx(21.6, abs=0.1)  # above
    assert second.text[1] > 40  # below its box
    apart = gallery.boxes_of([tie, Detection("bed", 0.98, (32, 60, 60, 64))], 0.3, (64, 64))
    assert apart[1].text[1] < 60
    ten = gallery.boxes_of([tie] * 10, 0.3, (64, 64))  # no room is left: on top of each other
    assert len({b.text for b in ten}) == 5


def test_the_counting_task_counts_by_its_own_threshold(root: Path) -> None:
    row = read_rows(root / "b")[3] | {"detections": [], "reason": "a\nb"}
    row["detections"] = [{"class": "car", "score": s, "box": [0, 0, 9, 9]} for s in (0.95, 0.5)]
    for tag, counted in (("colors", [True, True]), ("counting", [False, True])):
        seen = gallery.picture(root / "b", row | {"tag": tag}, "after")
        assert [b.counted for b in seen.boxes] == counted and seen.reason == "a; b"
    assert seen.seen == "car 0.95, car 0.50 (not counted)"


def test_changed_pairs_are_taken_from_the_tasks_in_turn() -> None:
    rows = [{"tag": t} for t in "aaaabbc"]
    assert gallery.in_turn(range(7), rows, 5) == [0, 1, 4, 5, 6]
    assert gallery.in_turn([0, 1, 2], rows, 5) == [0, 1, 2]
    assert gallery.in_turn([], rows, 5) == []


def test_fewer_pairs_are_shown_where_pictures_are_large(root: Path) -> None:
    folders = root / "a", root / "b"
    rows = read_rows(folders[0]), read_rows(folders[1])
    full = gallery.choose(folders, *rows)
    assert full.tasks["colors"] == list(range(12, 16)) and full.changed["broken"] == [1, 7]
    size = sum(f.stat().st_size for f in root.rglob("samples/*.png")) * 4 / 3
    some = gallery.choose(folders, *rows, max_bytes=int(size * 1.25))
    assert some.tasks["colors"] == [12, 13, 14]
    least = gallery.choose(folders, *rows, max_bytes=0)
    assert {len(ks) for ks in least.tasks.values()} == {1}


def test_bad_pictures_are_named(root: Path, tmp_path: Path) -> None:
    row = read_rows(root / "a")[0]
    with pytest.raises(DataError, match=r"picture .*0000\.png is missing"):
        gallery.picture(tmp_path, row, "before")
    with pytest.raises(DataError, match=r"names '\.\./secret\.png', outside its folder"):
        gallery.picture(tmp_path, row | {"filename": "../secret.png"}, "before")
    (tmp_path / "x.png").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"x\.png is no PNG, JPEG or WebP file"):
        gallery.picture(tmp_path, row | {"filename": "x.png"}, "before")


def test_the_recipe_reads_back_as_it_was(tmp_path: Path) -> None:
    from recipe_files import write_recipe

    from t2i_align.recipe import load_recipe

    first = load_recipe(write_recipe(tmp_path), run_checks=False).model_dump(mode="json")
    (tmp_path / "again.yaml").write_text(recipe_yaml(first))
    again = load_recipe(tmp_path / "again.yaml", run_checks=False)
    assert again.model_dump(mode="json") == first
    assert "null" in recipe_yaml(first) and recipe_yaml({}) == ""


def test_eval_commands_repeat_the_protocol(page: Page, root: Path) -> None:
    """Read by the command line itself, they ask for the same protocol, weights and place."""
    import typer

    from t2i_align.cli import build_app

    command: Any = typer.main.get_command(build_app())
    lines = [line for line in page.text.splitlines() if line.startswith("t2i-align eval ")]
    for line, name in zip(lines, "ab", strict=True):
        given = command.commands["eval"].make_context("eval", shlex.split(line)[2:]).params
        expected: dict[str, Any] = {"model": "truth", "lora": None, "out": root / name}
        expected |= {"denoiser": str(root / "run" / "unet"), "benchmark": "scenes"}
        expected |= defaults("scenes").protocol()
        assert {k: v for k, v in given.items() if k in expected} == expected
        settings = read_settings(given["settings"])
        assert settings == {"per_task": PER_TASK, "prompt_seed": 0, "held_out": True}
        others = given.keys() - expected.keys() - {"settings"}
        assert not [
            k
            for k in others
            if given[k] not in (None, False, ()) and k not in ("num_processes", "embedding")
        ]


def test_an_eval_command_names_what_differs_from_the_defaults(tmp_path: Path) -> None:
    protocol = evaluations.protocol_of(PER_TASK)
    fact = {"protocol": protocol, "model": "m", "lora": "l", "max_sequence_length": "16"}
    words = shlex.join(eval_command(tmp_path, fact))
    assert "--model m --lora l --max-sequence-length 16 --set per_task=4" in words
    fact |= {"options": {"per_task": 9}, "pictures": "/p"}
    words = shlex.join(eval_command(tmp_path, fact))
    assert "eval scenes --images /p --set per_task=9 --seed 0" in words and "--model" not in words
    words = shlex.join(eval_command(tmp_path, fact | {"replayed": "a.jsonl"}))
    assert f"eval scenes --detections a.jsonl --set per_task=9 --out {tmp_path}" in words


def test_extras_come_from_a_summary(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    file.write_text(
        json.dumps(
            {
                "before": {"overall": 0.5},
                "seconds": {"train": 1.5},
                "sections": [{"title": "Judges", "rows": [{"name": "a"}, {"value": None}]}],
            }
        )
    )
    judges, seconds = read_extras(file)
    assert judges.columns == ["name", "value"] and judges.cells == [["a", ""], ["", ""]]
    assert seconds == Section("Seconds by phase", rows=[{"phase": "train", "seconds": 1.5}])
    file.write_text('{"sections": [{"titel": "x"}]}')
    with pytest.raises(DataError, match=r"a section is \{'title': text.*got \{'titel': 'x'\}"):
        read_extras(file)
    file.write_text("[1]")
    with pytest.raises(DataError, match="holds no JSON object, got list"):
        read_extras(file)
