"""T2I-CompBench end to end: tiny models of the real classes, and the embedded world."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_clip import judge_of, media, open_clip_folder
from tiny_compbench import SIDE, WORDS, blip_folder, depth_folder, owl_folder, yolos_folder

from t2i_align.catalog import find_root
from t2i_align.errors import ModelError
from t2i_align.evaluate.answers import read_answers
from t2i_align.evaluate.benchmark import Picture, Verdict
from t2i_align.evaluate.benchmarks.compbench import CompBench, CompBenchOptions
from t2i_align.evaluate.benchmarks.compbench_blip import Blip, prepared
from t2i_align.evaluate.benchmarks.compbench_files import FILES
from t2i_align.evaluate.benchmarks.compbench_vision import ClosedSet, Depth, Owl, as_frame
from t2i_align.evaluate.benchmarks.compbench_vlm import Marks, questions
from t2i_align.evaluate.pictures import save
from t2i_align.evaluate.run import Request, run
from t2i_align.scenes.render import Scene, Thing, render


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {"blip_path": blip_folder(root / "blip"), "depth_path": depth_folder(root / "depth")}
    made |= {"detector_path": owl_folder(root / "owl"), "yolos": yolos_folder(root / "yolos")}
    open_clip_folder(root / "clip", True, "open_clip_model.safetensors")
    return {k: str(v) for k, v in made.items()} | {"clip_path": str(root / "clip")}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 40), Image.Resampling.BICUBIC)


# --- each model against its library


def test_blip_is_read_as_its_own_generation_begins(
    folders: dict[str, str], photo: Image.Image
) -> None:
    """One question at a time, unpadded, through ``generate``'s first distribution."""
    blip = Blip(folders["blip_path"], "cpu", SIDE)
    asked = ["a red car?", "the wet dog next to a bird and a car?", "a dog?"]
    found = blip.ask(photo, asked)
    assert len({round(p, 6) for p in found}) == 3
    for question, p in zip(asked, found, strict=True):
        ids = blip.tokenizer(question.replace("?", " ?"), return_tensors="pt")
        first = {}
        for name, token in (("enc", len(WORDS) + 1), ("cls", 2)):
            ids.input_ids[:, 0] = token
            out = blip.model.generate(
                input_ids=ids.input_ids,
                attention_mask=ids.attention_mask,
                pixel_values=prepared(photo, SIDE)[None],
                interpolate_pos_encoding=True,
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            q = out.logits[0][0].softmax(-1)
            first[name] = (q[5] / (q[5] + q[6])).item()
        assert p == pytest.approx(first["enc"], abs=1e-5)
        assert abs(p - first["cls"]) > 1e-5
        assert blip.ask(photo, [question]) == [p]
    assert blip.ask(photo, []) == []


def test_the_picture_is_stretched_not_cut(photo: Image.Image) -> None:
    """The mean of a picture of two halves stays the mean; CLIP's numbers scale it."""
    image = Image.new("RGB", (80, 20), (255, 0, 0))
    image.paste((0, 0, 255), (40, 0, 80, 20))
    pixels = prepared(image, 32)
    assert pixels.shape == (3, 32, 32)
    red = pixels[0] * 0.26862954 + 0.48145466
    assert red.mean().item() == pytest.approx(0.5, abs=0.01)
    assert red[:, :12].mean() > 0.99 and red[:, 20:].mean() < 0.01


def test_blip_without_its_tokens_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="multiple of its patches"):
        Blip(folders["blip_path"], "cpu", 50)
    with pytest.raises(ModelError, match="no BLIP at"):
        Blip(str(tmp_path), "cpu")


def test_owl_finds_the_words_it_is_asked_for(folders: dict[str, str], photo: Image.Image) -> None:
    """Scores, labels and boxes by hand: sigmoid of the best logit, on the square of 64."""
    owl = Owl(folders["detector_path"], 0.0, "cpu")
    found = owl(photo, ["car", "bird", "car"])
    text = [["a photo of a car", "a photo of a bird"]]
    inputs = owl.processor(text=text, images=photo, return_tensors="pt")
    with torch.inference_mode():
        out = owl.model(**inputs)
    best, which = out.logits[0].max(-1)
    order = best.sigmoid().argsort(descending=True)
    assert [d.score for d in found] == pytest.approx(best.sigmoid()[order].tolist())
    names = [("car", "bird")[k] for k in which[order].tolist()]
    assert [d.cls for d in found] == names and len(found) == 16
    x, y, w, h = (64 * out.pred_boxes[0][order]).unbind(-1)
    expected = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    assert torch.allclose(torch.tensor([d.box for d in found]), expected, atol=1e-3)
    assert owl(photo, []) == []
    middle = found[7].score
    high = Owl(folders["detector_path"], middle, "cpu")(photo, ["car", "bird"])
    assert len(high) == sum(d.score > middle for d in found)


def test_closed_sets_bring_their_own_labels(folders: dict[str, str], photo: Image.Image) -> None:
    detector = ClosedSet(folders["yolos"], 0.0, "cpu")
    found = detector(photo, ["anything"])
    inputs = detector.processor(images=photo, return_tensors="pt")
    with torch.inference_mode():
        out = detector.model(**inputs)
    best, which = out.logits[0].softmax(-1)[:, :-1].max(-1)
    order = best.argsort(descending=True)
    assert [d.score for d in found] == pytest.approx(best[order].tolist())
    assert [d.cls for d in found] == [("car", "wild bird", "dog")[k] for k in which[order].tolist()]
    x, _, w, _ = (64 * out.pred_boxes[0][order]).unbind(-1)
    assert [d.box[0] for d in found] == pytest.approx((x - w / 2).tolist(), abs=1e-3)


def test_depth_is_the_networks_map_in_the_frame(
    folders: dict[str, str], photo: Image.Image
) -> None:
    found = Depth(folders["depth_path"], "cpu", 32)(photo)
    depth = Depth(folders["depth_path"], "cpu", 32)
    square = np.asarray(photo.resize((32, 32), Image.Resampling.BICUBIC))
    mean, deviation = (np.array(v) for v in (depth.processor.image_mean, depth.processor.image_std))
    pixels = torch.from_numpy((square / 255 - mean) / deviation).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        raw = depth.model(pixels).predicted_depth[0].numpy()
    assert found.shape == (300, 480) and raw.std() > 0
    assert np.abs(found - as_frame(raw, (64, 40))).max() <= 2 / 255


def test_marks_are_asked_for_after_a_description(photo: Image.Image) -> None:
    """Two turns; a question a noun phrase for attributes, one for the prompt elsewhere."""
    marks = Marks(str(find_root() / "reward_models" / "scenes_vlm"), 4096, 3, "cpu")
    assert len(marks.weights_sha256) == 64
    found = marks(photo, "numeracy", "two birds", ["two birds"])
    assert set(found) == {"description", "marks"} and len(found["marks"]) == 1
    heard: list[Any] = []

    class Scripted:
        def check(self, text: str) -> None:
            heard.append(text)

        def texts(self, talks: list[Any], num_tokens: int) -> list[str]:
            heard.extend(talks)
            return ["it is red" if len(talks[0]) == 1 else '{"score": 4}']

    marks.vlm = Scripted()  # pyright: ignore[reportAttributeAccessIssue]
    found = marks(photo, "color", "a red car and a dog", ["a red car", "a dog"])
    assert found == {"description": "it is red", "marks": ['{"score": 4}'] * 2}
    assert heard[0] == "a red car and a dog"
    look, *asked = heard[1:]
    assert "50 words" in look[0]["content"][1]["text"] and look[0]["content"][0]["image"].size
    for talk, chunk in zip(asked, ("a red car", "a dog"), strict=True):
        assert [turn["role"] for turn in talk] == ["user", "assistant", "user"]
        assert talk[1]["content"][0]["text"] == "it is red"
        assert f'"{chunk}"' in talk[2]["content"][0]["text"]
    assert all(len(questions(c, "two birds", ["a", "b"])) == 1 for c in ("complex", "spatial"))


# --- the whole benchmark


PROMPTS = {
    "color": "a red car and a wet dog",
    "shape": "a dog and a bird",
    "texture": "the wet dog",
    "spatial": "a dog on the left of a car",
    "3d_spatial": "a dog in front of a car",
    "numeracy": "two birds and a car",
    "non_spatial": "a dog next to a car",
    "complex": "The wet dog was next to the red car.",
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    for category, text in PROMPTS.items():
        (folder / FILES[category]).write_text(f"{text}\n")
    (folder / "new_objects.txt").write_text("bird - birds\ncar - cars\n")
    for part in ("spatial", "action"):
        (folder / f"complex_val_{part}.txt").write_text("another prompt.\n")
    return folder


def options_of(folders: dict[str, str], prompts: Path, **given: Any) -> dict[str, Any]:
    own = {k: v for k, v in folders.items() if k != "yolos"}
    own |= {"blip_size": SIDE, "depth_size": 32, "threshold": 0.0, "clip_architecture": None}
    return own | {"prompts": str(prompts), "pictures": 2} | given


def pictures_of(bench: CompBench, folder: Path) -> list[Picture]:
    rng = np.random.default_rng(4)
    found = []
    for item in bench.items():
        for number in range(bench.images_per_prompt):
            file = folder / item.id / "samples" / f"{number:04d}.png"
            picture = Picture(item, number, file)
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            save(Image.fromarray(pixels).resize((64, 64)), picture)
            found.append(picture)
    return found


def test_all_eight_categories_and_a_replay(
    folders: dict[str, str], prompts: Path, tmp_path: Path
) -> None:
    """Scores follow by hand from the stored answers; other rules need the answers only."""
    given = options_of(folders, prompts)
    bench = CompBench(CompBenchOptions(**given))
    pictures = pictures_of(bench, tmp_path / "images")
    quiet = Console(file=io.StringIO())
    first = Request("t2i_compbench", tmp_path / "out", given, images=tmp_path / "images")
    summary = run(first, quiet)
    assert set(summary["tasks"]) == set(FILES) and summary["images"] == 16
    protocol = summary["protocol"]
    assert protocol["parser"] == "pattern" and protocol["prompts"] == "custom"
    assert protocol["variant"] == "official"
    hashes = {k: v["weights_sha256"] for k, v in protocol["models"].items()}
    assert set(hashes) == {"blip", "detector", "depth", "clip"} and len(set(hashes.values())) == 4

    rows = read_answers(tmp_path / "out" / "answers.jsonl").rows
    by_task: dict[str, list[Any]] = {name: [] for name in FILES}
    for (item_id, _), row in rows.items():
        by_task[item_id.removesuffix("_00000")].append(row.answer)
    yes = [round(round(a["yes"][0], 4) * round(a["yes"][1], 4), 4) for a in by_task["color"]]
    assert summary["tasks"]["color"] == pytest.approx(sum(yes) / 2)
    cosines = [a["cosine"] for a in by_task["non_spatial"]]
    assert summary["tasks"]["non_spatial"] == pytest.approx(sum(cosines) / 2)
    assert all(len(a["depth"]["swapped"]) == len(a["detections"]) for a in by_task["3d_spatial"])
    results = [json.loads(s) for s in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    for row in results:
        if row["tag"] == "complex":
            parts = row["parts"]
            assert row["score"] == pytest.approx(sum(parts.values()) / 3) and len(parts) == 3

    own: dict[str, Any] = {"name_or_path": folders["clip_path"], "architecture": None}
    own |= {"filename": "open_clip_model.safetensors", "preprocess": "clip", "cleaning": "ftfy"}
    clip = judge_of("clip_sim", Path(folders["clip_path"]), **own)
    seen = [Image.open(p.file).convert("RGB") for p in pictures if p.item.task == "non_spatial"]
    hundred = clip.score(media(seen), [PROMPTS["non_spatial"]] * 2).values
    assert cosines == pytest.approx((hundred / 100).tolist(), abs=1e-6)

    again = Request(
        "t2i_compbench",
        tmp_path / "again",
        {"variant": "fixed"},
        answers=tmp_path / "out" / "answers.jsonl",
    )
    replayed = run(again, quiet)
    assert replayed["protocol"]["replayed_with"] == {"variant": "fixed"}
    exact = [a["yes"][0] * a["yes"][1] for a in by_task["color"]]
    assert replayed["tasks"]["color"] == pytest.approx(sum(exact) / 2)


def test_the_same_words_and_weights_give_the_same_identity(
    folders: dict[str, str], prompts: Path
) -> None:
    """Another threshold, variant or weight file is another protocol."""
    categories = ("spatial", "color")

    def facts(**given: Any) -> str:
        options = CompBenchOptions(**options_of(folders, prompts, categories=categories, **given))
        return json.dumps(CompBench(options).identity(), sort_keys=True)

    base = facts()
    assert base == facts()
    changed = [facts(threshold=0.1), facts(variant="fixed")]
    changed += [facts(detector="detr", detector_path=folders["yolos"])]
    assert len({base, *changed}) == 4
    assert "clip" not in json.loads(base)["models"]


# --- the embedded world: scores follow the known truth


def world(
    prompts: Path, folder: Path, category: str, things: list[list[Thing]], texts: list[str]
) -> dict[str, list[Verdict]]:
    """Scores of rendered scenes under given prompts, official and fixed."""
    (prompts / FILES[category]).write_text("\n".join(texts) + "\n")
    (prompts / "new_objects.txt").write_text("car - cars\nbird - birds\nbottle - bottles\n")
    rng = np.random.default_rng(5)
    drawn = [Image.fromarray(render(Scene(tuple(t)), rng)) for t in things]
    scores = {}
    for variant in ("official", "fixed"):
        options = CompBenchOptions(
            prompts=str(prompts), categories=(category,), detector="scenes", variant=variant
        )
        bench = CompBench(options)
        pictures = [Picture(i, 0, folder / f"{i.id}.png") for i in bench.items()]
        for picture, image in zip(pictures, drawn, strict=True):
            image.save(picture.file)
        scores[variant] = bench.verdicts(pictures, bench.answers(pictures))
    return scores


LEFT, RIGHT, TOP, BOTTOM = (16.0, 32.0), (48.0, 32.0), (32.0, 16.0), (32.0, 48.0)


def test_places_of_the_world(tmp_path: Path) -> None:
    """The exact judge scores over 0.9: a right place is worth over 0.95, a wrong one 0."""
    places = {
        ("on the left of", LEFT, RIGHT): True,
        ("on the right of", LEFT, RIGHT): False,
        ("on the right of", RIGHT, LEFT): True,
        ("on the top of", TOP, BOTTOM): True,
        ("on the bottom of", TOP, BOTTOM): False,
        ("on the bottom of", BOTTOM, TOP): True,
        ("next to", LEFT, RIGHT): True,
    }
    things, texts = [], []
    for relation, first, second in places:
        things.append([Thing("car", "red", first, 24), Thing("bottle", "blue", second, 24)])
        texts.append(f"a car {relation} a bottle")
    things.append([Thing("car", "red", LEFT, 24)])
    texts.append("a car on the left of a bottle")
    for verdicts in world(tmp_path, tmp_path, "spatial", things, texts).values():
        for verdict, right in zip(verdicts, [*places.values(), False], strict=True):
            assert verdict.score > 0.95 if right else verdict.score == 0.0, verdict
        assert verdicts[-1].reason == "no bottle"


def test_numbers_of_the_world(tmp_path: Path) -> None:
    at = [(16.0, 16.0), (48.0, 48.0), (16.0, 48.0), (48.0, 16.0)]
    three = [Thing("bird", "red", p, 24) for p in at[:3]]
    mixed = [*(Thing("car", "red", p, 24) for p in at[:2]), Thing("bottle", "blue", at[2], 24)]
    truth = {"three birds": 1.0, "two birds": 0.5, "two cars": 0.0}
    pairs = {"two cars and a bottle": 1.0, "a car and a bottle": 0.75}
    pairs |= {"two cars, one bottle and one bird": 2 / 3}
    things, texts = [three] * 3 + [mixed] * 3, [*truth, *pairs]
    for verdicts in world(tmp_path, tmp_path, "numeracy", things, texts).values():
        expected = [*truth.values(), *pairs.values()]
        assert [v.score for v in verdicts] == pytest.approx(expected)
