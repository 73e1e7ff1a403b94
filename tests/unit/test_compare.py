"""Comparing two evaluations: what must be equal, what may differ on purpose, what is added up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2i_align.errors import DataError
from t2i_align.evaluate.compare import compare, read_protocol, same_protocol, table


def evaluation(
    folder: Path, correct: list[int], *, guidance: float = 3.0, first: str = "p0"
) -> Path:
    """A finished evaluation of two tasks, two prompts each, in that order."""
    folder.mkdir(parents=True)
    protocol = {"benchmark": "scenes", "guidance_scale": guidance}
    (folder / "protocol.json").write_text(json.dumps({"protocol": protocol}))
    rows = [
        {
            "prompt": first if i == 0 else f"p{i}",
            "image": 0,
            "tag": "colors" if i < 2 else "counting",
            "correct": bool(value),
            "graded": value / 2,
        }
        for i, value in enumerate(correct)
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_differences_wins_and_losses(tmp_path: Path) -> None:
    """Colors 1/2 -> 2/2, counting 1/2 -> 0/2: the mean over tasks does not change."""
    a = evaluation(tmp_path / "a", [1, 0, 1, 0])
    result = compare(a, evaluation(tmp_path / "b", [1, 1, 0, 0]))
    assert result["tasks"]["colors"]["difference"]["mean"] == 0.5
    assert result["tasks"]["counting"]["difference"]["mean"] == -0.5
    overall = result["overall"]
    assert (overall["win"], overall["tie"], overall["lose"]) == (1, 2, 1)
    assert overall["difference"]["mean"] == 0 and result["graded"]["difference"]["mean"] == 0
    assert result["despite"] == []


def test_other_settings_are_refused_unless_named(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", [1, 0, 1, 0])
    b = evaluation(tmp_path / "b", [1, 0, 1, 0], guidance=1.0)
    with pytest.raises(DataError, match=r"guidance_scale: 3\.0 and 1\.0") as caught:
        compare(a, b)
    assert "--despite" in str(caught.value)
    assert compare(a, b, ["guidance_scale"])["despite"] == ["guidance_scale: 3.0 and 1.0"]
    assert same_protocol(a, a, ["guidance_scale"]) == []
    with pytest.raises(DataError, match="no field 'guidance_scal'") as caught:
        compare(a, b, ["guidance_scal"])
    assert "did you mean 'guidance_scale'?" in str(caught.value)


@pytest.mark.parametrize("turned", [False, True])
def test_rules_that_only_a_replay_has_are_refused_in_either_order(
    tmp_path: Path, turned: bool
) -> None:
    """A stricter threshold is no better model; an unchanged replay is the run itself."""
    a = evaluation(tmp_path / "a", [1, 0, 1, 0])
    b = evaluation(tmp_path / "b", [1, 0, 1, 0])
    file = b / "protocol.json"
    facts = json.loads(file.read_text())
    sides = (b, a) if turned else (a, b)
    for options, refused in (({}, False), ({"counting_threshold": 0.95}, True)):
        facts["protocol"]["replayed_with"] = options
        file.write_text(json.dumps(facts))
        if refused:
            with pytest.raises(DataError, match="replayed_with"):
                compare(*sides)
            assert compare(*sides, ["replayed_with"])["overall"]["win"] == 0
        else:
            assert compare(*sides)["despite"] == []


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", [1, 0, 1, 0])
    with pytest.raises(DataError, match="hold different prompts"):
        compare(a, evaluation(tmp_path / "b", [1, 0, 1, 0], first="another"))


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_folder_without_an_evaluation_is_named(tmp_path: Path, text: str | None) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    if text is not None:
        (folder / "protocol.json").write_text(text)
    with pytest.raises(DataError, match="half holds no evaluation"):
        read_protocol(folder)


def test_a_task_of_one_prompt_has_a_difference_and_no_interval(tmp_path: Path) -> None:
    """Counting keeps p2 alone, 1 -> 0: colors keeps its interval, the mean of both has none."""
    folders = []
    for name, right in (("a", [1, 0, 1, 1]), ("b", [1, 1, 0, 0])):
        folder = evaluation(tmp_path / name, right)
        rows = [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]
        rows[3] |= {"prompt": "p2", "image": 1}
        (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        folders.append(folder)
    result = compare(*folders)
    assert result["no_interval"] == ["counting"]
    assert result["tasks"]["counting"]["difference"] == {"mean": -1.0, "low": None, "high": None}
    colors = result["tasks"]["colors"]["difference"]
    assert (colors["mean"], colors["low"], colors["high"]) == (0.5, 0.0, 1.0)
    assert result["overall"]["difference"] == {"mean": -0.25, "low": None, "high": None}
    assert result["graded"]["difference"]["low"] is not None  # three prompts in all
    shown = {row["task"]: row["95 % interval"] for row in table(result)}
    assert shown["counting"] == "none: one prompt"
    assert shown["overall"] == "none: one prompt (counting)"
    assert shown["colors"] == "[+0.000, +1.000]"


def test_a_mean_of_pictures_needs_two_prompts_in_all(tmp_path: Path) -> None:
    """Two tasks of three and one pictures whose total is that of the pictures keep an interval."""
    folders = []
    for name, right in (("a", [1, 0, 0, 1]), ("b", [1, 1, 0, 1])):
        folder = evaluation(tmp_path / name, right)
        rows = [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]
        rows[2] |= {"tag": "colors"}
        (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (folder / "summary.json").write_text(json.dumps({"overall": {"mean": sum(right) / 4}}))
        folders.append(folder)
    result = compare(*folders)
    gain = result["overall"]["difference"]
    assert result["overall"]["rule"] == "mean of the pictures"
    assert gain["mean"] == 0.25 and gain["low"] == 0.0 and gain["high"] > 0.25
    assert result["no_interval"] == ["counting"]


def test_evaluations_without_rows_are_refused(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", [])
    with pytest.raises(DataError, match="hold different prompts"):
        compare(a, a)
