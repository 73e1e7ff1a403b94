"""The GenEval reward: a literal transcription of the released one, and what is repaired in ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_align.catalog import find_root
from t2i_align.contract import Media
from t2i_align.errors import UserError
from t2i_align.evaluate.detections import Detection
from t2i_align.evaluate.metrics.geneval import DEFAULTS
from t2i_align.evaluate.metrics.geneval_rewards import OUTPUTS, fixed, graded, strict
from t2i_align.judges.base import judge_card, load
from t2i_align.judges.geneval_reward import GenEvalReward, GenEvalRewardOptions
from t2i_align.scenes import golden, grammar
from t2i_align.scenes.parse import parse

CLASSES, COLORS = ("car", "bed"), ("red", "green")


def thing(cls: str, x: float = 0, color: str = "red", score: float = 0.95) -> Detection:
    return Detection(cls, score, (x, 0, x + 10, 10), color=color)


def rewards(found: list[Detection], metadata: dict[str, Any]) -> dict[str, float]:
    return {name: compute(found, metadata, DEFAULTS) for name, compute in OUTPUTS.items()}


def judge(**options: Any) -> GenEvalReward:
    made = GenEvalRewardOptions.model_validate(options)
    return GenEvalReward(Path(), made, torch.device("cpu"), torch.float32)


# --- closed forms ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "expected"),
    [
        (0, {"strict": 0, "graded": 0, "fixed": 0.5}),  # exclude is met
        (1, {"strict": 0, "graded": 1 / 3, "fixed": (1 / 3 + 1) / 2}),
        (3, {"strict": 1, "graded": 1, "fixed": 1}),
        (4, {"strict": 0, "graded": 2 / 3, "fixed": (1 + 2 / 3) / 2}),
        (7, {"strict": 0, "graded": -1 / 3, "fixed": 0.5}),  # a crowd: below 0 as released
    ],
)
def test_counts(num: int, expected: dict[str, float]) -> None:
    """Three cars, and not four."""
    metadata = parse("a photo of three cars")
    assert rewards([thing("car", 20 * i) for i in range(num)], metadata) == pytest.approx(expected)


def test_a_wrong_relation_earns_half_only_as_released() -> None:
    """bed: 1. car: count 1 and relation 0, then 1 appended all the same: 3/4 instead of 2/3."""
    metadata = parse("a photo of a car left of a bed")
    right, wrong = [thing("car", 0), thing("bed", 50)], [thing("car", 50), thing("bed", 0)]
    assert rewards(right, metadata) == {"strict": 1, "graded": 1, "fixed": 1}
    assert rewards(wrong, metadata) == pytest.approx({"strict": 0, "graded": 3 / 4, "fixed": 2 / 3})


def test_colours_count_by_share() -> None:
    metadata = {"tag": "x", "include": [{"class": "car", "count": 2, "color": "red"}]}
    one = [thing("car"), thing("car", 20, "green")]
    assert rewards(one, metadata) == pytest.approx({"strict": 0, "graded": 3 / 4, "fixed": 3 / 4})
    none = [thing("car"), thing("car", 20), thing("car", 40, "green", score=0.4)]
    # a third, weaker car: the verdict and ours look at the best two, the released reward at all
    assert rewards(none, metadata) == pytest.approx({"strict": 1, "graded": 1 / 4, "fixed": 1})


def test_the_released_reward_does_not_look_at_exclude() -> None:
    metadata = {
        "tag": "x",
        "include": [{"class": "car", "count": 1}],
        "exclude": [{"class": "bed", "count": 1}],
    }
    found = [thing("car"), thing("bed", 30)]
    assert rewards(found, metadata) == {"strict": 0, "graded": 1, "fixed": 0.5}


# --- properties --------------------------------------------------------------------------------


def released(objects: dict[str, list[Detection]], metadata: dict[str, Any]) -> float:
    """The reward of yifan123/reward-server, statement by statement, in our words."""
    from t2i_align.evaluate.metrics.geneval import relations

    terms, matched = [], []
    for req in metadata["include"]:
        found, n, ok = objects.get(req["class"], []), req["count"], True
        terms.append(1 - abs(n - len(found)) / n)
        if len(found) != n:
            ok = False
            if "color" in req or "position" in req:
                terms.append(0.0)
        else:
            if "color" in req:
                hits = [d.color for d in found].count(req["color"])
                terms.append(1 - abs(n - hits) / n)
                ok = hits == n
            if "position" in req and ok:
                wanted, index = req["position"]
                if matched[index] is None:
                    ok = False
                    terms.append(0.0)
                else:
                    pairs = [(a, b) for a in found for b in matched[index]]
                    if any(wanted not in relations(a.box, b.box) for a, b in pairs):
                        ok = False
                        terms.append(0.0)
                    terms.append(1.0)
        matched.append(found if ok else None)
    return sum(terms) / len(terms)


things = st.builds(
    thing,
    st.sampled_from(CLASSES),
    st.integers(0, 6).map(lambda x: 8.0 * x),
    st.sampled_from(COLORS),
    st.sampled_from([0.2, 0.5, 0.95]),
)


@st.composite
def clauses(draw: Any) -> dict[str, Any]:
    include: list[dict[str, Any]] = []
    for index in range(draw(st.integers(1, 3))):
        clause: dict[str, Any] = {
            "class": draw(st.sampled_from(CLASSES)),
            "count": draw(st.integers(1, 3)),
        }
        if draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(COLORS))
        if index and draw(st.booleans()):
            relation = draw(st.sampled_from(["left of", "above"]))
            clause["position"] = [relation, draw(st.integers(0, index - 1))]
        include.append(clause)
    exclude = [{"class": "bed", "count": draw(st.integers(1, 3))}] if draw(st.booleans()) else []
    return {"tag": "x", "include": include, "exclude": exclude}


@settings(max_examples=150, deadline=None)
@given(st.lists(things, max_size=6), clauses())
def test_against_the_transcription_and_the_verdict(
    found: list[Detection], metadata: dict[str, Any]
) -> None:
    """graded is the released reward; fixed lies in [0, 1] and is 1 exactly where strict is."""
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(found, key=lambda d: -d.score):
        if detection.score > 0.3:
            kept.setdefault(detection.cls, []).append(detection)
    assert graded(found, metadata, DEFAULTS) == pytest.approx(released(kept, metadata))
    ours = fixed(found, metadata, DEFAULTS)
    assert 0 <= ours <= 1
    assert (ours == 1) == (strict(found, metadata, DEFAULTS) == 1)


# --- the judge ---------------------------------------------------------------------------------


def test_metadata_come_from_the_sample_or_from_the_prompt() -> None:
    drawn = golden.drawn("a photo of two cars", 7)
    other = parse("a photo of three cars")
    media = [drawn, Media("image", drawn.data, {"metadata": other})]
    media.append(Media("image", drawn.data, {"metadata": json.dumps(other)}))
    found = judge(output="fixed").score(media, ["a photo of two cars"] * 3)
    assert found.values.tolist() == pytest.approx([1, 5 / 6, 5 / 6])  # 2 of 3, and not 4


def test_every_output_on_the_worlds_own_renders() -> None:
    """All three are 1 on renders of their prompt, whatever the size of the file."""
    rng = np.random.default_rng(1)
    items = [m for task in grammar.prompts(held_out=True).values() for m in task]
    picked = [items[i]["prompt"] for i in rng.choice(len(items), 12, replace=False)]
    media = [golden.drawn(text, i) for i, text in enumerate(picked)]
    for output in OUTPUTS:
        assert judge(output=output).score(media, picked).values.tolist() == [1.0] * 12
    large = torch.nn.functional.interpolate(media[0].data[None], scale_factor=4)[0]
    assert judge().score([Media("image", large)], picked[:1]).values.tolist() == [1.0]


def test_failures_are_nan_with_a_reason() -> None:
    drawn = golden.drawn("a photo of a bed", 3)
    bad = {"tag": "x", "include": [{"class": "car", "count": 0}]}
    media = [drawn, *(Media("image", drawn.data, {"metadata": m}) for m in (bad, "{", 3))]
    found = judge().score(media, ["a cat on a mat", "b", "c", "d"])
    assert found.values.isnan().all()
    for reason, text in zip(
        found.reasons,
        (
            "outside the world's grammar",
            "count is a whole number >= 1",
            "are not JSON",
            "metadata are {tag, include, exclude}, got 3",
        ),
        strict=True,
    ):
        assert text in str(reason)


def test_any_function_can_be_the_detector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_detector_for_a_test.py").write_text(
        "from t2i_align.evaluate.detections import Detection\n"
        "def find(image):\n"
        "    assert image.mode == 'RGB'\n"
        "    return [Detection('cat', 0.99, (0, 0, *image.size))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = judge(detector="my_detector_for_a_test:find")
    cat = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    red = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    pixels = torch.zeros(3, 8, 8)
    media = [Media("image", pixels, {"metadata": m}) for m in (cat, red)]
    found = own.score(media, ["a cat", "a red cat"])
    assert found.values[0] == 1 and "has no stored colour" in str(found.reasons[1])
    graded_one = judge(detector="my_detector_for_a_test:find", output="graded")
    assert "the detector gave no colour for the cat" in str(
        graded_one.score(media, ["", ""]).reasons[1]
    )
    with pytest.raises(UserError, match="'no_such_module:find' cannot be imported"):
        judge(detector="no_such_module:find")


def test_golden_values() -> None:
    card = judge_card("geneval")
    known = json.loads((find_root() / "reward_models" / "geneval" / str(card.golden)).read_text())
    assert [row["value"] for row in golden.compute("geneval")] == [row["value"] for row in known]
    assert isinstance(load("geneval"), GenEvalReward)
