"""DPG-Bench, DSG-1k, TIFA, GenAI-Bench, UniGenBench against released numbers and files."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from t2i_align.evaluate.benchmark import Item, Picture
from t2i_align.evaluate.benchmarks import build
from t2i_align.evaluate.benchmarks.dpg import read_texts, source_of
from t2i_align.evaluate.human import agreement_by_part
from t2i_align.evaluate.human_layouts import layout_of, mean_grade
from t2i_align.evaluate.metrics import dpg, dsg, genai
from t2i_align.evaluate.metrics.question_graph import propositions_of
from t2i_align.evaluate.metrics.unigenbench import POINTS, primary_of


@pytest.fixture(autouse=True)
def home(benchmarks_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2I_ALIGN_BENCHMARKS", str(benchmarks_dir))


def shown(items: list[Item]) -> list[Picture]:
    return [Picture(item, 0, Path(f"{item.id}.png")) for item in items]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


# --- DPG-Bench


def test_dpg_gives_what_the_released_function_gives(benchmarks_dir: Path) -> None:
    table = json.loads((benchmarks_dir / "dpg_bench" / "parity_cases.json").read_text())
    assert [c["id"] for c in table["cases"]] == [
        *("all_yes", "zeroing_is_transitive", "order_matters"),
        *("not_exactly_yes", "four_images_mean"),
    ]
    for case in table["cases"]:
        parents = {int(q): above for q, above in case["dependency"].items()}
        cells = [{int(q): t for q, t in a.items()} for a in case["answers_per_image"]]
        assert len(cells) == case["pic_num"]
        found = dpg.picture_score(cells, parents, "official")
        assert found.score == case["expect_score"], case["id"]
        basis = {str(q): v for q, v in found.questions.items()}
        assert basis == case["expect_scores_used_for_categories"], case["id"]


def test_dpg_prompts_come_from_the_sources_that_are_published(benchmarks_dir: Path) -> None:
    file = benchmarks_dir / "dpg_bench" / "dpg_prompts.json"
    ids = list(json.loads(file.read_text(encoding="utf-8")))
    texts = read_texts(file, ids)
    assert len(texts) == 1065
    words = [len(t.split()) for t in texts.values()]
    assert (min(words), max(words), round(float(np.mean(words)))) == (37, 130, 67)
    counts = Counter(source_of(i) for i in ids)
    assert (counts["partiprompts"], counts["numbers"], counts["COCOval"]) == (324, 299, 100)


# --- DSG-1k


def stored(benchmarks_dir: Path, judge: str, model: str) -> dict[str, dict[int, str]]:
    """Published answers of a judge about a model's pictures, item -> question -> text."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for row in rows_of(benchmarks_dir / "dsg" / "vqa_answers" / f"{judge}_dsg.csv"):
        if row["t2i_model"] == model:
            found[row["item_id"]][int(row["question_id"])] = row["answer"]
    return found


def as_answers(texts: Mapping[int, str]) -> dict[str, Any]:
    return {"answers": {str(q): {"text": t} for q, t in texts.items()}}


def test_dsg_gives_the_published_table_to_the_digit(benchmarks_dir: Path) -> None:
    expected = json.loads((benchmarks_dir / "dsg" / "parity_expected.json").read_text())
    bench = build("dsg", {})
    pictures = shown(bench.items())
    answers = stored(benchmarks_dir, "pali17b", "sd2dot1")
    raw = [as_answers(answers.get(p.item.id, {})) for p in pictures]
    found = bench.summary(pictures, bench.verdicts(pictures, raw))
    ours = {name: round(value, 1) for name, value in found.tasks.items()}
    assert ours | {"all": round(found.overall.mean, 1)} == expected["expected_percent"]
    counts = Counter(p.item.task for p in pictures)
    assert dict(counts) | {"all": len(pictures)} == expected["items"]
    assert [p.item.id for p in pictures if p.item.id not in answers] == ["tifa160_134"]
    assert found.overall.low < found.overall.mean < found.overall.high


def test_dsg_variants_differ_where_the_file_is_malformed(benchmarks_dir: Path) -> None:
    """Eight items lose their graph; one item hangs on a question that is not there."""
    lost, dangling = [], []
    for item in build("dsg", {}).items():
        asked = propositions_of(item.metadata)
        official, fixed = (dsg.dependencies(asked, v) for v in ("official", "fixed"))
        assert len(fixed) == len(asked)
        lost += [] if official else [item.id]
        known = {0, *(p.id for p in asked)}
        dangling += [item.id] if {p for a in official.values() for p in a} - known else []
    assert len(lost) == 8 and {"posescript_19", "tifa160_67"} < set(lost)
    assert dangling == ["tifa160_134"]


@pytest.mark.parametrize(
    ("judge", "graph", "flat"),
    [("pali17b", 0.571, 0.570), ("mplug", 0.463, 0.464), ("instructblip", 0.442, 0.436)],
)
def test_dsg_agrees_with_people_as_published(
    benchmarks_dir: Path, judge: str, graph: float, flat: float
) -> None:
    """Spearman's rank correlation with ratings of the 800 pictures of TIFA-160."""
    ratings: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows_of(benchmarks_dir / "dsg" / "tifa160-likert-anns.csv"):
        ratings[row["t2i_model"], row["item_id"]].append(float(row["answer"]))
    assert len(ratings) == 800
    graphs = {i.id: propositions_of(i.metadata) for i in build("dsg", {}).items()}
    answers = {m: stored(benchmarks_dir, judge, m) for m in {m for m, _ in ratings}}
    with_graph, without, human = [], [], []
    for (model, item), grades in ratings.items():
        parents = dsg.dependencies(graphs[item], "official")
        raw, after = dsg.question_scores(answers[model].get(item, {}), parents, "official")
        with_graph.append(dsg.item_score(after))
        without.append(dsg.item_score(raw))
        human.append(np.mean(grades))
    for values, expected in ((with_graph, graph), (without, flat)):
        correlation: Any = stats.spearmanr(values, human)
        assert round(float(correlation.statistic), 3) == expected


# --- TIFA


def test_tifa_gives_the_released_result(benchmarks_dir: Path) -> None:
    folder = benchmarks_dir / "tifa"
    expected = json.loads((folder / "sample_evaluation_result.json").read_text())
    prompts = str(folder / "sample_question_answers.json")
    bench = build("tifa", {"prompts": prompts})
    pictures = shown(bench.items())
    details = expected["question_details"]
    raw = []
    for picture in pictures:
        said = [details[picture.item.id][q["question"]] for q in picture.item.metadata["questions"]]
        replies = [{"text": s["free_form_vqa"], "nearest": s["multiple_choice_vqa"]} for s in said]
        raw.append({"answers": replies})
    verdicts = bench.verdicts(pictures, raw)
    found = bench.summary(pictures, verdicts)
    assert found.overall.mean == expected["tifa_average"]
    assert found.tables["deviation"]["over texts"] == pytest.approx(expected["tifa_stdev"])
    assert dict(found.tables["types"]) == pytest.approx(expected["accuracy_by_type"])
    scores = [s["scores"] for d in details.values() for s in d.values()]
    assert [v for x in verdicts for v in x.parts.values()] == scores


def test_tifa_fixed_does_not_mind_case_and_full_stops(benchmarks_dir: Path) -> None:
    prompts = str(benchmarks_dir / "tifa" / "sample_question_answers.json")
    bench = build("tifa", {"prompts": prompts, "variant": "fixed"})
    pictures = shown(bench.items())
    right = [
        {"answers": [{"text": q["answer"].upper() + " ."} for q in p.item.metadata["questions"]]}
        for p in pictures
    ]
    assert [v.score for v in bench.verdicts(pictures, right)] == [1.0, 1.0]
    official = build("tifa", {"prompts": prompts})
    assert [v.score for v in official.verdicts(pictures, right)] == [0.0, 0.0]


# --- GenAI-Bench


def literal_means(scores: np.ndarray, tags: dict[str, list[int]]) -> dict[str, float]:
    """The released rule: numbers of prompts are rows."""
    means = {tag: float(scores[rows].mean()) for tag, rows in tags.items()}
    union: set[int] = set()
    for rows in tags.values():
        union |= set(rows)
    return means | {"all": float(scores[list(union)].mean())}


def test_genai_skills_are_the_released_means(benchmarks_dir: Path) -> None:
    bench = build("genai_bench", {})
    items = bench.items()
    assert len(items) == 1600 and items[0].id == "00000"
    tasks = Counter(i.task for i in items)
    assert tasks == {"basic": 722, "advanced": 871, "neither": 7}
    scores = np.random.default_rng(0).random(1600)
    pictures = shown(items)
    verdicts = bench.verdicts(pictures, [{"score": float(s)} for s in scores])
    found = bench.summary(pictures, verdicts)
    tags = json.loads((benchmarks_dir / "genai_bench/genai1600/genai_skills.json").read_text())
    assert dict(found.tables["skills"]) == pytest.approx(literal_means(scores, tags))
    assert found.overall.mean == pytest.approx(found.tables["skills"]["all"])
    assert set(found.tasks) == {"basic", "advanced"}


def test_genai_of_527_prompts_is_counted_from_one(benchmarks_dir: Path) -> None:
    """The released rule takes the last prompt's number for a row that is not there."""
    bench = build("genai_bench_527", {})
    items = bench.items()
    assert [items[0].id, items[-1].id, len(items)] == ["00001", "00527", 527]
    tags = json.loads((benchmarks_dir / "genai_bench/genai527/genai_skills.json").read_text())
    scores = np.random.default_rng(0).random(527)
    with pytest.raises(IndexError):
        literal_means(scores, tags)
    pictures = shown(items)
    found = bench.summary(pictures, bench.verdicts(pictures, [{"score": s} for s in scores]))
    moved = literal_means(np.concatenate([[np.nan], scores]), tags)
    assert dict(found.tables["skills"]) == pytest.approx(moved)


def test_genai_people_rate_dalle_first(benchmarks_dir: Path) -> None:
    bench: Any = build("genai_bench", {})
    means = genai.human_means(bench.table, bench.skills)
    assert len(means) == 6
    order = sorted(means, key=lambda model: -means[model]["all"])
    assert order[0] == "DALLE_3" and order[-1] == "SDXL_2_1"
    numbers = bench.skills["counting"]
    rows = [bench.table[f"{n:05d}"]["models"]["DALLE_3"] for n in numbers]
    assert means["DALLE_3"]["counting"] == pytest.approx(np.mean([mean_grade(r, "") for r in rows]))


def test_genai_agreement_by_skill_is_that_of_its_pictures(benchmarks_dir: Path) -> None:
    """Numbers that are the ratings in one skill and their opposite in the rest."""
    bench: Any = build("genai_bench_527", {})
    groups = list(layout_of("genai_bench").read(bench.file.path, "test"))
    numbers = [int(g.name) for g in groups for _ in g.media]
    human = np.array([rating for g in groups for rating in g.ratings])
    parts = [g.parts for g in groups for _ in g.media]
    skills = {name: set(own) for name, own in bench.skills.items()}
    for number, own in zip(numbers, parts, strict=True):
        assert set(own) == {name for name, chosen in skills.items() if number in chosen}
    sign = np.array([1.0 if n in skills["part relation"] else -1.0 for n in numbers])
    kept = [tuple(p for p in own if p in ("part relation", "advanced")) for own in parts]
    found = agreement_by_part(human * sign, human, kept)
    assert found["part relation"]["pearson"] == pytest.approx(1)
    assert found["part relation"]["acc_eq"] == 1
    chosen = [k for k, n in enumerate(numbers) if n in skills["advanced"]]
    tau: Any = stats.kendalltau((human * sign)[chosen], human[chosen])
    assert found["advanced"]["kendall"] == pytest.approx(float(tau.statistic))
    assert found["advanced"]["images"] == len(chosen) and (found["all"]["pearson"] or 0) < 0


# --- UniGenBench


@pytest.mark.parametrize("name", ["unigenbench", "unigenbench_long"])
def test_unigenbench_prompts_have_27_kinds_of_test_points(name: str) -> None:
    bench: Any = build(name, {"name_or_path": "x"})
    items = bench.items()
    assert len(items) == 600 and bench.images_per_prompt == 4
    assert bench.file.identity()["prompts"] == "official"
    points = Counter(p for i in items for p in i.metadata["points"])
    assert set(points) == set(POINTS) and len(POINTS) == 27
    assert len({primary_of(p) for p in points}) == 10
    if name == "unigenbench":
        assert (points["Style"], points["Attribute - Color"]) == (250, 30)
    else:
        assert items[509].metadata["points"][1:3] == ["Grammar - Negation", "Attribute - Color"]
        assert len(items[509].metadata["points"]) == 5
    for item in items[:3]:
        assert item.prompt in bench.question(item)
