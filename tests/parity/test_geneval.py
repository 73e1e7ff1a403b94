"""GenEval against answers of the released evaluator, executed with its models stubbed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2i_align.evaluate.detections import RLE, Detection, crop
from t2i_align.evaluate.metrics.geneval import (
    COLORS,
    TASKS,
    GenEvalOptions,
    evaluate,
    read_clauses,
    relations,
    summary,
)


@pytest.fixture(scope="module")
def cases(benchmarks_dir: Path) -> dict[str, Any]:
    text = (benchmarks_dir / "geneval" / "parity_cases.json").read_text(encoding="utf-8")
    return json.loads(text)


def detection(record: dict[str, Any]) -> Detection:
    x1, y1, x2, y2 = record["bbox"]
    return Detection(record["class"], record["score"], (x1, y1, x2, y2), color=record.get("color"))


def official_text(reason: str) -> str:
    """The file writes two relations, unordered there, as ``{a,b}``; ours are joined in order."""
    before, brace, rest = reason.partition("{")
    if not brace:
        return reason
    names, _, after = rest.partition("}")
    return before + " and ".join(names.split(",")) + after


def details(kept: dict[str, list[Detection]]) -> dict[str, list[list[float]]]:
    """What the released evaluator writes of kept detections."""
    return {
        name: [[*map(float, d.box), float(np.float32(d.score))] for d in found]
        for name, found in kept.items()
    }


def test_defaults(cases: dict[str, Any]) -> None:
    own = GenEvalOptions().model_dump()
    assert own == {key: cases["defaults"][key] for key in own}


def test_evaluate(cases: dict[str, Any]) -> None:
    """Verdict, reasons and kept detections, with colours stored and with colours asked for."""
    assert len(cases["evaluate_cases"]) == 26
    for case in cases["evaluate_cases"]:
        found = [detection(record) for record in case["detections"]]
        options = GenEvalOptions(**case["options"])
        answers = {(d.cls, d.box): d.color for d in found}
        blank = [Detection(d.cls, d.score, d.box) for d in found]
        stored = evaluate(found, None, case["metadata"], options)
        asked = evaluate(
            blank,
            None,
            case["metadata"],
            options,
            lambda _, d, name, known=answers: known[name, d.box] or "",
        )
        expected = [official_text(line) for line in case["expect_reason_lines"]]
        for verdict in (stored, asked):
            assert verdict.correct is case["expect_correct"], case["id"]
            assert list(verdict.reasons) == expected, case["id"]
            assert details(verdict.kept) == case["expect_details"], case["id"]


def test_relations(cases: dict[str, Any]) -> None:
    assert len(cases["relation_cases"]) == 11
    for case in cases["relation_cases"]:
        found = relations(tuple(case["a"]), tuple(case["b"]), case["position_threshold"])
        assert sorted(found) == case["relations_of_a_to_b"], case


def test_crop(cases: dict[str, Any]) -> None:
    width, height = cases["crop_cases"]["image_wh"]
    image = Image.new("RGB", (width, height))
    for x in range(width):
        for y in range(height):
            image.putpixel((x, y), (40 * x, 50 * y, 7))
    assert len(cases["crop_cases"]["cases"]) == 6
    for case in cases["crop_cases"]["cases"]:
        mask = case["mask"] and RLE.encode(np.array(case["mask"]) == 1)
        shown = crop(
            image,
            Detection("bench", 0.5, tuple(case["box"]), mask),
            bgcolor=case["options"].get("bgcolor", "#999"),
            crop_to_box=case["options"].get("crop", "1") == "1",
        )
        assert list(shown.size) == case["out_size_wh"], case
        assert np.asarray(shown).tolist() == case["out_pixels_rgb_rows"], case


def test_summary_prints_what_the_released_script_prints(cases: dict[str, Any]) -> None:
    case = cases["summary_case"]
    found = summary(case["rows"])
    lines = [
        "Summary",
        "=======",
        f"Total images: {found['num_images']}",
        f"Total prompts: {found['num_prompts']}",
        f"% correct images: {found['images']:.2%}",
        f"% correct prompts: {found['prompts']:.2%}",
        "",
        "Task breakdown",
        "==============",
        *(
            f"{name:<16} = {task['mean']:.2%} ({task['correct']} / {task['count']})"
            for name, task in found["tasks"].items()
        ),
        "",
        f"Overall score (avg. over tasks): {found['overall']:.5f}",
    ]
    assert lines == case["official_stdout"]
    assert found["missing"] == []


def test_all_released_prompts_are_understood(benchmarks_dir: Path) -> None:
    """553 prompts; exact counts by exclude, every colour of the palette used."""
    path = benchmarks_dir / "geneval" / "evaluation_metadata.jsonl"
    prompts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tags = Counter(prompt["tag"] for prompt in prompts)
    assert [tags[task] for task in TASKS] == [80, 99, 80, 94, 100, 100]
    colors = set()
    for prompt in prompts:
        include, exclude = read_clauses(prompt)
        colors |= {clause.color for clause in include} - {None}
        if prompt["tag"] == "counting":
            assert [c.count for c in exclude] == [c.count + 1 for c in include]
    assert colors == set(COLORS)
