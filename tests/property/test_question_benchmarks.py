"""Thousands of random cases of each aggregation against slow literal readings of its rules."""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Picture
from t2i_align.evaluate.benchmarks import build
from t2i_align.evaluate.metrics import dpg, dsg, genai, tifa, unigenbench

TEXTS = ("yes", "yes", "yes", "no", "Yes", "yes.", "YES, it is", "no yes", "", "yesterday")
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


def literal_yes(text: str, fixed: bool) -> bool:
    if not fixed:
        return text == "yes"
    word = ""
    for letter in text.lower():
        if letter.isalnum() or letter == "_":
            word += letter
        elif word:
            break
    return word == "yes"


def random_graph(rng: random.Random, strays: float) -> dict[int, list[int]]:
    """Parents of each question, in any order; some parents do not exist."""
    ids = list(range(1, rng.randint(1, 7) + 1))
    rng.shuffle(ids)
    graph = {}
    for q in ids:
        pool = [p for p in ids if p != q] + ([90 + q] if rng.random() < strays else [])
        count = rng.randint(0, min(2, len(pool)))
        graph[q] = rng.sample(pool, count) if count else [0]
    return graph


# --- DPG-Bench


def literal_dpg(
    cells: list[dict[int, str]], graph: dict[int, list[int]], fixed: bool
) -> tuple[float, dict[int, float]] | None:
    """Score and what categories are made of; None where the released script gives up."""
    scores, last, sums = [], {}, dict.fromkeys(graph, 0.0)
    for cell in cells:
        value = {q: (1.0 if literal_yes(cell[q], fixed) else 0.0) for q in graph}
        before = dict(value)
        for q in graph:
            for parent in graph[q]:
                if parent == 0:
                    continue
                if fixed:
                    if parent in graph and before[parent] == 0:
                        value[q] = 0.0
                        break
                else:
                    if parent not in value:
                        return None
                    if value[parent] == 0:
                        value[q] = 0.0
                        break
        last = before
        for q in graph:
            sums[q] += value[q]
        scores.append(sum(value.values()) / len(value))
    basis = {q: s / len(cells) for q, s in sums.items()} if fixed else last
    return sum(scores) / len(scores), basis


def test_dpg_pictures() -> None:
    rng = random.Random(0)
    dropped = 0
    for _ in range(4000):
        graph = random_graph(rng, strays=0.1)
        cells = [{q: rng.choice(TEXTS) for q in graph} for _ in range(rng.choice((1, 4)))]
        official = literal_dpg(cells, graph, fixed=False)
        if official is None:
            dropped += 1
            with pytest.raises(dpg.MissingParent):
                dpg.picture_score(cells, graph, "official")
        else:
            found = dpg.picture_score(cells, graph, "official")
            assert (found.score, found.questions) == official
        known = {q: [p for p in above if p in graph] for q, above in graph.items()}
        mended = dpg.picture_score(cells, known, "fixed")
        expected = literal_dpg(cells, graph, fixed=True)
        assert expected is not None
        assert mended.score == expected[0]
        assert dict(mended.questions) == pytest.approx(expected[1])
    assert 50 < dropped < 3000


def write_csv(path: Path, rows: list[Any]) -> str:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def random_rows(rng: random.Random, num_items: int) -> list[dict[str, Any]]:
    heads = ("entity - whole", "attribute - color", "relation - spatial", "global", "other - text")
    rows = []
    for k in range(num_items):
        graph = {q: sorted(p) for q, p in sorted(random_graph(rng, 0.02).items())}
        for q, parents in graph.items():
            cell = (
                ", ".join(map(str, parents)) if rng.random() < 0.5 else ",".join(map(str, parents))
            )
            cells = (f"i{k}", f"text {k}", q, cell, f"{rng.choice(heads)} (a, b)", f"q{q} of {k}?")
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def literal_dpg_file(
    rows: list[dict[str, Any]], said: dict[tuple[str, int], list[dict[int, str]]], fixed: bool
) -> tuple[float, dict[str, float], dict[str, float]] | None:
    """A whole evaluation, as the released script goes about it."""
    items: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, row in enumerate(rows):
        if fixed or number:
            items[row["item_id"]].append(row)
    totals, broad, fine = [], defaultdict(list), defaultdict(list)
    for name, own in items.items():
        graph = {r["proposition_id"]: [int(x) for x in r["dependency"].split(",")] for r in own}
        cells = [{q: c[q] for q in graph} for c in said[name, 0]]
        found = literal_dpg(cells, graph, fixed)
        if found is None:
            continue
        totals.append(found[0])
        for row in own:
            head = row["tuple"][: row["tuple"].index("(")].strip()
            fine[head].append(found[1][row["proposition_id"]])
            broad[head.split("-")[0].strip()].append(found[1][row["proposition_id"]])
    if not totals:
        return None
    tables = [{k: 100 * mean(v) for k, v in table.items()} for table in (broad, fine)]
    return 100 * mean(totals), tables[0], tables[1]


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("variant", ["official", "fixed"])
def test_dpg_files(tmp_path: Path, variant: str, grid: bool) -> None:
    """Grids and single pictures give one number; the first row's item may be dropped."""
    rng = random.Random(1)
    for trial in range(40):
        rows = random_rows(rng, rng.randint(2, 6))
        file = write_csv(tmp_path / f"{trial}.csv", rows)
        bench: Any = build("dpg_bench", {"prompts": file, "variant": variant, "grid": grid})
        said = {
            (name, 0): [{q: rng.choice(TEXTS) for q in range(1, 8)} for _ in range(4)]
            for name in {r["item_id"] for r in rows}
        }
        pictures, answers = [], []
        for item in bench.items():
            asked = {p["id"] for p in item.metadata["propositions"]}
            cells = [{str(q): {"text": c[q]} for q in asked} for c in said[item.id, 0]]
            groups = [cells] if grid else [[c] for c in cells]
            for number, group in enumerate(groups):
                pictures.append(Picture(item, number, Path("x")))
                answers.append({"cells": group})
        expected = literal_dpg_file(rows, said, fixed=variant == "fixed")
        verdicts = bench.verdicts(pictures, answers)
        if expected is None:
            with pytest.raises(DataError, match="every picture is dropped"):
                bench.summary(pictures, verdicts)
            continue
        found = bench.summary(pictures, verdicts)
        assert found.overall.mean == pytest.approx(expected[0])
        assert dict(found.tasks) == pytest.approx(expected[1])
        assert dict(found.tables["categories"]) == pytest.approx(expected[2])
        assert bench.images_per_prompt == (1 if grid else 4)


# --- DSG-1k


def test_dsg_items() -> None:
    """Some questions are not asked, some parents do not exist."""
    rng = random.Random(2)
    for _ in range(4000):
        graph = random_graph(rng, strays=0.1)
        answers = {q: rng.choice(TEXTS) for q in graph if rng.random() < 0.9}
        for fixed in (False, True):
            raw = {q: float(literal_yes(t, fixed)) for q, t in answers.items()}
            after = {}
            for q in answers:
                fails = []
                for parent in graph[q]:
                    if parent == 0:
                        continue
                    fails.append(raw[parent] == 0 if parent in raw else not fixed)
                after[q] = 0.0 if any(fails) else raw[q]
            variant = "fixed" if fixed else "official"
            found = dsg.question_scores(answers, graph, variant)
            assert found == (raw, after)
            assert dsg.item_score(found[1]) == (mean(after.values()) if after else 0)


def test_zeros_run_on_in_dpg_and_not_in_dsg() -> None:
    """1 fails, 2 depends on it, 3 on 2: DPG zeroes all, DSG leaves 3."""
    graph, answers = {1: [0], 2: [1], 3: [2]}, {1: "no", 2: "yes", 3: "yes"}
    assert dpg.picture_score([answers], graph, "official").score == 0
    assert dpg.picture_score([answers], graph, "fixed").score == pytest.approx(1 / 3)
    assert dsg.item_score(dsg.question_scores(answers, graph, "official")[1]) == pytest.approx(
        1 / 3
    )


# --- TIFA


def test_tifa_files(tmp_path: Path) -> None:
    """Random question lists against the released loop, repeated questions and all."""
    rng = random.Random(3)
    words = ("red", "blue", "two", "Yes", "yes", "no")
    for trial in range(150):
        rows = []
        for text in range(rng.randint(2, 5)):
            for _ in range(rng.randint(1, 6)):
                choices = rng.sample(words, 3)
                rows.append(
                    {
                        "id": f"coco_{text}",
                        "caption": f"c{text}",
                        "question": f"q{rng.randint(0, 4)}?",
                        "choices": choices,
                        "answer": rng.choice(choices),
                        "element_type": rng.choice(("object", "color")),
                        "element": "e",
                    }
                )
        rng.shuffle(rows)
        said = [rng.choice((*words, "RED.", " no")) for _ in rows]
        near = [rng.choice(r["choices"]) for r in rows]
        file = tmp_path / f"{trial}.json"
        file.write_text(json.dumps(rows))
        for variant in ("official", "fixed"):
            scores, types = defaultdict(list), defaultdict(list)
            seen = set()
            for row, text, nearest in zip(rows, said, near, strict=True):
                if variant == "fixed":
                    if (row["id"], row["question"]) in seen:
                        continue
                    seen.add((row["id"], row["question"]))
                chosen = nearest
                if text in row["choices"]:
                    chosen = text
                elif variant == "fixed":
                    alike = [c for c in row["choices"] if c.lower() == text.lower().strip(" .")]
                    chosen = alike[0] if alike else nearest
                scores[row["id"]].append(int(chosen == row["answer"]))
                types[row["element_type"]].append(scores[row["id"]][-1])
            bench: Any = build("tifa", {"prompts": str(file), "variant": variant})
            items = bench.items()
            pictures = [Picture(i, 0, Path("x")) for i in items]
            raw = []
            for item in items:
                own = [k for k, r in enumerate(rows) if r["id"] == item.id]
                raw.append({"answers": [{"text": said[k], "nearest": near[k]} for k in own]})
            found = bench.summary(pictures, bench.verdicts(pictures, raw))
            averages = [mean(v) for v in scores.values()]
            assert found.overall.mean == pytest.approx(mean(averages))
            if len(averages) > 1:
                spread = found.tables["deviation"]["over texts"]
                assert spread == pytest.approx(stdev(averages))
            assert dict(found.tables["types"]) == pytest.approx(
                {k: mean(v) for k, v in types.items()}
            )


def test_tifa_an_answer_that_is_no_choice_needs_the_nearest() -> None:
    assert tifa.chosen("pale green", "green", ["black", "green"], "official") == "green"
    assert tifa.chosen("pale green", None, ["black", "green"], "official") is None
    assert tifa.chosen("Green.", "black", ["black", "green"], "fixed") == "green"
    assert tifa.chosen("Green.", "black", ["black", "green"], "official") == "black"
    assert tifa.deviation([0.5]) is None


# --- UniGenBench


def test_unigenbench_dimensions_and_marks() -> None:
    rng = random.Random(4)
    names = list(unigenbench.POINTS)
    for _ in range(1000):
        found = []
        ones, counts = defaultdict(int), defaultdict(int)
        for _ in range(rng.randint(1, 6)):
            points = rng.sample(names, rng.randint(1, 5))
            marks = [rng.randint(0, 1) for _ in points]
            text = f"<analysis>[...]</analysis>\n<score>{marks}</score>"
            assert unigenbench.read_marks(text, len(marks)) == marks
            assert unigenbench.read_marks(text, len(marks) + 1) is None
            found.append((points, marks))
            for point, mark in zip(points, marks, strict=True):
                first = point.split(" - ")[0]
                for name in {("primary", first), ("point", point)}:
                    ones[name] += mark
                    counts[name] += 1
        primary, fine = unigenbench.dimensions(found)
        ours = {("primary", k): m for k, m in primary.items()}
        ours |= {("point", k): m for k, m in fine.items()}
        assert {k: (m.ones, m.count) for k, m in ours.items()} == {
            k: (ones[k], counts[k]) for k in counts
        }


# --- GenAI-Bench


def test_genai_means() -> None:
    rng = random.Random(5)
    for _ in range(1000):
        values = {n: rng.random() for n in range(rng.randint(1, 12)) if rng.random() < 0.9}
        skills = {s: rng.sample(range(12), rng.randint(1, 6)) for s in ("basic", "advanced", "c")}
        union = [v for n, v in values.items() if any(n in own for own in skills.values())]
        if not union:
            with pytest.raises(DataError, match="no prompt of any skill"):
                genai.skill_means(values, skills)
            continue
        found = genai.skill_means(values, skills)
        assert found["all"] == pytest.approx(mean(union))
        for skill, own in skills.items():
            kept = [values[n] for n in own if n in values]
            assert found.get(skill) == (pytest.approx(mean(kept)) if kept else None)
