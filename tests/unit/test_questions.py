"""Questions about the world: their answers are true, balanced, and keep to the training side."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.geneval import evaluate
from t2i_align.scenes import grammar, questions
from t2i_align.scenes.questions import (
    FOREIGN,
    WORDINGS,
    Claim,
    Question,
    Seen,
    ask,
    ask_open,
    false_claim,
    phrase,
    read_claim,
    side,
    things_in,
    truth,
)
from t2i_align.scenes.render import Scene, Thing
from t2i_align.scenes.vlm_pictures import training_scene

NUMBERS = {"two": 2, "three": 3, "four": 4}
FRAMES = (
    r'Does this figure show "(?:a photo of )?(.+)"\? Please answer yes or no\.',
    r"Is this a photo of (.+)\?",
    r"Does this picture show (.+)\?",
    r"Are there exactly (.+)\?",
    r"(?:Is|Are) there (.+?)(?: in the picture)?\?",
    r"Can you see (.+)\?",
    r"Is (an? .+) in the picture\?",
)
PLACE = r" (?:to the )?(left of|right of|above|below) "


def literal(text: str, scene: Scene) -> bool:
    """The answer to a question's text, read off the things of a scene."""
    text = re.sub(r"(?<!\"\?) (Please answer|Answer) yes or no\.$", "", text)
    for frame in FRAMES:
        found = re.fullmatch(frame, text)
        if found:
            return shows(found[1], scene)
    asked = re.fullmatch(r"Is the (\w+)" + PLACE + r"the (\w+)\?", text)
    if asked:
        return stands(asked[1], asked[2], asked[3], scene)
    asked = re.fullmatch(r"Is the (\w+) (\w+)(?: and the (\w+) (\w+))?\?", text)
    if asked:
        pairs = [(asked[1], asked[2]), (asked[3], asked[4])]
        return all(shows(f"a {color} {cls}", scene) for cls, color in pairs if cls)
    return shows(text.removesuffix("?"), scene)


def shows(text: str, scene: Scene) -> bool:
    """Whether a scene shows a phrase."""
    first, *rest = text.split()
    if first in NUMBERS:
        return sum(t.cls == rest[0][:-1] for t in scene.things) == NUMBERS[first]
    placed = re.fullmatch(r"an? (\w+)" + PLACE + r"an? (\w+)", text)
    if placed:
        return stands(placed[1], placed[2], placed[3], scene)
    for part in text.split(" and "):
        *color, cls = part.split()[1:]
        if not any(t.cls == cls and color in ([], [t.color]) for t in scene.things):
            return False
    return True


def stands(subject: str, relation: str, target: str, scene: Scene) -> bool:
    """Whether the direction between the centres is within 60 degrees of the asked one."""
    ours = [t.center for t in scene.things if t.cls == subject]
    theirs = [t.center for t in scene.things if t.cls == target]
    if not ours or not theirs:
        return False
    dx, dy = ours[0][0] - theirs[0][0], ours[0][1] - theirs[0][1]
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along > across / 3**0.5


def metadata_of(claim: Claim) -> grammar.Metadata:
    """GenEval's metadata of any claim, foreign words included."""
    include = [grammar.clause(n.cls, n.count, n.color) for n in claim.nouns]
    item: grammar.Metadata = {"tag": claim.tag, "include": include, "prompt": phrase(claim)}
    if claim.relation is not None:
        include[1]["position"] = [claim.relation, 0]
    if claim.tag == "counting":
        item["exclude"] = [grammar.clause(claim.nouns[0].cls, claim.nouns[0].count + 1)]
    return item


def geneval_says(claim: Claim, seen: tuple[Seen, ...]) -> bool:
    """GenEval's own verdict on perfect detections."""
    found = [Detection(s.cls, 0.99, s.box, None, s.color) for s in seen]
    return evaluate(found, None, metadata_of(claim)).correct


def drawn(num: int, seed: int) -> list[tuple[Scene, Question]]:
    """Scenes with a training question each; half of the pictures two related things."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(num):
        scene = training_scene(rng)
        out.append((scene, ask(things_in(scene), rng)))
    return out


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, Question]]:
    return drawn(2500, 0)


def test_every_answer_agrees_with_a_literal_reading_of_its_text_and_with_geneval(asked) -> None:
    assert {q.wording for _, q in asked} == set(WORDINGS)
    for scene, question in asked:
        assert question.claim is not None
        said = question.answer == "yes"
        assert literal(question.text, scene) is said, (question.text, scene)
        assert geneval_says(question.claim, things_in(scene)) is said, (question.text, scene)


def test_yes_and_no_are_equally_frequent_in_every_task_and_wording(asked) -> None:
    for key in (lambda q: q.claim.tag, lambda q: q.wording, lambda q: "all"):
        groups: dict[str, list[bool]] = {}
        for _, question in asked:
            groups.setdefault(key(question), []).append(question.answer == "yes")
        for name, answers in groups.items():
            noise = 4 * 0.5 / len(answers) ** 0.5  # four standard errors of a fair coin
            assert abs(np.mean(answers) - 0.5) < noise + 0.02, (name, np.mean(answers))


def test_nothing_held_out_is_shown_or_asked_in_training(asked) -> None:
    held = side(held_out=True) - side(held_out=False)
    for scene, question in asked:
        count = Counter(t.cls for t in scene.things)
        assert not any(grammar.held_color(t.color, t.cls) for t in scene.things)
        assert not any(n > 1 and grammar.held_count(c, n) for c, n in count.items())
        assert not any(grammar.held_pair(a, b) for a, b in itertools.combinations(count, 2))
        claim = question.claim
        assert claim is not None and claim not in held
        nouns = [n for n in claim.nouns if n.cls not in FOREIGN]
        assert not any(n.color and grammar.held_color(n.color, n.cls) for n in nouns)
        assert not any(n.count > 1 and grammar.held_count(n.cls, n.count) for n in nouns)
        pairs = itertools.combinations([n.cls for n in nouns], 2)
        assert not any(grammar.held_pair(a, b) for a, b in pairs)


def test_phrases_are_the_grammars_prompts() -> None:
    for held_out in (False, True):
        for items in grammar.prompts(held_out=held_out).values():
            for item in items[:200]:
                assert item["prompt"] == f"a photo of {phrase(read_claim(item))}"


def test_truth_is_genevals_wherever_it_is_clear() -> None:
    rng = np.random.default_rng(3)
    claims = sorted(side(held_out=False) | side(held_out=True), key=str)
    known = Counter()
    for _ in range(300):
        seen = things_in(training_scene(rng))
        near = [c for c in claims if {n.cls for n in c.nouns} <= {s.cls for s in seen}]
        for i in rng.integers(len(near), size=min(len(near), 15)):
            value = truth(near[i], seen)
            known[value] += 1
            assert value is None or value is geneval_says(near[i], seen), (near[i], seen)
    assert min(known[True], known[False]) > 200 and known[None] > 20


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        (((2, 20, 12, 30), (40, 20, 50, 30)), True),  # far to the left
        (((40, 20, 50, 30), (2, 20, 12, 30)), False),
        (((20, 20, 40, 40), (26, 22, 46, 42)), None),  # left, but boxes nearly coincide
    ],
)
def test_relations_near_the_rules_edge_are_not_asked(boxes, expected) -> None:
    seen = (Seen("bed", "red", boxes[1]), Seen("car", "red", boxes[0]))
    claim = Claim("position", (questions.Noun("bed"), questions.Noun("car")), "left of")
    assert truth(claim, seen) is expected
    assert truth(claim, (*seen, seen[0])) is None  # which of two beds?


def test_a_no_differs_from_a_true_claim_in_one_fact_or_a_swap() -> None:
    rng = np.random.default_rng(4)
    for _ in range(300):
        seen = things_in(training_scene(rng))
        for claims in questions.true_claims(seen, questions.trained).values():
            made = false_claim(claims[0], seen, rng, questions.trained)
            if made is None:
                continue
            before, after = claims[0], made
            facts = (
                [(a.cls, a.count, a.color, before.relation) for a in before.nouns],
                [(a.cls, a.count, a.color, after.relation) for a in after.nouns],
            )
            changed = sum(
                x != y for a, b in zip(*facts, strict=True) for x, y in zip(a, b, strict=True)
            )
            swapped = sorted(n.color or n.cls for n in before.nouns) == sorted(
                n.color or n.cls for n in after.nouns
            )
            relation = before.relation != after.relation
            assert changed == 1 or swapped or (relation and changed == 2)


def test_an_empty_picture_is_asked_only_what_is_not_there() -> None:
    rng = np.random.default_rng(5)
    answers = {ask((), rng, wanted=None).answer for _ in range(60)}
    assert answers == {"no"}
    with pytest.raises(ValueError, match="no question with answer yes on counting was found"):
        ask((Seen("car", "red", (1, 1, 9, 9)),), rng, task="counting", wanted=True)


def test_open_questions_are_answered_from_the_picture() -> None:
    things = (Thing("bird", "white", (15, 20), 24), Thing("tv", "black", (48, 22), 24))
    said = {}
    rng = np.random.default_rng(6)
    for _ in range(200):
        question = ask_open(things_in(Scene(things)), rng)
        assert question is not None and question.claim is None
        said[question.text] = question.answer
    assert said == {
        "How many birds are there?": "one",
        "How many tvs are there?": "one",
        "What color is the bird?": "white",
        "What color is the tv?": "black",
        "What is white?": "bird",
        "What is black?": "tv",
        "What is left of the tv?": "bird",
        "What is right of the bird?": "tv",
    }
    assert ask_open((), rng) is None
