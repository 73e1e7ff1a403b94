"""GenEval as a benchmark: its prompts, detectors and colours, the self-test, stored answers."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from t2i_align.catalog import find_root
from t2i_align.errors import DataError, ModelError, RecipeError
from t2i_align.evaluate.benchmark import Item, Picture
from t2i_align.evaluate.benchmarks import BENCHMARKS, build
from t2i_align.evaluate.detections import RLE, Detection, crop
from t2i_align.evaluate.detectors import self_test
from t2i_align.evaluate.detectors.base import CLASSES
from t2i_align.evaluate.detectors.colors import ColorClassifier
from t2i_align.evaluate.metrics.geneval import COLORS
from t2i_align.evaluate.run import Request, run
from t2i_align.scenes.grammar import fixed_prompts, scene_for
from t2i_align.scenes.render import render
from tests.tiny_detectors import detector_options, mask2former_folder

CLIP = find_root() / "reward_models" / "scenes_clip"
WORLD: dict[str, Any] = {"detector": "scenes", "images_per_prompt": 2}


def quiet() -> Console:
    return Console(file=io.StringIO())


def write_prompts(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(m) + "\n" for m in items))
    return path


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of the world with two pictures each in the released layout, one JPEG, some wrong."""
    root = tmp_path_factory.mktemp("geneval")
    items = [m for m, _ in fixed_prompts(2, 0, held_out=True)]
    write_prompts(root / "prompts.jsonl", items)
    rng = np.random.default_rng(0)
    for number, metadata in enumerate(items):
        folder = root / "pictures" / f"{number:05d}" / "samples"
        folder.mkdir(parents=True)
        (folder.parent / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
        for k in range(2):
            shown = items[(number + 2) % len(items)] if (number, k) == (3, 1) else metadata
            image = Image.fromarray(render(scene_for(shown, rng), rng))
            if (number, k) == (0, 1):
                image.save(folder / f"{k:04d}.jpg", quality=100, subsampling=0)
            else:
                image.save(folder / f"{k:04d}.png")
    return root


def options_of(root: Path) -> dict[str, Any]:
    return WORLD | {"prompts": str(root / "prompts.jsonl")}


@pytest.fixture(scope="module")
def evaluated(world: Path) -> Path:
    request = Request("geneval", world / "out", options_of(world), images=world / "pictures")
    run(request, quiet())
    return world / "out"


def test_pictures_of_elsewhere_are_judged_by_the_rules(evaluated: Path) -> None:
    """24 pictures, one of another prompt: 23 right; JPEG is read too."""
    rows = rows_of(evaluated)
    wrong = [r for r in rows if not r["correct"]]
    assert len(rows) == 24 and [r["filename"] for r in wrong] == ["00003/samples/0001.png"]
    assert wrong[0]["reason"].startswith("expected ") and wrong[0]["graded"] < 1
    assert rows[1]["filename"] == "00000/samples/0001.jpg" and rows[1]["image"] == 1
    summary = json.loads((evaluated / "summary.json").read_text())
    assert summary["tasks"]["two_object"] == 0.75
    assert summary["overall"]["mean"] == pytest.approx((5 + 0.75) / 6)
    assert summary["tables"]["images and prompts"] == {"images": 23 / 24, "prompts": 1.0}
    protocol = summary["protocol"]
    assert protocol["prompts"] == "custom" and len(protocol["prompts_sha256"]) == 64
    assert protocol["detector"] == "scenes, exact" and protocol["self_test"] == "exact"
    assert protocol["num_inference_steps"] is None and protocol["images_per_prompt"] == 2
    assert (summary["images_expected"], summary["images_found"]) == (24, 24)
    assert not summary["partial"] and torch.__version__.startswith(summary["versions"]["torch"])


def test_answers_are_replayed_without_pictures(evaluated: Path, world: Path) -> None:
    """Colours are in the file; another threshold is another verdict, and the result says so."""
    moved = world / "moved" / "answers.jsonl"
    moved.parent.mkdir()
    moved.write_bytes((evaluated / "answers.jsonl").read_bytes())
    result = run(Request("geneval", world / "again", answers=moved), quiet())
    before = json.loads((evaluated / "summary.json").read_text())
    assert result["overall"] == before["overall"] and result["tasks"] == before["tasks"]
    assert result["protocol"]["detector"] == "scenes, exact" and result["replayed"] == str(moved)
    assert result["protocol"]["replayed_with"] == {}
    keys = ("correct", "reason", "prompt", "image")
    first, second = (
        [[r[k] for k in keys] for r in rows_of(f)] for f in (evaluated, world / "again")
    )
    assert first == second
    strict = {"threshold": 0.9999, "counting_threshold": 0.9999}
    other = run(Request("geneval", world / "strict", strict, answers=moved), quiet())
    assert other["overall"]["mean"] < 0.2 and other["protocol"]["replayed_with"] == strict
    low = Request("geneval", world / "low", {"threshold": 0.01}, answers=moved)
    with pytest.raises(DataError, match=r"threshold 0\.01 is below floor 0\.05"):
        run(low, quiet())


def test_answers_without_a_head_are_of_unknown_origin(evaluated: Path, world: Path) -> None:
    lines = (evaluated / "answers.jsonl").read_text().splitlines(keepends=True)
    bare = world / "bare.jsonl"
    bare.write_text("".join(lines[1:]))
    request = Request("geneval", world / "bare", options_of(world), answers=bare)
    result = run(request, quiet())
    assert result["protocol"]["origin"] == "unknown" and "detector" not in result["protocol"]
    assert result["overall"]["mean"] == pytest.approx((5 + 0.75) / 6)
    with pytest.raises(DataError, match="holds answers of 'geneval', not of 'scenes'"):
        run(Request("scenes", world / "x", answers=evaluated / "answers.jsonl"), quiet())


def test_missing_pictures_give_no_total_unless_asked(world: Path, tmp_path: Path) -> None:
    for number in range(12):
        target = tmp_path / "some" / f"{number:05d}" / "samples"
        target.mkdir(parents=True)
        for k in range(2):
            source = world / "pictures" / f"{number:05d}" / "samples" / f"{k:04d}.png"
            if source.is_file() and (number, k) != (5, 0):
                (target / source.name).write_bytes(source.read_bytes())
    request = Request("geneval", tmp_path / "out", options_of(world), images=tmp_path / "some")
    with pytest.raises(DataError, match=r"(?s)2 of 24 pictures are missing.*--allow-partial"):
        run(request, quiet())
    assert not (tmp_path / "out" / "summary.json").exists()
    result = run(request, quiet(), allow_partial=True)
    assert result["partial"] and (result["images_found"], result["images_expected"]) == (22, 24)


def test_folders_of_other_prompts_are_refused(world: Path, tmp_path: Path) -> None:
    items = [json.loads(x) for x in (world / "prompts.jsonl").read_text().splitlines()]
    long = [m | {"prompt": f"{m['prompt']}, in the evening"} for m in items]
    options = WORLD | {"prompts": str(write_prompts(tmp_path / "long.jsonl", long))}
    request = Request("geneval", tmp_path / "out", options, images=world / "pictures")
    with pytest.raises(DataError, match=r"(?s)metadata\.jsonl says .* --set prompts=PATH"):
        run(request, quiet())


def test_options_are_validated_with_the_nearest_match() -> None:
    with pytest.raises(RecipeError, match="did you mean 'detector'"):
        build("geneval", {"detektor": "owlv2"})
    with pytest.raises(RecipeError, match=r"threshold: got the number 2.*"):
        build("geneval", {"threshold": 2})
    assert list(BENCHMARKS) == sorted(BENCHMARKS)


def test_the_published_prompts_are_checked_by_hash(
    benchmarks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2I_ALIGN_BENCHMARKS", str(benchmarks_dir))
    plain, long = build("geneval", {}), build("geneval_long", {})
    assert len(plain.items()) == len(long.items()) == 553
    assert [i.id for i in plain.items()[:2]] == ["00000", "00001"]
    assert [i.task for i in plain.items()] == [i.task for i in long.items()]
    assert plain.items()[7].prompt != long.items()[7].prompt
    assert plain.images_per_prompt == 4 and len(build("geneval_plus_plus", {}).items()) == 280
    text = (benchmarks_dir / "geneval" / "evaluation_metadata.jsonl").read_text()
    (tmp_path / "geneval").mkdir()
    (tmp_path / "geneval" / "evaluation_metadata.jsonl").write_text(text + " ")
    monkeypatch.setenv("T2I_ALIGN_BENCHMARKS", str(tmp_path))
    with pytest.raises(DataError, match="is not the published file"):
        build("geneval", {}).items()
    with pytest.raises(DataError, match="eval fetch geneval_long"):
        build("geneval_long", {}).items()


def test_an_index_to_a_later_clause_is_refused_when_loading(tmp_path: Path) -> None:
    clause = {"class": "dog", "count": 1, "position": ["left of", 1]}
    item = {"tag": "position", "prompt": "x", "include": [clause, {"class": "cat", "count": 1}]}
    path = write_prompts(tmp_path / "p.jsonl", [item])
    with pytest.raises(DataError, match="does not come earlier"):
        build("geneval", {"prompts": str(path)}).items()


# --- parity through the whole path


def test_parity_cases_by_stored_answers(benchmarks_dir: Path, tmp_path: Path) -> None:
    """Every case of the released evaluator: prompts, stored detections, run, result rows.

    One run a set of options; a case is a task of its own, so the total is the share of right ones.
    """
    text = (benchmarks_dir / "geneval" / "parity_cases.json").read_text(encoding="utf-8")
    cases = json.loads(text)["evaluate_cases"]
    by_options: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        by_options.setdefault(json.dumps(case["options"], sort_keys=True), []).append(case)
    seen = 0
    for number, (options, group) in enumerate(by_options.items()):
        given: dict[str, Any] = {"images_per_prompt": 1, "floor": 0.0, **json.loads(options)}
        given = {k: v for k, v in given.items() if k not in ("clip_model",)}
        metadata = [c["metadata"] | {"prompt": c["metadata"].get("prompt", "")} for c in group]
        given["prompts"] = str(write_prompts(tmp_path / f"{number}.jsonl", metadata))
        lines = []
        for k, case in enumerate(group):
            found = [
                {"class": d["class"], "score": d["score"], "box": d["bbox"]}
                | ({"color": d["color"]} if d.get("color") else {})
                for d in case["detections"]
            ]
            row = {"id": f"{k:05d}", "number": 0, "answer": {"detections": found}}
            lines.append(json.dumps(row) + "\n")
        file = tmp_path / f"{number}.answers.jsonl"
        file.write_text("".join(lines))
        out = tmp_path / str(number)
        run(Request("geneval", out, given, answers=file), quiet())
        for case, row in zip(group, rows_of(out), strict=True):
            assert row["correct"] is case["expect_correct"], case["id"]
            ours = row["reason"].splitlines()
            assert len(ours) == len(case["expect_reason_lines"]), case["id"]
            for line, theirs in zip(ours, case["expect_reason_lines"], strict=True):
                before, brace, rest = theirs.partition("{")
                names, _, after = rest.partition("}")
                both = " and ".join(names.split(","))
                assert line == (f"{before}{both}{after}" if brace else theirs), case["id"]
            seen += 1
    assert seen == len(cases) == 26


def test_verdicts_of_2212_stored_answers_are_quick(benchmarks_dir: Path) -> None:
    """Twenty detections a picture; less than a second on one core (loosely asserted)."""
    rng = np.random.default_rng(0)
    prompts = benchmarks_dir / "geneval" / "evaluation_metadata.jsonl"
    bench = build("geneval", {"prompts": str(prompts)})
    pictures = [Picture(i, k, Path()) for i in bench.items() for k in range(4)]
    answers = []
    for picture in pictures:
        named = [c["class"] for c in picture.item.metadata["include"]]
        found = []
        for _ in range(20):
            x, y, w, h = rng.uniform(1, 300, 4).tolist()
            cls = named[int(rng.integers(len(named)))] if rng.random() < 0.3 else CLASSES[0]
            row = {"class": cls, "score": float(rng.random()), "box": [x, y, x + w, y + h]}
            found.append(row | {"color": COLORS[int(rng.integers(10))]})
        answers.append({"detections": found})
    assert len(pictures) == 2212
    start = time.process_time()
    verdicts = bench.verdicts(pictures, answers)
    seconds = time.process_time() - start
    print(f"{seconds:.2f} s for {len(verdicts)} verdicts")
    assert 0 < sum(bool(v.correct) for v in verdicts) < 2212 and seconds < 1


# --- colours


def literal_color(image: Image.Image, detection: Detection) -> str:
    """The classifier as the spec says it, by open_clip alone."""
    import open_clip

    made: Any = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    model, _, transform = made
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{CLIP}")
    model.eval()
    similarities = []
    with torch.no_grad():
        shown: Any = transform(crop(image, detection))
        x = model.encode_image(shown[None])
        x = x / x.norm()
        for color in COLORS:
            texts = [
                f"a photo of a {color} {detection.cls}",
                f"a photo of a {color}-colored {detection.cls}",
                f"a photo of a {color} object",
            ]
            rows = [model.encode_text(tokenizer([t]))[0] for t in texts]
            mean = torch.stack([r / r.norm() for r in rows]).mean(0)
            similarities.append(float((x[0] * mean / mean.norm()).sum()))
    return COLORS[int(np.argmax(similarities))]


def test_the_colour_is_the_nearest_of_ten_embedded_names() -> None:
    rng = np.random.default_rng(3)
    classifier = ColorClassifier(str(CLIP), None, ("#999", True))
    image = Image.fromarray(rng.integers(0, 255, (64, 80, 3), dtype=np.uint8))
    found = []
    for k in range(4):
        mask = np.zeros((64, 80), bool)
        mask[5 + k : 40, 8 * k : 8 * k + 30] = True
        box = (8 * k, 5 + k, 8 * k + 30, 40)
        found.append(Detection(("car", "bed")[k % 2], 0.9, box, RLE.encode(mask)))
    assert classifier.colors(image, found) == [literal_color(image, d) for d in found]
    weights = classifier.weights("car")
    assert weights.shape[0] == 10 and torch.allclose(weights.norm(dim=1), torch.ones(10))
    identity = classifier.identity()
    assert identity["color_classifier"] == "open_clip scenes_clip" and identity["crop"]


# --- the self-test and a real detector


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mask2former_folder(tmp_path_factory.mktemp("m2f"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small inputs, and records in a place of the test's own."""
    from t2i_align.evaluate.detectors import mask2former

    monkeypatch.setattr(mask2former, "SHORTER", 64)
    monkeypatch.setattr(mask2former, "LONGER", 96)
    monkeypatch.setenv("T2I_ALIGN_BENCHMARKS", str(tmp_path / "home"))


@pytest.mark.usefixtures("small")
def test_a_real_detector_and_classifier_end_to_end(
    world: Path, weights: Path, tmp_path: Path
) -> None:
    """Refused without a record; recorded; scored; colours stored for what a clause asks of."""
    options: dict[str, Any] = {
        "prompts": str(world / "prompts.jsonl"),
        "images_per_prompt": 1,
        "name_or_path": str(weights),
        "clip_model": str(CLIP),
        "clip_pretrained": None,
        "floor": 0.001,
        "threshold": 0.002,
        "counting_threshold": 0.004,
    }
    request = Request("geneval", tmp_path / "out", options, images=world / "pictures")
    with pytest.raises(ModelError, match=r"(?s)no self-test of .*self_test=record"):
        run(request, quiet())
    record = options | {"self_test": "record"}
    result = run(Request("geneval", tmp_path / "rec", record, images=world / "pictures"), quiet())
    assert result["protocol"]["self_test"] == "reproduced"
    again = run(request, quiet())
    assert again["overall"] == result["overall"] and again["images"] == 12
    assert again["protocol"]["detector_sha256"] == result["protocol"]["detector_sha256"]
    colored = 0
    for row in rows_of(tmp_path / "out"):
        asked = {c["class"] for c in row["metadata"]["include"] if "color" in c}
        for d in row["detections"]:
            assert "mask" not in d and ("color" in d) == (
                d["class"] in asked and d["score"] > 0.002
            )
            colored += "color" in d
    answers = (tmp_path / "out" / "answers.jsonl").read_text()
    replayed = run(
        Request("geneval", tmp_path / "re", answers=tmp_path / "out" / "answers.jsonl"), quiet()
    )
    assert replayed["overall"] == again["overall"] and len(answers.splitlines()) == 13


@pytest.mark.usefixtures("small")
def test_other_boxes_or_scores_fail_the_self_test(weights: Path) -> None:
    from t2i_align.evaluate.detectors.mask2former import Mask2Former

    detector = Mask2Former(detector_options(name_or_path=str(weights), floor=0.001))
    file = self_test.record(detector, None, {})
    assert self_test.check(detector)["self_test"] == "reproduced"
    known = json.loads(file.read_text())
    assert known["detections"] and len(known["detections"]) <= self_test.KEPT
    known["detections"][0]["score"] += 0.2  # as if this machine's scores had fallen
    file.write_text(json.dumps(known))
    with pytest.raises(ModelError, match=r"fails its self-test .*expected "):
        self_test.check(detector)
    file.write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        self_test.check(detector)


@pytest.mark.usefixtures("small")
def test_a_detector_that_fails_its_self_test_scores_nothing(
    world: Path, weights: Path, tmp_path: Path
) -> None:
    """Its scores fell since the record was made: refused before anything is written."""
    from t2i_align.evaluate.detectors.mask2former import Mask2Former

    floor = {"floor": 0.001, "threshold": 0.002, "counting_threshold": 0.004}
    file = self_test.record(
        Mask2Former(detector_options(name_or_path=str(weights), floor=0.001)), None, {}
    )
    options: dict[str, Any] = floor | {
        "prompts": str(world / "prompts.jsonl"),
        "images_per_prompt": 1,
        "name_or_path": str(weights),
        "clip_model": str(CLIP),
        "clip_pretrained": None,
    }
    request = Request("geneval", tmp_path / "out", options, images=world / "pictures")
    known = json.loads(file.read_text())
    fallen = [d | {"score": d["score"] + 0.1} for d in known["detections"]]
    file.write_text(json.dumps(known | {"detections": fallen}))
    with pytest.raises(ModelError, match=r"fails its self-test .*expected .*found "):
        run(request, quiet())
    assert not (tmp_path / "out").exists()
    file.write_text(json.dumps(known))
    assert run(request, quiet())["protocol"]["self_test"] == "reproduced"


@pytest.mark.usefixtures("small")
def test_nothing_is_recorded_that_is_vouched_for_and_not_found(
    weights: Path, tmp_path: Path
) -> None:
    from t2i_align.evaluate.detectors.mask2former import Mask2Former

    detector = Mask2Former(detector_options(name_or_path=str(weights), floor=0.001))
    photo = tmp_path / "photo.png"
    self_test.drawn().save(photo)
    with pytest.raises(ModelError, match=r"(?s)does not find 3 dog .*nothing was recorded"):
        self_test.record(detector, photo, self_test.read_vouched("dog:3"))
    assert not list((tmp_path / "home").rglob("*.json"))
    with pytest.raises(DataError, match="needs the picture"):
        self_test.record(detector, None, {"dog": 1})
    for text in ("dogg:1", "dog", "dog:0"):
        with pytest.raises(DataError, match="is not CLASS:COUNT"):
            self_test.read_vouched(text)


class Vouching:
    """A detector that sees what it is told."""

    def __init__(self, found: list[Detection]) -> None:
        self.found = found

    def detect(self, images: Any) -> list[list[Detection]]:
        return [self.found for _ in images]

    def identity(self) -> dict[str, Any]:
        return {"detector": "told", "detector_sha256": "0" * 64}


@pytest.mark.usefixtures("small")
def test_a_record_of_known_objects_is_verified(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    self_test.drawn().save(photo)
    dogs = [Detection("dog", s, (x, 0, x + 50, 60)) for s, x in ((0.9, 0), (0.8, 200))]
    self_test.record(Vouching(dogs), photo, {"dog": 2})
    assert self_test.check(Vouching(dogs))["self_test"] == "verified"
    near = [Detection("dog", s - 0.02, (x + 5, 0, x + 50, 60)) for s, x in ((0.9, 0), (0.8, 200))]
    assert self_test.check(Vouching(near))["self_test"] == "verified"
    for odd in (
        dogs[:1],
        [dogs[0], Detection("dog", 0.8, (240, 0, 290, 60))],
        [dogs[0], Detection("cat", 0.8, (200, 0, 250, 60))],
        [dogs[0], Detection("dog", 0.7, (200, 0, 250, 60))],
    ):
        with pytest.raises(ModelError, match="fails its self-test"):
            self_test.check(Vouching(odd))


def test_stored_answers_of_another_form_are_named() -> None:
    bench = build("geneval", {"detector": "scenes"})
    metadata = {"tag": "x", "prompt": "p", "include": [{"class": "dog", "count": 1}]}
    picture = Picture(Item("00007", "p", "x", metadata), 2, Path())
    with pytest.raises(DataError, match=r"picture 2 of 00007 holds no list of detections"):
        bench.verdicts([picture], [{"text": "yes"}])
    with pytest.raises(DataError, match=r"picture 2 of 00007: a box is four"):
        bench.verdicts([picture], [{"detections": [{"class": "dog", "score": 1.0, "box": [1]}]}])
