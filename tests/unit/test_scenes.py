"""The world: grammar, split, and the exact judge with its negative controls."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from t2i_align.evaluate.metrics.geneval import evaluate, read_clauses
from t2i_align.scenes import grammar
from t2i_align.scenes import text as language
from t2i_align.scenes.detect import detect, detections
from t2i_align.scenes.render import CLASSES, GAP, PALETTE, SIDE, extent
from tests.judge_numbers import CHANGES, read_fully, scenes, taken_for
from tests.scenes_controls import CONTROLS, canvas


def combinations(item: grammar.Metadata) -> set[tuple[object, ...]]:
    """What a prompt puts together."""
    found: set[tuple[object, ...]] = set()
    for c in item["include"]:
        if "color" in c:
            found.add(("color", c["color"], c["class"]))
        if c["count"] > 1:
            found.add(("count", c["class"], c["count"]))
    if len(item["include"]) == 2:
        found.add(("pair", *sorted(c["class"] for c in item["include"])))
    return found


def test_held_out_combinations_never_occur_in_training_prompts() -> None:
    train = [m for items in grammar.prompts(held_out=False).values() for m in items]
    seen = set().union(*(combinations(m) for m in train))
    held = grammar.prompts(held_out=True)
    for task, items in held.items():
        if task == "single_object":  # combines nothing
            continue
        assert all(combinations(m) - seen for m in items), task
    train_texts = {m["prompt"] for m in train}
    others = [m for t, items in held.items() if t != "single_object" for m in items]
    assert not train_texts & {m["prompt"] for m in others}


def test_every_class_colour_count_and_relation_is_trained() -> None:
    train = grammar.prompts(held_out=False)
    assert {m["include"][0]["class"] for m in train["two_object"]} == set(CLASSES)
    assert {m["include"][0]["color"] for m in train["colors"]} == set(PALETTE)
    assert {m["include"][0]["count"] for m in train["counting"]} == {2, 3, 4}
    assert {m["include"][1]["position"][0] for m in train["position"]} == set(grammar.RELATIONS)
    sizes = {t: len(m) for t, m in grammar.prompts(held_out=True).items()}
    assert sizes == {
        "single_object": 10,
        "two_object": 18,
        "counting": 10,
        "colors": 20,
        "position": 72,
        "color_attr": 1620,
    }


def test_prompts_have_genevals_grammar_and_metadata() -> None:
    wanted = {
        "single_object": "a photo of an umbrella",
        "two_object": "a photo of a bowl and an airplane",
        "counting": "a photo of three cars",
        "colors": "a photo of an orange tie",
        "position": "a photo of a bed left of a car",
        "color_attr": "a photo of a red car and a green bed",
    }
    for task, text in wanted.items():
        both = itertools.chain(*(grammar.prompts(held_out=h)[task] for h in (False, True)))
        item = next(m for m in both if m["prompt"] == text)
        include, exclude = read_clauses(item)
        assert item["tag"] == task and include
        if task == "counting":
            assert [(c.cls, c.count) for c in exclude] == [("car", 4)]
        if task == "position":  # the target is clause 0 and is said last
            assert [c.cls for c in include] == ["car", "bed"]
            assert include[1].position == ("left of", 0)


def test_every_word_is_one_token_with_the_same_number_in_every_process() -> None:
    tokenizer = language.tokenizer()
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert tokens[:4] == ["<|startoftext|>", "<|endoftext|>", "a", "b"]
    assert tokens[27:30] == ["z", "a</w>", "b</w>"]
    pinned = "bc9398588dc4ea1d72b0cd2e36870291d1d1ae041c6a2b0f614919507ea2dcbb"
    assert hashlib.sha256(json.dumps(tokens).encode()).hexdigest() == pinned
    assert [tokenizer.tokenize(w) for w in language.words()] == [
        [f"{w}</w>"] for w in language.words()
    ]
    assert tokenizer.tokenize("A quiz") == ["a</w>", "q", "u", "i", "z</w>"]
    merges = language.merges_of(sorted(language.words()))
    for word in (*language.words(), "quiz", "carbed", "yellowish"):  # by the slow way
        assert language.split(word, merges) == tokenizer.tokenize(word)
    for item in grammar.flat_prompts(held_out=True)[::40]:
        ids = tokenizer(item["prompt"]).input_ids
        assert len(ids) == len(item["prompt"].split()) + 2 <= language.LENGTH
        assert tokenizer.decode(ids[1:-1]).strip() == item["prompt"]


def test_fixed_prompts_are_stable_and_balanced() -> None:
    first = grammar.fixed_prompts(100, 3, held_out=True)
    assert first == grammar.fixed_prompts(100, 3, held_out=True)
    assert Counter(m["tag"] for m, _ in first) == dict.fromkeys(grammar.TASKS, 100)
    assert len({(m["prompt"], k) for m, k in first}) == 600  # no picture twice


def test_scenes_fulfil_their_prompts_without_overlap() -> None:
    for item, scene, image in scenes(120, 1):
        want = Counter(c["class"] for c in item["include"] for _ in range(c["count"]))
        assert Counter(t.cls for t in scene.things) == want
        assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
        boxes = []
        for t in scene.things:
            w, h = extent(t.cls, t.size, t.angle)
            x, y = t.center
            boxes.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        for a, b in itertools.combinations(boxes, 2):
            gaps = (b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])
            assert max(gaps) >= GAP


@pytest.mark.parametrize("name", list(CHANGES))
def test_judge_reads_renders_fully(name: str) -> None:
    change, share = CHANGES[name]
    assert read_fully(change, 400) >= share


@pytest.mark.parametrize("name", list(CONTROLS))
def test_negative_controls_are_not_accepted(name: str) -> None:
    """At most 5 % of control pictures hold an accepted object, and no class takes 10 % of them."""
    accepted, most = taken_for(name, 400)
    assert accepted <= 0.05 and most <= 0.10


def test_graded_scores_start_where_controls_end() -> None:
    rng = np.random.default_rng(12)
    grades = [
        max((p.graded for p in detect(canvas(make(rng), rng))), default=0.0)
        for make in CONTROLS.values()
        for _ in range(150)
    ]
    assert np.mean(np.array(grades) < 0.1) >= 0.95
    real = [p.graded for _, _, image in scenes(60, 4) for p in detect(image)]
    assert np.percentile(real, 5) > 0.6


def test_scores_agree_with_both_of_genevals_thresholds() -> None:
    rng = np.random.default_rng(13)
    parts = [p for make in CONTROLS.values() for p in detect(canvas(make(rng), rng))]
    parts += [p for _, _, image in scenes(20, 5) for p in detect(image)]
    for p in parts:
        assert (p.detection.score > 0.9) == p.accepted == (p.detection.score > 0.3)


def test_wrong_things_are_wrong() -> None:
    """A right picture fails the prompt of another class, colour, count or relation."""
    for item, _, image in scenes(40, 6):
        other = dict(item["include"][0])
        other["class"] = CLASSES[(CLASSES.index(other["class"]) + 1) % len(CLASSES)]
        wrong = item | {"include": [other, *item["include"][1:]]}
        if Counter(c["class"] for c in item["include"])[other["class"]] == 0:
            assert not evaluate(detections(image), None, wrong).correct
        if item["tag"] == "counting":
            n = item["include"][0]["count"]
            more = item | {"include": [item["include"][0] | {"count": n + 1}]}
            assert not evaluate(detections(image), None, more).correct
        if item["tag"] == "position":
            target, subject = item["include"]
            flipped = {"left of": "right of", "right of": "left of", "above": "below"}
            relation = flipped.get(subject["position"][0], "above")
            turned = item | {"include": [target, subject | {"position": [relation, 0]}]}
            assert not evaluate(detections(image), None, turned).correct
