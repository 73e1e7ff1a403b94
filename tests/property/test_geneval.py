"""GenEval's verdict against a slow literal reading of its rules, and what follows from them."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from t2i_align.errors import DataError
from t2i_align.evaluate.detections import RLE, Detection, crop
from t2i_align.evaluate.metrics.geneval import (
    COLORS,
    RELATIONS,
    GenEvalOptions,
    evaluate,
    overlap,
    relations,
    summary,
)

# --- the literal reading ------------------------------------------------------------------------
# Records are plain dicts, loops are written out, nothing is shared with the package.

PALETTE = "red orange yellow green blue purple pink brown black white".split()


def f32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def literal_iou(p: list[float], q: list[float]) -> float:
    def side(lo: float, hi: float) -> float:
        return 0 if hi - lo + 1 < 0 else hi - lo + 1

    inter = side(max(p[0], q[0]), min(p[2], q[2])) * side(max(p[1], q[1]), min(p[3], q[3]))
    area_p = side(p[0], p[2]) * side(p[1], p[3])
    area_q = side(q[0], q[2]) * side(q[1], q[3])
    union = area_p + area_q - inter
    return 0.0 if union == 0 else inter / union


def literal_relations(p: list[float], q: list[float], t: float) -> set[str]:
    cx = (p[0] + p[2]) / 2 - (q[0] + q[2]) / 2
    cy = (p[1] + p[3]) / 2 - (q[1] + q[3]) / 2
    wx = abs(p[2] - p[0]) + abs(q[2] - q[0])
    wy = abs(p[3] - p[1]) + abs(q[3] - q[1])
    sx, sy = abs(cx) - t * wx, abs(cy) - t * wy
    sx, sy = max(sx, 0.0), max(sy, 0.0)
    if cx < 0:
        sx = -sx
    if cy < 0:
        sy = -sy
    if abs(sx) < 1e-3 and abs(sy) < 1e-3:
        return set()
    length = (cx * cx + cy * cy) ** 0.5
    found = set()
    if sx / length < -0.5:
        found.add("left of")
    if sx / length > 0.5:
        found.add("right of")
    if sy / length < -0.5:
        found.add("above")
    if sy / length > 0.5:
        found.add("below")
    return found


def literal_keep(dets: list[dict], tag: str, o: dict) -> dict[str, list[dict]]:
    t = o["counting_threshold"] if tag == "counting" else o["threshold"]
    kept: dict[str, list[dict]] = {}
    for name in {d["class"] for d in dets}:
        rest = [d for d in dets if d["class"] == name and f32(d["score"]) > f32(t)]
        ranked: list[dict] = []
        while rest and len(ranked) < o["max_objects"]:
            best = rest[0]
            for d in rest:
                if f32(d["score"]) > f32(best["score"]):
                    best = d
            ranked.append(best)
            rest.remove(best)
        if o["max_overlap"] != 1:
            survivors: list[dict] = []
            for d in ranked:
                clash = False
                for s in survivors:
                    if not literal_iou(d["bbox"], s["bbox"]) < o["max_overlap"]:
                        clash = True
                if not clash:
                    survivors.append(d)
            ranked = survivors
        if ranked:
            kept[name] = ranked
    return kept


def literal_color(f: list[dict], clause: dict) -> str | None:
    answers = [d["color"] for d in f]
    k = answers.count(clause["color"])
    if k >= clause["count"]:
        return None
    parts = []
    for color in PALETTE:
        if answers.count(color) > 0:
            parts.append(f"{answers.count(color)} {color}")
    hist = ", ".join(parts)
    name, color = clause["class"], clause["color"]
    return f"expected {color} {name}>={clause['count']}, found {k} {color}; and {hist}"


def literal_position(f: list[dict], clause: dict, target: list | None, t: float) -> str | None:
    rel = clause["position"][0]
    if target is None:
        return f"no target for {clause['class']} to be {rel}"
    for a in f:
        for b in target:
            r = literal_relations(a["bbox"], b["bbox"], t)
            if rel not in r:
                names = " and ".join(sorted(r))
                return f"expected {clause['class']} {rel} target, found {names} target"
    return None


def literal_evaluate(dets: list[dict], meta: dict, o: dict) -> tuple[bool, list[str], dict]:
    kept = literal_keep(dets, meta["tag"], o)
    lines: list[str] = []
    groups: list[list | None] = []
    for clause in meta.get("include", []):
        f = kept[clause["class"]][: clause["count"]] if clause["class"] in kept else []
        failed = False
        if len(f) < clause["count"]:
            lines.append(f"expected {clause['class']}>={clause['count']}, found {len(f)}")
            failed = True
        elif "color" in clause:
            line = literal_color(f, clause)
            if line is not None:
                lines.append(line)
                failed = True
        if "position" in clause and not failed:
            target = groups[clause["position"][1]]
            line = literal_position(f, clause, target, o["position_threshold"])
            if line is not None:
                lines.append(line)
                failed = True
        groups.append(None if failed else f)
    for clause in meta.get("exclude", []):
        number = len(kept.get(clause["class"], []))
        if number >= clause["count"]:
            lines.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return len(lines) == 0, lines, kept


# --- random cases -------------------------------------------------------------------------------


def random_box(rng: random.Random, near: list[float] | None) -> list[float]:
    """Anywhere, on a small grid where borders are hit exactly, or diagonal to another box."""
    kind = rng.random()
    if near is not None and kind < 0.4:
        step = rng.choice([10, 20, 40, 55.5, 90]) * rng.choice([-1, 1])
        tilt = rng.choice([0, 0.5, 3**-0.5, 1, 3**0.5, 2]) * rng.choice([-1, 1])
        jitter = rng.choice([0, 0, 1e-3, -1e-3])
        return [
            near[0] + step,
            near[1] + step * tilt + jitter,
            near[2] + step,
            near[3] + step * tilt + jitter,
        ]
    if kind < 0.7:
        x, y = rng.randrange(0, 60, 10), rng.randrange(0, 60, 10)
        return [x, y, x + rng.choice([10, 20, 50]), y + rng.choice([10, 20, 50])]
    x, y = rng.uniform(0, 400), rng.uniform(0, 400)
    return [x, y, x + rng.uniform(1, 200), y + rng.uniform(1, 200)]


def random_detections(rng: random.Random, names: list[str], border: float) -> list[dict]:
    """Many of one class now and then; scores often at a threshold or one float away from it."""
    dets: list[dict] = []
    for name in names:
        for _ in range(rng.choice([0, 1, 2, 2, 3, 3, 5, 20])):
            at = np.float32(border)
            score = rng.choice(
                [
                    rng.uniform(0, 1),
                    rng.uniform(border, 1),
                    rng.uniform(border, 1),
                    border,
                    float(np.nextafter(at, np.float32(1))),
                    float(at) + 1e-9,  # above in float64, equal in float32
                    rng.choice([0.5, 0.93, 0.99]),  # ties
                ]
            )
            near = dets[-1]["bbox"] if dets else None
            box = random_box(rng, near)
            color = rng.choice(rng.choice([PALETTE, ["red", "blue"]]))
            dets.append({"class": name, "score": score, "bbox": box, "color": color})
    rng.shuffle(dets)
    return dets


def random_clause(rng: random.Random, names: list[str], index: int) -> dict[str, Any]:
    name = names[index] if rng.random() < 0.7 else rng.choice(names)
    clause: dict[str, Any] = {"class": name, "count": rng.choice([1, 1, 1, 1, 2, 3])}
    if rng.random() < 0.3:
        clause["color"] = rng.choice(["red", "blue", "white"])
    if index and rng.random() < 0.6:
        clause["position"] = [rng.choice(RELATIONS), rng.randrange(index)]
    return clause


def random_case(seed: int) -> tuple[list[dict], dict, dict]:
    rng = random.Random(seed)
    names = rng.sample(["cat", "dog", "apple"], 3)
    options = {
        "threshold": rng.choice([0.3, 0.3, 0.5, 0.0]),
        "counting_threshold": rng.choice([0.9, 0.9, 0.6]),
        "max_objects": rng.choice([16, 16, 16, 3, 1]),
        "max_overlap": rng.choice([1.0, 1.0, 0.5, 0.2, 1 / 3]),
        "position_threshold": rng.choice([0.1, 0.1, 0.1, 0.0, 0.3]),
    }
    tag = rng.choice(["counting", "position", "color_attr", "two_object"])
    meta: dict[str, Any] = {"tag": tag, "prompt": "a photo"}
    if rng.random() < 0.97:
        meta["include"] = [random_clause(rng, names, i) for i in range(rng.choice([1, 2, 2, 3]))]
    if rng.random() < 0.4:
        meta["exclude"] = [{"class": rng.choice(names), "count": rng.choice([1, 2, 3, 4, 17])}]
    border = options["counting_threshold" if tag == "counting" else "threshold"]
    return random_detections(rng, names, border), meta, options


def ours(dets: list[dict], colored: bool = True) -> list[Detection]:
    return [
        Detection(
            d["class"],
            d["score"],
            (d["bbox"][0], d["bbox"][1], d["bbox"][2], d["bbox"][3]),
            color=d["color"] if colored else None,
        )
        for d in dets
    ]


def kind_of(line: str) -> str:
    """Which rule wrote a reason."""
    if line.startswith("no target"):
        return "no target"
    if " target, found " in line:
        two, none = " and " in line, "found  target" in line
        return "two relations" if two else "no relation" if none else "one relation"
    return "color" if "; and " in line else "exclude" if "<" in line else "count"


NUM_CASES, NUM_BLOCKS = 20_000, 8


@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_a_literal_reading_agrees(block: int) -> None:
    """Verdict, reasons and kept detections, in order, on 20,000 random cases; each rule is met."""
    met: Counter[str] = Counter()
    for number in range(NUM_CASES // NUM_BLOCKS):
        seed = block * NUM_CASES + number
        dets, meta, options = random_case(seed)
        correct, lines, kept = literal_evaluate(dets, meta, options)
        verdict = evaluate(ours(dets), None, meta, GenEvalOptions(**options))
        assert (verdict.correct, list(verdict.reasons)) == (correct, lines), seed
        assert verdict.kept == {name: ours(found) for name, found in kept.items()}, seed
        met.update({kind_of(line) for line in lines} | {f"correct {correct}"})
        num_coloured = sum("color" in clause for clause in meta.get("include", []))
        met["coloured and correct"] += correct and num_coloured > 0
        met["placed and correct"] += correct and "position" in str(meta.get("include"))
        met["cut"] += any(len(found) == options["max_objects"] for found in kept.values())
    rare = {name: count for name, count in met.items() if count < 15}
    assert len(met) == 12 and not rare, met


@pytest.mark.parametrize("block", range(4))
def test_a_verdict_is_recomputed_from_its_own_file(block: int) -> None:
    """Kept detections, through JSON, with the colours that were asked for, judge the same."""
    for seed in range(block * 200, block * 200 + 200):
        dets, meta, options = random_case(seed)
        answers = {(d["class"], tuple(d["bbox"])): d["color"] for d in dets}
        first = evaluate(
            ours(dets, colored=False),
            None,
            meta,
            GenEvalOptions(**options),
            lambda _, d, name, known=answers: known[name, d.box],
        )
        flat = [d.to_dict() for found in first.kept.values() for d in found]
        again = [Detection.from_dict(record) for record in json.loads(json.dumps(flat))]
        assert evaluate(again, None, meta, GenEvalOptions(**options)) == first, seed


# --- consequences, by hand ----------------------------------------------------------------------


def box(x: float, y: float, side: float = 100) -> tuple[float, float, float, float]:
    return (x, y, x + side, y + side)


def wants(tag: str, *include: dict, exclude: tuple[dict, ...] = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "p"}


def test_a_horizontal_offset_must_exceed_a_fifth_of_the_summed_widths() -> None:
    """|c| - 0.1 w > |c|/2 means |c| > 0.2 w; two 100-pixel boxes: more than 40 pixels."""
    assert relations(box(0, 0), box(40.0, 0)) == set()
    assert relations(box(0, 0), box(40.1, 0)) == {"left of"}
    assert relations(box(0, 0), box(0, 40.1)) == {"above"}
    assert relations(box(0, 0), box(0, 0)) == set()


def test_near_a_diagonal_either_relation_satisfies() -> None:
    """At 45 degrees without shrinking both components are 0.71 > 1/2."""
    cat, dog = Detection("cat", 0.9, box(300, 300)), Detection("dog", 0.9, box(0, 0))
    for relation, correct in (("left of", True), ("above", True), ("below", False)):
        place = {"class": "dog", "count": 1, "position": [relation, 0]}
        meta = wants("position", {"class": "cat", "count": 1}, place)
        assert evaluate([cat, dog], None, meta).correct is correct


@settings(deadline=None)
@given(st.floats(0, 360), st.floats(10, 500))
def test_small_boxes_are_related_by_their_angle(degrees: float, distance: float) -> None:
    """Without shrinking each relation holds within 60 degrees of its axis (cos 60 = 1/2)."""
    angle = np.deg2rad(degrees)
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    found = relations((x, y, x + 1, y + 1), (0, 0, 1, 1), 0.0)
    axes = {"right of": 0, "below": 90, "left of": 180, "above": 270}
    for name, axis in axes.items():
        apart = abs((degrees - axis + 180) % 360 - 180)
        if abs(apart - 60) > 1e-3:
            assert (name in found) is (apart < 60)


corners = st.tuples(*[st.integers(0, 200)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@settings(deadline=None)
@given(corners, corners)
def test_relations_of_swapped_boxes_are_opposite(a: Any, b: Any) -> None:
    assert relations(b, a) == {OPPOSITE[name] for name in relations(a, b)}


@settings(deadline=None)
@given(corners, corners)
def test_detectors_float32_boxes_change_no_relation(a: Any, b: Any) -> None:
    """Boxes of masks are whole numbers, so single precision (the released code's) is exact enough.

    Eq. (1) to (3) in float32 numpy.
    """
    boxes = np.array([a, b], dtype=np.float32).reshape(2, 2, 2)
    c = boxes[0].mean(0) - boxes[1].mean(0)
    w = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    s = np.maximum(np.abs(c) - 0.1 * w, 0) * np.sign(c)
    expected = set()
    if not np.all(np.abs(s) < 1e-3):
        d = s / np.linalg.norm(c)
        holds = [d[0] < -0.5, d[0] > 0.5, d[1] < -0.5, d[1] > 0.5]
        expected = {name for name, true in zip(RELATIONS, holds, strict=True) if true}
    assert relations(a, b) == expected


def test_overlap_counts_inclusive_pixels() -> None:
    """Boxes 0..9 and 5..14 hold 100 pixels each and share 5 x 10: 50 / 150."""
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert overlap((3, 3, 2, 2), (3, 3, 2, 2)) == 0  # no pixels at all


def test_an_overlap_that_reaches_the_limit_drops_the_worse_one() -> None:
    """Of three in a row, IoU 1/3 each, the limit 1/3 drops the second; so the third may stay."""
    found = [Detection("cat", 0.9 - x / 100, (x, 0, x + 9, 9)) for x in (0, 5, 10)]
    for limit, kept in ((1 / 3, [0, 10]), (0.34, [0, 5, 10]), (1.0, [0, 5, 10])):
        verdict = evaluate(found, None, wants("x"), GenEvalOptions(max_overlap=limit))
        assert [d.box[0] for d in verdict.kept["cat"]] == kept


def test_only_the_top_ones_decide_colour() -> None:
    """A lower-ranked object of the right colour never rescues, one of the wrong never hurts."""
    meta = wants("colors", {"class": "cat", "count": 1, "color": "red"})
    red, blue = ("red", 0.8, 0.6), ("blue", 0.6, 0.8)
    for (_, high_red, low_red), correct in ((red, True), (blue, False)):
        found = [
            Detection("cat", high_red, box(0, 0), color="red"),
            Detection("cat", low_red, box(9, 9), color="blue"),
        ]
        assert evaluate(found, None, meta).correct is correct


def test_only_what_a_clause_looks_at_is_asked_for_its_colour() -> None:
    """One question for the best cat; the other cat, the dog and failed counts cost none."""
    questions: list[tuple[Any, str, str]] = []

    def color_of(image: Any, detection: Detection, name: str) -> str:
        questions.append((image, name, str(detection.score)))
        return "red"

    found = [
        Detection("cat", 0.6, box(0, 0)),
        Detection("cat", 0.8, box(9, 9), color="blue"),
        Detection("dog", 0.8, box(50, 50)),
    ]
    meta = wants(
        "color_attr",
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 2, "color": "red"},
    )
    verdict = evaluate(found, "the image", meta, color_of=color_of)
    assert questions == [("the image", "cat", "0.8")]
    assert verdict.reasons == ("expected dog>=2, found 1",)
    assert [d.color for d in verdict.kept["cat"]] == ["red", None]  # the answer replaced blue
    assert found[1].color == "blue"


def test_without_clauses_everything_is_correct() -> None:
    assert evaluate([], None, {"tag": "custom"}).correct


def test_the_counting_threshold_holds_for_every_class() -> None:
    cat = [Detection("cat", 0.89, box(0, 0))]
    assert not evaluate(cat, None, wants("counting", {"class": "cat", "count": 1})).correct
    assert evaluate(cat, None, wants("single_object", {"class": "cat", "count": 1})).correct


# --- errors -------------------------------------------------------------------------------------

CAT = {"class": "cat", "count": 1}


@pytest.mark.parametrize(
    ("clause", "text"),
    [
        ({"position": ["above", 1]}, "position points to clause 1, which does not come earlier"),
        ({"position": ["above", 2]}, "position points to clause 2, which does not come earlier"),
        ({"position": ["above", -1]}, "position points to clause -1, which does not come earlier"),
        ({"position": ["above"]}, "position is [relation, index], got ['above']"),
        ({"position": ["over", 0]}, "relation 'over'; allowed: left of, right of, above, below"),
        ({"position": ["above", "0"]}, "the index of a position is a whole number, got '0'"),
        ({"color": "gray"}, "color 'gray'; allowed: red, orange, yellow, green, blue, purple"),
        ({"colour": "red"}, "unknown colour; allowed: class, count, color, position"),
        ({"count": 0}, "count is a whole number >= 1, got 0"),
        ({"class": None}, "class is the name of a class, got None"),
    ],
)
def test_malformed_clauses_are_named(clause: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError) as caught:
        evaluate([], None, wants("position", CAT, CAT | clause))
    assert caught.value.message.startswith(f"include clause 1 of 'p': {text}")


def test_what_would_be_ignored_in_an_exclude_clause_is_an_error() -> None:
    with pytest.raises(DataError, match="exclude clause 0 of 'p': unknown color; allowed: class, "):
        evaluate([], None, wants("colors", exclude=(CAT | {"color": "red"},)))


def test_a_missing_tag_is_an_error() -> None:
    with pytest.raises(DataError, match="metadata needs a tag"):
        evaluate([], None, {"include": [CAT]})


def test_a_colour_that_is_not_known_or_not_in_the_palette_is_an_error() -> None:
    meta = wants("colors", CAT | {"color": "red"})
    cat = Detection("cat", 0.8, (1, 2, 3, 4))
    with pytest.raises(DataError) as caught:
        evaluate([cat], None, meta)
    assert str(caught.value) == (
        "the cat at [1, 2, 3, 4] (score 0.800) has no stored colour and its prompt asks for one\n"
        "  fix: pass color_of, or detections of an evaluation of the same prompt"
    )
    with pytest.raises(DataError, match=r"is 'gray'; allowed: red, orange, .*, white$"):
        evaluate([cat], None, meta, color_of=lambda *_: "gray")


# --- summary ------------------------------------------------------------------------------------


def test_overall_is_the_mean_of_the_tasks_present_and_the_others_are_named() -> None:
    """Tasks (1/4, 1): images 2/5, overall 5/8; prompts by metadata, key order aside."""
    first, second = {"prompt": "a", "tag": "colors"}, {"tag": "colors", "prompt": "a"}
    rows: list[dict[str, Any]] = [
        {"tag": "colors", "correct": True, "metadata": first},
        {"tag": "colors", "correct": np.False_, "metadata": second},
        {"tag": "colors", "correct": False, "metadata": "b"},
        {"tag": "colors", "correct": False, "metadata": "b"},
        {"tag": "counting", "correct": True, "metadata": "c"},
    ]
    found = summary(rows)
    assert list(found["tasks"]) == ["counting", "colors"]
    assert found["tasks"]["colors"] == {"mean": 0.25, "correct": 1, "count": 4}
    assert (found["num_images"], found["num_prompts"]) == (5, 3)
    assert found["images"] == 2 / 5 and found["prompts"] == 2 / 3 and found["overall"] == 5 / 8
    assert found["missing"] == ["single_object", "two_object", "position", "color_attr"]
    custom = summary([*rows, {"tag": "size", "correct": True, "metadata": "d"}])
    assert list(custom["tasks"]) == ["counting", "colors", "size"]
    assert custom["overall"] == (1 + 1 / 4 + 1) / 3


def test_a_summary_of_nothing_and_of_text_verdicts_is_an_error() -> None:
    with pytest.raises(DataError, match="no verdict to summarise"):
        summary([])
    with pytest.raises(DataError, match="row 0: correct is true or false, got 'false'"):
        summary([{"tag": "colors", "correct": "false", "metadata": "a"}])


# --- detections ---------------------------------------------------------------------------------

masks = hnp.arrays(np.bool_, st.tuples(st.integers(0, 7), st.integers(0, 7)))


@settings(deadline=None)
@given(masks)
def test_masks_survive_their_code(mask: np.ndarray) -> None:
    rle = RLE.encode(mask)
    assert np.array_equal(rle.decode(), mask)
    assert RLE.from_dict(json.loads(json.dumps(rle.to_dict()))) == rle
    assert sum(rle.counts[1::2]) == mask.sum()  # ones are the odd runs
    assert all(rle.counts[1:])  # runs alternate, so only the first may be empty


def test_masks_run_down_the_columns() -> None:
    """Columns 00, 11, 10 of the 2 x 3 mask: two zeros, three ones, one zero."""
    mask = np.array([[0, 1, 1], [0, 1, 0]]) == 1
    assert RLE.encode(mask) == RLE((2, 3), (2, 3, 1))
    assert RLE.encode(~mask) == RLE((2, 3), (0, 2, 3, 1))


@settings(deadline=None)
@given(masks, st.floats(0, 1), st.sampled_from([None, *COLORS]), st.booleans())
def test_detections_survive_json(mask: np.ndarray, score: float, color: Any, masked: bool) -> None:
    rle = RLE.encode(mask) if masked else None
    original = Detection("cat", score, (0.1, 2, 30.7, 4), rle, color)
    assert Detection.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_numpy_scores_and_boxes_are_written_as_json() -> None:
    x1, y1, x2, y2 = np.array([1, 2, 3, 4], dtype=np.float32)
    record = Detection("cat", np.float32(0.5), (x1, y1, x2, y2)).to_dict()  # pyright: ignore[reportArgumentType]
    assert json.dumps(record) == '{"class": "cat", "score": 0.5, "box": [1.0, 2.0, 3.0, 4.0]}'


GOOD = {"class": "cat", "score": 0.5, "box": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bbox": [1, 2, 3, 4]}, "missing: none, unknown: bbox"),
        ({"class": 3}, "class and color are text, got 3 and None"),
        ({"score": float("nan")}, "the score of a detection is a finite number, got nan"),
        ({"box": [1, 2, 3]}, "a box is four finite numbers [x1, y1, x2, y2], got [1, 2, 3]"),
        ({"mask": [1]}, "a mask is {'size': [h, w], 'counts': [...]}, got [1]"),
        ({"mask": {"size": [2, 2], "counts": "04"}}, "the mask's counts are COCO's compressed"),
        ({"mask": {"size": [2, 2], "counts": [-1, 5]}}, "mask size and counts are lists of whole"),
        ({"mask": {"size": [2, 2], "counts": [1, 2]}}, "the mask's runs cover 3 pixels, its size"),
    ],
)
def test_malformed_detections_are_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError) as caught:
        Detection.from_dict(GOOD | change)
    assert text in str(caught.value)


def test_a_detection_without_a_box_is_named() -> None:
    with pytest.raises(DataError, match="missing: box, unknown: none"):
        Detection.from_dict({"class": "cat", "score": 0.5})


def test_logits_are_no_mask() -> None:
    with pytest.raises(ValueError, match=r"got float64 \(2, 2\); threshold logits first"):
        RLE.encode(np.zeros((2, 2)))  # pyright: ignore[reportArgumentType]


def test_crop_refuses_a_mask_of_another_size_and_an_empty_box() -> None:
    image = Image.new("RGB", (6, 5))
    mask = RLE.encode(np.ones((6, 5), dtype=bool))
    with pytest.raises(DataError, match="the mask of 'cat' is 5 x 6 pixels, the image 6 x 5"):
        crop(image, Detection("cat", 0.5, (0, 0, 3, 3), mask))
    with pytest.raises(DataError, match="of 'cat' holds no pixel"):
        crop(image, Detection("cat", 0.5, (1, 1, 1.4, 3)))


def test_verdicts_need_no_torch() -> None:
    """A results file is judged again on a machine without any model."""
    code = (
        "import sys, t2i_align.evaluate.metrics.geneval, t2i_align.evaluate.aggregate;"
        "print([m for m in ('torch', 'PIL', 'transformers', 'diffusers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
