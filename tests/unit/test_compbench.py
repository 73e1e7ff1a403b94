"""T2I-CompBench's words, questions, marks, files and verdicts in closed form."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from t2i_align.errors import DataError, ModelError, RecipeError
from t2i_align.evaluate.benchmark import Item, Picture
from t2i_align.evaluate.benchmarks import build
from t2i_align.evaluate.benchmarks.compbench import CompBench, CompBenchOptions
from t2i_align.evaluate.benchmarks.compbench_files import FILES, find, published
from t2i_align.evaluate.benchmarks.compbench_parsers import PARSERS, PatternParser, SpacyParser
from t2i_align.evaluate.benchmarks.compbench_vision import as_frame
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.compbench import (
    answers_to,
    depth_score,
    in_depth,
    mean_depth,
    plane_relation,
)
from t2i_align.evaluate.metrics.compbench_marks import (
    asked,
    attribute_score,
    marks_score,
    questions,
    read_mark,
)
from t2i_align.evaluate.metrics.compbench_numeracy import read_objects, targets
from t2i_align.evaluate.metrics.compbench_words import (
    Parse,
    Token,
    complex_objects,
    two_objects,
    without_adjectives,
)

PARSER = PatternParser()


# --- words


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a blue chair and a pink lamp", ["a blue chair", "a pink lamp"]),
        ("a pink rose and a round painting", ["a pink rose", "a round painting"]),
        ("a flat can of glue and a big set of dice", ["a flat can", "glue", "a big set", "dice"]),
        ("The wet dog chased the old fox.", ["The wet dog", "the old fox"]),
        ("The long, thin rope lay on the deck", ["The long, thin rope", "the deck"]),
        ("a black and gold jug", ["a black and gold jug"]),
        ("The kite rose above its owner as they cheered", ["The kite", "its owner", "they"]),
        ("two goats", ["two goats"]),
    ],
)
def test_noun_phrases_of_the_built_in_parser(prompt: str, chunks: list[str]) -> None:
    assert list(PARSER(prompt).chunks) == chunks


def test_tokens_lie_where_they_say() -> None:
    prompt = "The wet dog's bowl, next to a well-kept hut."
    assert all(prompt[t.start :].startswith(t.text) for t in PARSER(prompt).tokens)


def test_a_phrase_of_place_holds_no_noun() -> None:
    assert two_objects(PARSER("a hen on the left of a tub")) == ["hen", "tub"]
    assert two_objects(PARSER("a hen near")) == ["hen", "hen"]
    assert two_objects(PARSER("near")) == []


def parse(text: str) -> Parse:
    """``word/KIND`` and plain words."""
    words, tokens, at = [], [], 0
    for part in text.split():
        word, _, kind = part.partition("/")
        tokens.append(Token(word, kind or "X", at))
        words.append(word)
        at += len(word) + 1
    return Parse(" ".join(words), tuple(tokens), ())


def test_objects_beside_a_phrase_of_place() -> None:
    """Nearest noun or name before; behind, the first noun even if a name comes earlier."""
    text = "the hen/NOUN of Bob/PROPN sat next to Ann/PROPN and a tub/NOUN"
    assert complex_objects(parse(text)) == ["Bob", "tub"]
    assert complex_objects(parse("a hen/NOUN next to Ann/PROPN")) == ["hen", "Ann"]
    assert complex_objects(parse("a hen/NOUN next to it")) == []
    assert complex_objects(parse("a hen/NOUN and a tub/NOUN")) == []
    both = "a hen/NOUN near a tub/NOUN next to a bed/NOUN"
    assert complex_objects(parse(both)) == []  # four words


def test_adjectives_leave_spaces_before_marks() -> None:
    assert without_adjectives(parse("the red/ADJ hen/NOUN , wet/ADJ .")) == "the hen , ."


def test_spacy_answers_are_taken_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its interface, played; test_spacy_parser.py asks spaCy itself where it is installed."""

    class Document(list):
        noun_chunks = (SimpleNamespace(text="a hen"), SimpleNamespace(text="the left"))

    words = [("a", "DET", 0), ("hen", "NOUN", 2), ("near", "ADP", 6)]
    made = Document(SimpleNamespace(text=t, pos_=p, idx=i) for t, p, i in words)

    class Pipeline:
        def __init__(
            self, version: str, pipe_names: tuple[str, ...] = ("tagger", "parser")
        ) -> None:
            self.meta, self.path, self.pipe_names = {"version": version}, tmp_path, pipe_names

        def __call__(self, text: str) -> Document:
            assert text == "a hen near"
            return made

    def parser(version: str, weights: bytes) -> SpacyParser:
        (tmp_path / "weights").write_bytes(weights)
        fake = SimpleNamespace(load=lambda name: Pipeline(version), __version__="3.5.0")
        monkeypatch.setitem(sys.modules, "spacy", fake)
        return SpacyParser()

    found = parser("3.5.0", b"1")("a hen near")
    assert found.tokens[1] == Token("hen", "NOUN", 2)
    assert questions(found.chunks) == ["a hen?"]
    first, other = (parser("3.5.0", w).identity() for w in (b"1", b"2"))
    assert first["parser"] == other["parser"] == "spacy en_core_web_sm (3.5.0, 3.5.0)"
    assert first["parser_sha256"] != other["parser_sha256"]  # the same name, other weights
    assert parser("3.5.0", b"1").identity() == first
    blank = SimpleNamespace(load=lambda name: Pipeline("1", ()), __version__="3.5.0")
    monkeypatch.setitem(sys.modules, "spacy", blank)
    with pytest.raises(ModelError, match=r"(?s)no parser, only a tokenizer.*parser=pattern"):
        SpacyParser()("a hen near")


def test_without_spacy_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ModelError, match="parser=pattern"):
        PARSERS["spacy"]()("a hen")


# --- questions and marks


def test_eight_questions_and_no_places() -> None:
    chunks = ["a hen", "top", "the side", "the left", "the right", "the top", *"abcdefgh"]
    assert questions(chunks) == ["a hen?", "the top?", "a?", "b?", "c?", "d?", "e?", "f?"]
    assert asked('A "red" Hen (wet): two; #1~*!. ok? ') == "a red hen wet two 1 ok?"


def test_products_round_twice() -> None:
    """0.00005 becomes 0.0001 or 0.0 before it is multiplied; fixed keeps it."""
    assert attribute_score([0.98765, 0.5]) == round(round(0.98765, 4) * 0.5, 4)
    assert attribute_score([0.98765, 0.5], "fixed") == 0.98765 * 0.5
    assert attribute_score([]) == 1.0 and attribute_score([], "fixed") == 0.0


def test_marks() -> None:
    """An unreadable mark leaves 100 officially, and no score in the fixed rules."""
    assert marks_score(['{"score": 3}', '{"score": 2}'], attributes=True) == pytest.approx(15)
    assert marks_score(['{"score": 3}'], attributes=False) == pytest.approx(60)
    assert marks_score(["no idea"], attributes=False) == 100
    assert marks_score(["no idea"], attributes=False, variant="fixed") is None
    inside = 'Sure: {"score": 2, "explanation": "x"} there'
    assert read_mark(inside, 5) is None and read_mark(inside, 5, "fixed") == 2
    assert read_mark('{"score": 2, "explanation": "cut', 5) == 2
    assert read_mark('{"score": 5}', 4) is None and read_mark('{"score": true}', 4) is None


# --- places


def test_depth_of_half_overlap_and_of_none() -> None:
    """Boxes of 30 x 10 shifted by 10 share exactly half of their union."""
    boxes = ((0.0, 0.0, 30.0, 10.0), (10.0, 0.0, 40.0, 10.0))
    assert in_depth("front", boxes, (0.9, 0.1)) == 0
    assert in_depth("front", boxes, (0.9, 0.1), "fixed") == 1
    apart = ((0.0, 0.0, 10.0, 10.0), (8.0, 0.0, 18.0, 10.0))  # IoU 20 / 180
    assert in_depth("behind", apart, (0.9, 0.1)) == pytest.approx(2 / 9)
    assert in_depth("behind", apart, (0.9, 0.1), "fixed") == 0
    assert in_depth("behind", apart, (0.1, 0.9), "fixed") == pytest.approx(2 / 9)
    assert in_depth("front", (boxes[0], boxes[0]), (math.nan, 0.1)) == 0
    assert in_depth(None, boxes, (0.9, 0.1), "fixed") == 0


def test_the_last_of_a_kind_may_count_in_depth() -> None:
    """Labels car, carrot, hen: "car" was last seen in carrot when "hen" came."""
    found = [
        Detection("car", 1.0, (0, 0, 1, 1)),
        Detection("carrot", 0.4, (5, 5, 6, 6)),
        Detection("hen", 0.8, (9, 9, 10, 10)),
    ]
    depths = {d.box: 0.5 for d in found}
    official = depth_score(found, depths, ["car", "hen"], "a car behind a hen")
    assert official.first is found[1] and official.score == pytest.approx(0.3)
    fixed = depth_score(found, depths, ["car", "hen"], "a car behind a hen", "fixed")
    assert fixed.first is found[0] and fixed.score == pytest.approx(0.45)
    assert depth_score(found, depths, ["car"], "a car").score == 0


def test_depth_is_sliced_either_way() -> None:
    grid = np.arange(12.0).reshape(3, 4)  # rows 0..3, 4..7, 8..11
    assert mean_depth(grid, (2.9, 0, 4, 1.5), swapped=False) == 2.5  # columns 2, 3 of row 0
    assert mean_depth(grid, (2.9, 0, 4, 1.5), swapped=True) == 8  # row 2, column 0
    assert math.isnan(mean_depth(grid, (3, 0, 4, 1), swapped=True))
    assert mean_depth(grid, (-5, -5, 1, 1), swapped=False) == 0  # outside is cut off


def test_depth_maps_in_256_steps() -> None:
    """A constant map is 0; a ramp keeps its order and its ends in the frame."""
    assert as_frame(np.full((4, 4), 7.0), (64, 64)).max() == 0
    ramp = as_frame(np.tile(np.linspace(3, 9, 64), (64, 1)), (128, 64))
    assert ramp.shape == (240, 480) and ramp.min() == 0 and ramp.max() == 1
    assert (np.diff(ramp[0]) >= 0).all()
    assert np.allclose(ramp * 255, np.round(ramp * 255))


def test_names_inside_labels() -> None:
    assert answers_to("mouse2, mouse", "mouse") and answers_to("Mouse2", "mouse")
    assert answers_to("_dining table_dining table", "table") and answers_to("cattle, cow", "cow")
    assert answers_to("person", "girl") and answers_to("Handbag__handbag", "bag")
    assert not answers_to("vegetable", "table") and not answers_to("carrot", "car")
    assert not answers_to("table tennis", "table")


def test_the_phrase_that_nothing_scores() -> None:
    assert plane_relation("a cup on top of a tub", "official") is None
    assert plane_relation("a cup on top of a tub", "fixed") == "above"
    assert plane_relation("a cup on bottom of a tub", "fixed") == "below"
    assert plane_relation("a cup on the top of a tub", "official") == "above"


# --- counting


def test_targets_need_number_and_name_to_agree() -> None:
    plurals = read_objects("hen - hens\nfish - fish\ntea cup - tea cups\n\nperson - people\n")
    assert targets("a hen, three fish and two tea cups", plurals) == [
        ("hen", 1),
        ("fish", 3),
        ("tea cup", 2),
    ]
    assert targets("two hen and a hens and nine hens", plurals) == []
    assert targets("An hen. One fish; eight people", plurals) == [
        ("hen", 1),
        ("fish", 1),
        ("person", 8),
    ]
    with pytest.raises(DataError, match="line 2"):
        read_objects("hen - hens\nfish\n")


# --- files and options


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of our own prompts, CRLF as most of the published files."""
    texts = {
        "color": "a blue chair and a pink lamp",
        "spatial": "a hen on the left of a tub",
        "3d_spatial": "a hen in front of a tub",
        "numeracy": "two hens\r\nwarm weather",
        "non_spatial": "A hen looks for corn.",
        "complex": "The red hen was next to the old tub.\r\nThe wet hen ran.",
    }
    for category, text in texts.items():
        (tmp_path / FILES[category]).write_bytes(f"{text}\r\n".encode())
    (tmp_path / "new_objects.txt").write_text("hen - hens\n")
    (tmp_path / "complex_val_spatial.txt").write_text("The red hen was next to the old tub.\n")
    (tmp_path / "complex_val_action.txt").write_text("The wet hen ran.\n")
    return tmp_path


def bench(own: Path, *categories: str, **given: Any) -> CompBench:
    options = CompBenchOptions(prompts=str(own), categories=categories, **given)
    return CompBench(options)


def test_files_of_our_own_are_custom(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(("color", "numeracy"), str(own))
    assert found.kind == "custom" and len(found.sha256) == 3
    before = found.identity()["prompts_sha256"]
    (own / "new_objects.txt").write_text("hen - hens\ncat - cats\n")
    assert find(("color", "numeracy"), str(own)).identity()["prompts_sha256"] != before
    with pytest.raises(DataError, match=r"shape_val.txt not in .*\n.*prompts=FOLDER"):
        find(("shape",), str(own))
    monkeypatch.setenv("T2I_ALIGN_BENCHMARKS", str(own.parent))
    (own.parent / "t2i_compbench").symlink_to(own)
    with pytest.raises(DataError, match="not as published"):
        find(("color",), None)
    assert len(published()) == 11


def test_options_name_what_there_is(own: Path) -> None:
    with pytest.raises(RecipeError, match="colour"):
        build("t2i_compbench", {"categories": ["colour"]})
    with pytest.raises(RecipeError, match="variant"):
        build("t2i_compbench", {"varient": "fixed"})


def test_items_say_what_is_asked(own: Path) -> None:
    found = bench(own, "complex", "numeracy", "3d_spatial").items()
    assert [i.id for i in found[:3]] == ["complex_00000", "complex_00001", "numeracy_00000"]
    assert found[0].metadata == {
        "questions": ["The red hen?", "the old tub?"],
        "words": ["hen", "tub"],
        "caption": "The hen was next to the tub .",
        "part": "spatial",
    }
    assert found[1].metadata["part"] == "action" and found[1].metadata["words"] == []
    assert found[2].metadata == {"targets": [["hen", 2]]}
    assert found[4].metadata == {"words": ["hen", "tub"]}


# --- verdicts


def verdict_of(bench: CompBench, answer: dict[str, Any], number: int = 0) -> Any:
    item: Item = bench.items()[number]
    return bench.verdicts([Picture(item, 0, Path("x.png"))], [answer])[0]


def found_at(cls: str, box: tuple[float, ...], score: float = 0.8) -> dict[str, Any]:
    return {"class": cls, "score": score, "box": list(box)}


def test_pixels_are_those_of_the_frame(own: Path) -> None:
    """Boxes 30 pixels apart in a picture of 64 are 224 apart in the frame of 479."""
    found = [found_at("hen", (0, 0, 8, 8)), found_at("tub", (30, 30, 38, 38))]
    near = {"size": [64, 64], "detections": found}
    (own / FILES["spatial"]).write_text("a hen near a tub\n")
    assert verdict_of(bench(own, "spatial"), near).parts["relation"] == pytest.approx(
        150 / (30 * 479 / 64)
    )


def test_what_is_missing_is_named(own: Path) -> None:
    alone = {"size": [479, 479], "detections": [found_at("hen", (0, 0, 8, 8))]}
    verdict = verdict_of(bench(own, "spatial"), alone)
    assert (verdict.score, verdict.reason, verdict.correct) == (0.0, "no tub", None)
    depth = alone | {"depth": {"straight": [0.1], "swapped": [None]}}
    assert verdict_of(bench(own, "3d_spatial"), depth).score == pytest.approx(0.2)
    counted = verdict_of(bench(own, "numeracy"), alone)
    assert (counted.score, counted.reason) == (0.5, "expected 2 hen, found 1")
    nothing = verdict_of(bench(own, "numeracy"), alone, 1)
    assert nothing.score == 0 and "nothing that is counted" in nothing.reason


def test_each_variant_reads_its_own_depths(own: Path) -> None:
    """Official rules take the swapped means, under which the hen is behind."""
    boxes = [(0.0, 0.0, 30.0, 30.0), (2.0, 0.0, 32.0, 30.0)]
    answer = {
        "size": [479, 479],
        "detections": [found_at("hen", boxes[0], 1.0), found_at("tub", boxes[1], 1.0)],
        "depth": {"straight": [0.9, 0.2], "swapped": [0.2, 0.9]},
    }
    assert verdict_of(bench(own, "3d_spatial"), answer).score == 0.5
    assert verdict_of(bench(own, "3d_spatial", variant="fixed"), answer).score == 1.0


def test_three_in_one(own: Path) -> None:
    """Spatial: (b + s) / 2 with b = .9 * .5, s = .4 + .5; action: (b + c) / 2 with no objects."""
    answer = {
        "yes": [0.9, 0.5],
        "size": [479, 479],
        "detections": [found_at("hen", (0, 0, 8, 8)), found_at("tub", (9, 0, 17, 8))],
        "cosine": 0.3,
    }
    verdict = verdict_of(bench(own, "complex"), answer)
    assert verdict.score == pytest.approx((0.45 + 0.9) / 2)
    assert verdict.parts == pytest.approx({"attributes": 0.45, "spatial": 0.9, "cosine": 0.3})
    action = answer | {"yes": [0.9]}
    assert verdict_of(bench(own, "complex"), action, 1).score == pytest.approx((0.9 + 0.3) / 2)


def test_answers_of_another_kind_are_refused(own: Path) -> None:
    with pytest.raises(DataError, match=r"color_00000.*'color' needs: KeyError 'yes'"):
        verdict_of(bench(own, "color"), {"cosine": 0.3})
    with pytest.raises(DataError, match="2 questions and 1 answers"):
        verdict_of(bench(own, "color"), {"yes": [0.3]})


def test_summaries_leave_unreadable_marks_out(own: Path) -> None:
    chosen = bench(own, "color", "numeracy", scoring="vlm", variant="fixed")
    pictures = [Picture(item, 0, Path("x.png")) for item in chosen.items()]
    written = [['{"score": 4}', '{"score": 3}'], ["?"], ['{"score": 2}']]
    answers = [{"marks": marks} for marks in written]
    verdicts = chosen.verdicts(pictures, answers)
    summary = chosen.summary(pictures, verdicts)
    assert summary.tasks == pytest.approx({"color": 75, "numeracy": 40})
    assert summary.overall.mean == pytest.approx(57.5)
    assert summary.tables == {"unreadable marks": {"numeracy": 1}}
    with pytest.raises(DataError, match="no picture has a score"):
        chosen.summary(pictures[1:2], verdicts[1:2])
