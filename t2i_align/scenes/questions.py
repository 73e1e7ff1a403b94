r"""Yes/no questions about pictures of the world, with answers that follow from what is in them.

A claim is what a GenEval prompt says, without its wording: a task, things, perhaps a relation. Its
truth is GenEval's (``evaluate/metrics/geneval.py``), made three-valued: where detection noise or a
change of rule would turn the verdict, the answer is unknown and nobody is asked.

    single_object, two_object   every class is there
    counting                    the class is there exactly n times
    colors, color_attr          every thing of the class has the colour; unknown when the class is
                                there in several colours, the asked one among them
    position                    the relation holds for boxes shrunk by ``YES_SHRINK``; false where
                                it fails unshrunk (``NO_SHRINK``); unknown between, and where a
                                class is there more than once

Questions come in equal numbers of yes and no. A no is a true claim with one fact altered (class,
colour, count, relation, or two facts swapped), so nothing but looking answers it. In training,
claims and pictures keep to the training side of the grammar's split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np

from t2i_align.evaluate.metrics.geneval import relations
from t2i_align.scenes.grammar import (
    COLORS,
    GENERATORS,
    NUMBERS,
    RELATIONS,
    TASKS,
    Metadata,
    article,
    held_color,
    held_count,
    held_pair,
)
from t2i_align.scenes.render import CLASSES, Scene, stamp

T = TypeVar("T")
YES_SHRINK, NO_SHRINK = 0.2, 0.0
FOREIGN = ("dog", "cat", "banana", "clock", "boat", "guitar", "horse", "lamp", "train", "cake")
FOREIGN_SHARE = 0.04
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Noun(NamedTuple):
    """What a claim says of one class."""

    cls: str
    count: int = 1
    color: str | None = None


class Claim(NamedTuple):
    """A claim: task, nouns in GenEval's order (the target of a relation first), relation."""

    tag: str
    nouns: tuple[Noun, ...]
    relation: str | None = None


class Seen(NamedTuple):
    """A thing in a picture: class, colour, box (x0, y0, x1, y1) in pixels."""

    cls: str
    color: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Args:
        text: as a person would type it.
        answer: one word, ``yes`` or ``no`` for claims.
        claim: what it asks about; None for open questions.
        wording: a key of :data:`WORDINGS`, or ``open``.
    """

    text: str
    answer: str
    claim: Claim | None
    wording: str


def read_claim(metadata: Metadata) -> Claim:
    """The claim of a GenEval prompt."""
    nouns = tuple(Noun(c["class"], c["count"], c.get("color")) for c in metadata["include"])
    position = metadata["include"][-1].get("position")
    return Claim(metadata["tag"], nouns, None if position is None else position[0])


@cache
def side(*, held_out: bool) -> frozenset[Claim]:
    """Every claim of one side of the grammar's split."""
    found = (item for make in GENERATORS for item in make())
    return frozenset(read_claim(m) for m, held in found if held is held_out)


def things_in(scene: Scene) -> tuple[Seen, ...]:
    """What is in a rendered scene, boxes as :func:`t2i_align.scenes.render.render` paints them."""
    found = []
    for thing in scene.things:
        mask = stamp(thing.cls, thing.size, round(thing.angle))
        left = round(thing.center[0] - mask.width / 2)
        top = round(thing.center[1] - mask.height / 2)
        box = (float(left), float(top), float(left + mask.width), float(top + mask.height))
        found.append(Seen(thing.cls, thing.color, box))
    return tuple(found)


def truth(claim: Claim, seen: Sequence[Seen]) -> bool | None:
    """Whether a claim holds for a picture; None where that is not clear, see the module."""
    count = Counter(thing.cls for thing in seen)
    if claim.tag == "counting":
        return count[claim.nouns[0].cls] == claim.nouns[0].count
    if any(count[noun.cls] == 0 for noun in claim.nouns):
        return False
    if claim.relation is not None:
        return related(claim, seen)
    answers = [colored(noun, seen) for noun in claim.nouns]
    return False if False in answers else None if None in answers else True


def colored(noun: Noun, seen: Sequence[Seen]) -> bool | None:
    """Whether what is there of a class has the noun's colour; True when it names none."""
    hues = {thing.color for thing in seen if thing.cls == noun.cls}
    if noun.color is None or hues == {noun.color}:
        return True
    return None if noun.color in hues else False


def related(claim: Claim, seen: Sequence[Seen]) -> bool | None:
    """Whether the second noun stands in the relation to the first."""
    target, subject = ([s.box for s in seen if s.cls == noun.cls] for noun in claim.nouns)
    if len(target) != 1 or len(subject) != 1:
        return None
    if claim.relation in relations(subject[0], target[0], YES_SHRINK):
        return True
    return None if claim.relation in relations(subject[0], target[0], NO_SHRINK) else False


def true_claims(seen: Sequence[Seen], allowed: Callable[[Claim], bool]) -> dict[str, list[Claim]]:
    """Allowed claims that hold, by task; tasks with none are left out."""
    found: dict[str, list[Claim]] = {task: [] for task in TASKS}
    count = Counter(thing.cls for thing in seen)
    hues = {thing.cls: thing.color for thing in seen}  # of classes in one colour only
    for cls, number in count.items():
        found["single_object"].append(Claim("single_object", (Noun(cls),)))
        found["colors"].append(Claim("colors", (Noun(cls, 1, hues[cls]),)))
        found["counting"].append(Claim("counting", (Noun(cls, number),)))
        for other in count:
            both = (Noun(cls), Noun(other))
            dyed = (Noun(cls, 1, hues[cls]), Noun(other, 1, hues[other]))
            found["two_object"].append(Claim("two_object", both))
            found["color_attr"].append(Claim("color_attr", dyed))
            found["position"] += [Claim("position", both, r) for r in RELATIONS]
    kept = {k: [c for c in v if allowed(c) and truth(c, seen)] for k, v in found.items()}
    return {task: claims for task, claims in kept.items() if claims}


def alter(claim: Claim, rng: np.random.Generator) -> Claim:
    """The claim with one fact altered, or its two colours or places swapped."""
    nouns = list(claim.nouns)
    which = int(rng.integers(len(nouns)))
    noun = nouns[which]
    facts = ["class"]
    facts += ["color", "color"] if noun.color else []
    facts += ["count", "count"] if claim.tag == "counting" else []
    facts += ["relation", "relation"] if claim.relation else []
    facts += ["swap"] if len(nouns) == 2 and claim.tag != "two_object" else []
    fact = facts[int(rng.integers(len(facts)))]
    if fact == "class":
        foreign = rng.random() < FOREIGN_SHARE
        nouns[which] = noun._replace(cls=pick(FOREIGN if foreign else CLASSES, rng))
    elif fact == "color":
        nouns[which] = noun._replace(color=pick(COLORS, rng))
    elif fact == "count":
        nouns[which] = noun._replace(count=pick(tuple(NUMBERS), rng))
    elif fact == "swap" and claim.relation is None:
        nouns = [a._replace(color=b.color) for a, b in zip(nouns, nouns[::-1], strict=True)]
    elif fact == "swap":
        nouns = nouns[::-1]
    near = rng.random() < 0.5  # the opposite is the relation easiest to mistake
    relation = claim.relation
    if relation is not None and fact == "relation":
        relation = OPPOSITE[relation] if near else pick(RELATIONS, rng)
    return Claim(claim.tag, tuple(nouns), relation)


def pick(items: Sequence[T], rng: np.random.Generator) -> T:
    """One of several, evenly."""
    return items[int(rng.integers(len(items)))]


def false_claim(
    claim: Claim,
    seen: Sequence[Seen],
    rng: np.random.Generator,
    allowed: Callable[[Claim], bool],
) -> Claim | None:
    """A claim near another one that does not hold; None where none was found."""
    for _ in range(20):
        made = alter(claim, rng)
        foreign = any(noun.cls in FOREIGN for noun in made.nouns)
        if (foreign or allowed(made)) and truth(made, seen) is False:
            return made
    return None


def trained(claim: Claim) -> bool:
    """Whether a claim belongs to the training side."""
    return claim in side(held_out=False)


def phrase(claim: Claim) -> str:
    """``a red car and a green bed``: a GenEval prompt without ``a photo of``."""
    if claim.tag == "counting":
        return f"{NUMBERS[claim.nouns[0].count]} {claim.nouns[0].cls}s"
    named = [article(f"{n.color} {n.cls}" if n.color else n.cls) for n in claim.nouns]
    if claim.relation is not None:
        return f"{named[1]} {claim.relation} {named[0]}"
    return " and ".join(named)


def direct(claim: Claim) -> str:
    """A question in the words of its task: ``Is the umbrella green?``."""
    first, last = claim.nouns[0], claim.nouns[-1]
    if claim.tag == "counting":
        return f"Are there exactly {phrase(claim)}?"
    if claim.tag == "colors":
        return f"Is the {first.cls} {first.color}?"
    if claim.tag == "color_attr":
        return f"Is the {first.cls} {first.color} and the {last.cls} {last.color}?"
    if claim.relation is not None:
        return f"Is the {last.cls} {claim.relation} the {first.cls}?"
    return f"Is {phrase(claim)} in the picture?"


def sideways(claim: Claim) -> str:
    """The same with ``to the left of``, as DSG and T2I-CompBench put it."""
    text = direct(claim)
    return text.replace(" left of ", " to the left of ").replace(" right of ", " to the right of ")


def there(claim: Claim) -> str:
    """``Is there a car`` or ``Are there two cars``."""
    return f"{'Are' if claim.tag == 'counting' else 'Is'} there {phrase(claim)}"


FIGURE = 'Does this figure show "{prompt}"? Please answer yes or no.'
WORDINGS: dict[str, Callable[[Claim], str]] = {
    "figure": lambda c: FIGURE.format(prompt=f"a photo of {phrase(c)}"),
    "figure_bare": lambda c: FIGURE.format(prompt=phrase(c)),
    "photo": lambda c: f"Is this a photo of {phrase(c)}?",
    "show": lambda c: f"Does this picture show {phrase(c)}?",
    "there": lambda c: f"{there(c)}?",
    "there_in": lambda c: f"{there(c)} in the picture?",
    "see": lambda c: f"Can you see {phrase(c)}?",
    "phrase": lambda c: f"{phrase(c)}?",
    "direct": direct,
    "sideways": sideways,
}
SUFFIXES = ("", "", "", " Please answer yes or no.", " Answer yes or no.")


def worded(claim: Claim, wording: str, rng: np.random.Generator) -> str:
    """A claim as a question; wordings but VQAScore's may end with an instruction."""
    text = WORDINGS[wording](claim)
    return text if wording.startswith("figure") else text + pick(SUFFIXES, rng)


def draw_wording(rng: np.random.Generator) -> str:
    """VQAScore's wording for four questions in ten, else any."""
    return "figure" if rng.random() < 0.4 else pick(tuple(WORDINGS), rng)


def ask(
    seen: Sequence[Seen],
    rng: np.random.Generator,
    *,
    allowed: Callable[[Claim], bool] = trained,
    task: str | None = None,
    wanted: bool | None = None,
) -> Question:
    """A question about a picture, yes and no equally likely.

    Args:
        seen: what is in the picture, may be nothing (then the answer is no).
        rng: chooses.
        allowed: which claims may be asked about.
        task: one of GenEval's; None: evenly among those that have a true claim.
        wanted: the answer; None: a coin decides.

    Raises:
        ValueError: no question of that task and answer was found.
    """
    wanted = bool(rng.random() < 0.5) if wanted is None else wanted
    holding = true_claims(seen, allowed)
    tasks = [t for t in holding if task in (None, t)]
    for _ in range(10):
        tag = pick(tasks, rng) if tasks else None
        true = pick(holding[tag], rng) if tag else None
        if wanted and true is not None:
            return reply(true, True, rng)
        if not wanted or not holding:
            start = true or pick(bank(task or pick(TASKS, rng)), rng)
            false = false_claim(start, seen, rng, allowed)
            if false is not None:
                return reply(false, False, rng)
    raise ValueError(f"no question with answer {'yes' if wanted else 'no'} on {task} was found")


@cache
def bank(task: str) -> tuple[Claim, ...]:
    """Training claims of a task, to start from where a picture shows nothing."""
    return tuple(sorted((c for c in side(held_out=False) if c.tag == task), key=str))


def reply(claim: Claim, holds: bool, rng: np.random.Generator) -> Question:
    """A claim in random words, with its answer."""
    wording = draw_wording(rng)
    return Question(worded(claim, wording, rng), "yes" if holds else "no", claim, wording)


def ask_open(seen: Sequence[Seen], rng: np.random.Generator) -> Question | None:
    """A training question with a word for an answer (colour, number, class); None if there is none.

    Ten possible answers teach looking sooner than two.
    """
    count = Counter(thing.cls for thing in seen)
    made: list[tuple[str, str]] = []
    for thing in seen:
        made.append((f"How many {thing.cls}s are there?", number_word(count[thing.cls])))
        if count[thing.cls] == 1:
            made.append((f"What color is the {thing.cls}?", thing.color))
            others = [s.cls for s in seen if s.color == thing.color]
            made += [(f"What is {thing.color}?", thing.cls)] if len(others) == 1 else []
            made += [
                (f"What is {claim.relation} the {thing.cls}?", claim.nouns[1].cls)
                for other in seen
                for r in RELATIONS
                if len(seen) == 2
                and truth(claim := Claim("position", (Noun(thing.cls), Noun(other.cls)), r), seen)
            ]
    if not made:
        return None
    text, answer = pick(made, rng)
    return Question(text, answer, None, "open")


def number_word(number: int) -> str:
    """``one`` to ``four``, ``many`` beyond."""
    return {1: "one", **NUMBERS}.get(number, "many")


def training_side(seen: Sequence[Seen]) -> bool:
    """Whether a picture shows no held-out combination: colour, count or pair of classes."""
    count = Counter(thing.cls for thing in seen)
    classes = sorted(count)
    return not (
        any(held_color(thing.color, thing.cls) for thing in seen)
        or any(n in NUMBERS and held_count(c, n) for c, n in count.items())
        or any(held_pair(a, b) for i, a in enumerate(classes) for b in classes[i + 1 :])
    )
