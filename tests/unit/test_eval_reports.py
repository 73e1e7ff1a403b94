"""Around a result: published numbers, pages, suites, prompt files, comparisons of scores."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from t2i_align.catalog import cards, find_root, read_card
from t2i_align.cli import build_app
from t2i_align.errors import DataError, RecipeError, UserError
from t2i_align.evaluate import gallery, prompt_files
from t2i_align.evaluate.benchmarks import BENCHMARKS, build
from t2i_align.evaluate.compare import compare, total_rule
from t2i_align.evaluate.metrics.geneval import TASKS
from t2i_align.evaluate.published import agreement, beside, published
from t2i_align.evaluate.report import build_report
from t2i_align.evaluate.run_report import build_run_report, halves, lines
from t2i_align.evaluate.suites import Setting, read_suite, requests, run_suite, suites
from t2i_align.scenes import grammar
from t2i_align.scenes.render import Scene, render
from tests import evaluations

PER_TASK = 2
RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations of the scenes; ``a`` is wrong in every second picture."""
    root = tmp_path_factory.mktemp("r")
    for name, every in (("a", 2), ("b", 6)):
        rng = np.random.default_rng(1)

        def draw(number: int, metadata: grammar.Metadata, every: int = every) -> Image.Image:
            empty = number % every == 0
            scene = Scene(()) if empty else grammar.scene_for(metadata, rng)  # noqa: B023
            return Image.fromarray(render(scene, rng))  # noqa: B023

        evaluations.evaluation(root / name, PER_TASK, draw)
    return root


# --- published numbers


def test_every_published_table_is_of_a_benchmark_and_adds_up() -> None:
    """Tasks have our names; totals that are means of the tasks are, up to rounding."""
    files = [p.parent.parent.name for p in (find_root() / "eval").glob("*/published/*.yaml")]
    assert set(files) == {"dpg_bench", "dsg", "genai_bench", "geneval", "geneval_long"} | {
        *("hpsv2_bench", "t2i_compbench")
    }
    for name in set(files):
        tasks = read_card(find_root() / "eval" / name / "card.yaml").details.get("tasks", [])
        for table in published(name):
            assert table.benchmark == name and name in BENCHMARKS
            assert "commit" in table.source and table.protocol
            for row in table.rows:
                assert set(row.tasks) <= set(tasks) and (row.tasks or row.overall), row.model
    means = {"geneval": (0.011, 11), "hpsv2_bench": (0.011, 10)}
    for name, (rounding, num) in means.items():
        (table,) = published(name)
        full = [r for r in table.rows if r.tasks]
        assert len(full) == num
        for row in full:
            mean = sum(row.tasks.values()) / len(row.tasks)
            assert row.overall == pytest.approx(mean, abs=rounding), row.model
    for table in published("genai_bench"):  # basic and advanced overlap: the total lies between
        for row in table.rows:
            assert row.overall is not None
            assert row.tasks["advanced"] < row.overall < row.tasks["basic"], row.model


def test_dsgs_table_is_the_one_that_is_reproduced(benchmarks_dir: Path) -> None:
    """Its total is the mean over the prompts: 160 + 200 + 6 times 100 + 200 of them."""
    ((row,),) = (table.rows for table in published("dsg"))
    known = json.loads((benchmarks_dir / "dsg" / "parity_expected.json").read_text())
    stated = {k: float(v) for k, v in known["expected_percent"].items()}
    assert row.tasks | {"all": row.overall} == stated


def ours(protocol: dict[str, Any]) -> dict[str, Any]:
    overall = {"mean": 0.5, "low": 0.4, "high": 0.6}
    tasks = dict.fromkeys(TASKS, 0.5)
    named = {"model": "m", "lora": "adapter"}
    return {"protocol": protocol, "overall": overall, "tasks": tasks, "partial": False, **named}


def test_rows_stand_beside_ours_only_where_the_protocols_agree() -> None:
    (table,) = published("geneval")
    same = {"benchmark": "geneval", **table.protocol, "resolution": 512}
    (found,) = beside(ours(same))
    assert found["differ"] == [] and len(found["rows"]) == 1 + len(table.rows)
    assert found["rows"][0]["model"] == "ours: adapter"
    assert found["unstated"] == ["num_inference_steps", "guidance_scale", "resolution"]
    for field, value in (("detector", "transformers owlv2"), ("images_per_prompt", 1)):
        (other,) = beside(ours(same | {field: value}))
        assert other["rows"] == [] and len(other["differ"]) == 1
        assert other["differ"][0].startswith(f"{field}: ") and "here" in other["differ"][0]
    (partial_,) = beside(ours(same) | {"partial": True})
    assert partial_["rows"] == [] and partial_["differ"] == ["pictures are missing here"]
    (again,) = beside(ours(same | {"replayed_with": {"threshold": 0.5}}))
    assert again["rows"] == [] and "judged again with other options" in again["differ"][0]
    (equal,) = beside(ours(same | {"replayed_with": {}}))
    assert equal["rows"] and equal["differ"] == []
    unknown = {k: v for k, v in same.items() if k != "prompts_sha256"}
    differ, unstated = agreement(table, unknown)
    assert differ == ["prompts_sha256: 5c48e0813e81... there, unknown here"]
    assert "prompts_sha256" not in unstated
    (replayed,) = beside(ours({"benchmark": "geneval", "origin": "unknown"}))
    assert replayed["rows"] == [] and len(replayed["differ"]) == 6


def test_a_mistake_in_a_table_is_located(tmp_path: Path) -> None:
    folder = tmp_path / "eval" / "x" / "published"
    folder.mkdir(parents=True)
    (folder / "t.yaml").write_text("benchmark: x\ntitel: y\n")
    with pytest.raises(RecipeError, match=r"t\.yaml:2: titel: unknown key"):
        published("x", tmp_path)
    assert published("nothing", tmp_path) == []


# --- pages


def test_a_page_of_one_evaluation_shows_right_and_wrong(root: Path) -> None:
    out = build_run_report(root / "a", root / "a.html")
    text = out.read_text()
    assert text.count('<article class="pair">') == 12
    assert text.count("<strong>right</strong>") == text.count("<strong>wrong</strong>") == 6
    assert "expected " in text and "<rect" in text and "colors, wrong" in text
    assert "http://" not in text and "<script" not in text
    assert "12 / 12" in text and "Partial" not in text
    assert build_run_report(root / "a", root / "again.html").read_text() == text
    summary = json.loads((root / "a" / "summary.json").read_text())
    low, high = summary["overall"]["low"], summary["overall"]["high"]
    assert lines(summary)[-1] == ("overall", f"0.500  [{low:.3f}, {high:.3f}]")
    assert low < 0.5 < high
    part = lines(summary | {"partial": True, "images_expected": 20})
    assert part[-1] == ("PARTIAL", "12 of 20 pictures; not a score of this benchmark")
    with pytest.raises(DataError, match="holds no finished evaluation"):
        build_run_report(root, root / "x.html")


def test_without_pictures_there_are_numbers_only(root: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(root / "a", bare, ignore=shutil.ignore_patterns("images"))
    text = build_run_report(bare, tmp_path / "p.html").read_text()
    assert "<article" not in text and "0.500" in text


def test_scores_without_verdicts_are_split_at_the_median() -> None:
    rows = [{"tag": "t", "correct": None, "score": s} for s in (1.0, 3.0, 2.0, 5.0)]
    assert halves(rows) == {"t": ([1, 3], [0, 2])}
    rows = [{"tag": "t", "correct": c, "score": float(c)} for c in (True, False)]
    assert halves(rows) == {"t": ([0], [1])}


def test_large_pictures_are_shrunk_and_their_boxes_are_not(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(root / "b", folder)
    row = json.loads((folder / "results.jsonl").read_text().splitlines()[1])
    file = folder / row["filename"]
    Image.open(file).resize((1024, 768)).save(file)
    row["detections"] = [{"class": "car", "score": 0.95, "box": [100, 200, 900, 700]}]
    seen = gallery.picture(folder, row, "after")
    assert seen.uri.startswith("data:image/jpeg;base64,") and len(seen.uri) < 80_000
    assert seen.size == (1024, 768) and (seen.boxes[0].x, seen.boxes[0].width) == (100, 800)
    assert gallery.shown_bytes(file) == gallery.SHRUNK_BYTES
    file.with_suffix(".jpg").write_bytes(b"")
    Image.new("RGB", (40, 30)).save(file.with_suffix(".jpg"))
    other = gallery.picture(folder, row | {"filename": row["filename"][:-3] + "jpg"}, "after")
    assert other.uri.startswith("data:image/jpeg") and other.size == (40, 30)


def test_the_threshold_of_the_boxes_is_the_protocols(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    shutil.copytree(root / "b", folder)
    row = json.loads((folder / "results.jsonl").read_text().splitlines()[1])
    row |= {"tag": "colors", "detections": [{"class": "car", "score": 0.4, "box": [0, 0, 9, 9]}]}
    assert gallery.picture(folder, row, "").boxes[0].counted
    known = json.loads((folder / "protocol.json").read_text())
    known["protocol"]["threshold"] = 0.5
    (folder / "protocol.json").write_text(json.dumps(known))
    assert not gallery.picture(folder, row, "").boxes[0].counted


def test_a_task_of_one_prompt_is_shown_without_an_interval(root: Path, tmp_path: Path) -> None:
    """Both pictures of the first task get one prompt: no interval there and of the mean."""
    folders = []
    for name in ("a", "b"):
        folder = tmp_path / name
        shutil.copytree(root / name, folder)
        rows = [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]
        rows[1] |= {"prompt": rows[0]["prompt"], "image": 1}
        (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        folders.append(folder)
    task = rows[0]["tag"]
    text = build_report(folders[0], folders[1], tmp_path / "r.html").read_text()
    assert "There is no interval: one prompt does not tell" in text
    assert f"none: one prompt ({task})" in text and text.count("none: one prompt<") == 1
    code, shown = call("compare", *map(str, folders))
    assert code == 0 and f"none: one prompt ({task})" in shown


# --- comparisons of scores


def scored(source: Path, folder: Path, values: list[float], total: float) -> Path:
    """The pictures of an evaluation under a benchmark that gives scores."""
    shutil.copytree(source, folder)
    rows = [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]
    for row, value in zip(rows, values, strict=True):
        row |= {"correct": None, "score": value, "graded": value, "reason": ""}
        del row["detections"]
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = json.loads((folder / "summary.json").read_text())
    summary["overall"]["mean"] = total
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_scores_are_compared_and_shown(root: Path, tmp_path: Path) -> None:
    """Twelve scores k / 10 against k / 10 + (-1)^k / 100: six better, six worse, no McNemar."""
    first = [k / 10 for k in range(12)]
    second = [v + (-1) ** k / 100 for k, v in enumerate(first)]
    a = scored(root / "a", tmp_path / "a", first, float(np.mean(first)))
    b = scored(root / "b", tmp_path / "b", second, float(np.mean(second)))
    result = compare(a, b)
    overall = result["overall"]
    assert (overall["win"], overall["tie"], overall["lose"]) == (6, 0, 6)
    assert overall["mcnemar_p"] is None and overall["difference"]["mean"] == pytest.approx(0)
    text = build_report(a, b, tmp_path / "r.html").read_text()
    assert "McNemar" not in text and ">score, mean of the tasks<" in text
    assert "<strong>scored</strong>" in text and "<strong>wrong</strong>" not in text


def test_the_total_follows_the_benchmarks_own_rule(tmp_path: Path) -> None:
    """Tasks of two and one pictures: their mean is 0.5, that of the pictures 2/3."""
    side = {"x": np.array([1.0, 1.0]), "y": np.array([0.0])}
    for total, rule in (
        (0.5, "mean of the tasks"),
        (2 / 3, "mean of the pictures"),
        (0.9, "mean of the tasks; the benchmark's own total follows another rule"),
    ):
        (tmp_path / "summary.json").write_text(json.dumps({"overall": {"mean": total}}))
        assert total_rule((tmp_path, tmp_path), (side, side)) == rule
    assert total_rule((tmp_path / "no", tmp_path / "no"), (side, side)) == "mean of the tasks"


# --- suites


def test_every_suite_names_benchmarks_and_options_that_exist() -> None:
    assert set(suites()) >= {"quick", "full"}
    for name in suites():
        for entry in read_suite(name).benchmarks:
            build(entry.benchmark, entry.options)
    with pytest.raises(UserError, match="did you mean 'quick'"):
        read_suite("quik")


def test_a_suite_says_all_that_is_missing_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2I_ALIGN_BENCHMARKS", str(tmp_path))
    with pytest.raises(DataError, match=r"(?s)geneval: .*geneval_long: .*eval fetch"):
        requests(read_suite("full"), Setting(None, tmp_path, tmp_path / "o"))


def test_a_suite_runs_its_benchmarks(root: Path, tmp_path: Path) -> None:
    (tmp_path / "eval" / "suites").mkdir(parents=True)
    text = (
        f"summary: s\nbenchmarks:\n  - {{benchmark: scenes, options: {{per_task: {PER_TASK}}}}}\n"
    )
    (tmp_path / "eval" / "suites" / "own.yaml").write_text(text)
    shutil.copytree(root / "b" / "images", tmp_path / "p" / "scenes" / "images")
    setting = Setting(None, tmp_path / "p", tmp_path / "o")
    (row,) = run_suite("own", setting, quiet(), tmp_path)
    assert (row["benchmark"], row["pictures"], row["partial"]) == ("scenes", "12 of 12", False)
    assert row["overall"] == f"{10 / 12:.3f}"
    assert json.loads((tmp_path / "o" / "suite.json").read_text())["rows"] == [row]


# --- prompt files


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A folder over http."""
    (tmp_path / "served").mkdir()

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = partial(Silent, directory=str(tmp_path / "served"))
    made = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


def test_prompts_are_fetched_once_and_checked(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"prompt": "x"}\n'
    (tmp_path / "served" / "p.jsonl").write_bytes(content)
    facts = {"file": "p.jsonl", "url": f"{server}/p.jsonl", "folder": "f"}
    facts["sha256"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(prompt_files, "_details", lambda name: {"prompts": facts})
    (found,) = prompt_files.fetch("x", tmp_path / "home")
    assert found.path == tmp_path / "home" / "f" / "p.jsonl" and found.kind == "official"
    (tmp_path / "served" / "p.jsonl").unlink()
    assert prompt_files.fetch("x", tmp_path / "home") == [found]  # not asked for again
    monkeypatch.setenv("T2I_ALIGN_BENCHMARKS", str(tmp_path / "home"))
    assert prompt_files.find("x", None) == found and found.text() == content.decode()
    with pytest.raises(DataError, match="cannot fetch"):
        prompt_files.fetch("x", tmp_path / "elsewhere")
    (tmp_path / "served" / "p.jsonl").write_bytes(b"changed")
    with pytest.raises(DataError, match="nothing of it was kept"):
        prompt_files.fetch("x", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    other = tmp_path / "own.jsonl"
    other.write_text("mine")
    custom = prompt_files.find("x", str(other))
    assert custom.identity() == {"prompts": "custom", "prompts_sha256": custom.sha256}


def pinned(server: str, name: str, content: bytes, **more: str) -> dict[str, str]:
    """A card's entry of a served file."""
    facts = {"file": name, "url": f"{server}/{name}", **more}
    return (
        facts if "texts_sha256" in more else facts | {"sha256": hashlib.sha256(content).hexdigest()}
    )


def test_cards_of_several_files_are_fetched_file_by_file(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed file stops the fetch; what came before is kept, then only the rest is asked for."""
    served, home = tmp_path / "served", tmp_path / "home"
    contents = {"a.txt": b"a", "b.txt": b"b", "c.json": rb'[ "x", "\u00e9" ]', "d.json": b"{}"}
    for name, content in contents.items():
        (served / name).write_bytes(content)
    texts = hashlib.sha256(b'["x","\\u00e9"]').hexdigest()
    files = [pinned(server, n, contents[n]) for n in ("a.txt", "b.txt")]
    files.append(pinned(server, "c.json", b"", texts_sha256=texts, folder="other"))
    prompts = pinned(server, "d.json", contents["d.json"])
    details = {"prompts": prompts, "files": files}
    monkeypatch.setattr(prompt_files, "_details", lambda name: details)
    (served / "b.txt").write_bytes(b"changed")
    with pytest.raises(DataError, match=r"b\.txt gave sha256 [0-9a-f]{64}, the card says"):
        prompt_files.fetch("x", home)
    assert sorted(p.name for p in home.rglob("*") if p.is_file()) == ["a.txt", "d.json"]
    (served / "b.txt").write_bytes(b"b")
    asked: list[str] = []
    download = prompt_files._download
    monkeypatch.setattr(prompt_files, "_download", lambda url: asked.append(url) or download(url))
    found = prompt_files.fetch("x", home)
    assert [u.rpartition("/")[2] for u in asked] == ["b.txt", "c.json"]
    places = ["x/d.json", "x/a.txt", "x/b.txt", "other/c.json"]
    assert [str(f.path.relative_to(home)) for f in found] == places
    (home / "other" / "c.json").write_text(json.dumps(["x", "é"], indent=2))
    assert prompt_files.fetch("x", home)[3].path.read_text().startswith("[\n")  # the same texts
    for odd in (b'["x"]', b"{}", b"<html>"):
        (served / "c.json").write_bytes(odd)
        (home / "other" / "c.json").unlink(missing_ok=True)
        with pytest.raises(DataError, match=r"gave texts of sha256"):
            prompt_files.fetch("x", home)
        assert not (home / "other" / "c.json").exists()


def test_what_a_card_names_is_where_its_benchmark_looks() -> None:
    """Every file of a card, in the folder its benchmark reads."""
    named = {n: {prompt_files.place(n, f, Path()) for f in prompt_files.files_of(n)} for n in FILES}
    assert named == {n: {Path(p) for p in paths} for n, paths in FILES.items()}
    with pytest.raises(UserError, match=r"(?s)no prompt file to fetch.*dpg_bench/dpg_bench\.csv"):
        prompt_files.files_of("dpg_bench")


FILES = {
    "geneval": ["geneval/evaluation_metadata.jsonl"],
    "genai_bench": [f"genai_bench/genai1600/genai_{k}.json" for k in ("image", "skills")],
    "genai_bench_527": [f"genai_bench/genai527/genai_{k}.json" for k in ("image", "skills")],
    "hpsv2_bench": [f"hpdv2/{k}.json" for k in ("anime", "concept-art", "paintings", "photo")],
    "t2i_compbench": [
        *(f"t2i_compbench/{k}_val.txt" for k in ("color", "shape", "texture", "spatial")),
        *(f"t2i_compbench/{k}_val.txt" for k in ("3d_spatial", "numeracy", "non_spatial")),
        *(f"t2i_compbench/complex_val{k}.txt" for k in ("", "_spatial", "_action")),
        "t2i_compbench/new_objects.txt",
    ],
}


def test_addresses_are_web_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"file": "p", "url": "file:///etc/hosts", "sha256": "0"}
    monkeypatch.setattr(prompt_files, "files_of", lambda name: [facts])
    with pytest.raises(DataError, match="over http"):
        prompt_files.fetch("x", tmp_path)
    facts["url"] = ""
    with pytest.raises(UserError, match="not published at an address"):
        prompt_files.fetch("x", tmp_path)


def test_cards_pin_what_is_fetched() -> None:
    """By the commit in its address, or by the hash of its texts."""
    supplied = {"dpg_bench", "scenes", "tifa"}
    for card in cards("eval"):
        if card.name in supplied:
            continue
        for facts in prompt_files.files_of(card.name):
            known = facts.get("texts_sha256") or facts["sha256"]
            assert re.fullmatch(r"[0-9a-f]{64}", known), card.name
            assert "texts_sha256" in facts or re.search(r"/[0-9a-f]{40}/", facts["url"]), card.name
    with pytest.raises(UserError, match="did you mean 'geneval'"):
        prompt_files.published("genevall")
    with pytest.raises(UserError, match="'scenes' has no prompt file"):
        prompt_files.published("scenes")


# --- the verb


def call(*args: str) -> tuple[int, str]:
    result = RUNNER.invoke(build_app(), list(args))
    return result.exit_code, result.stdout + result.stderr


def test_the_verb_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "o"), "--images", str(tmp_path))
    (tmp_path / "00000").mkdir()
    code, text = call("eval", "scnes", *out)
    assert code == 1 and "did you mean 'scenes'?" in text
    code, text = call("eval", "scenes", "--set", "per_tsk=3", *out)
    assert code == 2 and "did you mean 'per_task'?" in text
    assert call("eval", "scenes", "--images", str(tmp_path))[0] == 2  # no --out
    assert call("eval", "scenes", "extra", *out)[0] == 2
    assert call("eval", "fetch")[0] == 2
    code, text = call("eval", "scenes", *out[:2])
    assert code == 3 and "give one of --model, --images and --detections" in text
    code, text = call("eval", "suite", "nothing", *out)
    assert code == 1 and "no suite 'nothing'" in text


def test_the_verb_judges_pictures_and_answers_and_writes_a_page(root: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    args = ("eval", "scenes", "--per-task", str(PER_TASK))
    code, text = call(*args, "--images", str(root / "b"), "--out", str(first))
    assert code == 0 and "0.833" in text
    page = tmp_path / "page.html"
    again = ("--detections", str(first / "answers.jsonl"), "--out", str(tmp_path / "again"))
    code, text = call("eval", "scenes", *again, "--report", str(page))
    assert code == 0 and "0.833" in text and page.is_file()
    code, text = call("compare", str(first), str(first))
    assert code == 0 and "+0.000" in text


def test_what_stands_beside_a_score_is_on_the_page(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    shutil.copytree(root / "a", folder)
    section = {
        "title": "Diversity",
        "text": "of the pictures",
        "rows": [{"kind": "ssim", "x": 0.3}],
    }
    (folder / "beside.json").write_text(json.dumps({"sections": [section]}))
    text = build_run_report(folder, tmp_path / "p.html").read_text()
    assert "<h3>Diversity</h3>" in text and "of the pictures" in text and "<td>0.3</td>" in text


def test_a_suite_of_ones_own_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("summary: s\nbenchmarks:\n  - {benchmark: scenes}\n")
    assert read_suite(str(file)).benchmarks[0].benchmark == "scenes"
    with pytest.raises(UserError, match="no suite"):
        read_suite(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_every_benchmark_keeps_the_protocol(name: str) -> None:
    """Built of its options alone, it loads nothing; it has every part, and its card names it."""
    bench = build(name, {})
    assert bench.images_per_prompt >= 1
    for part in ("items", "answers", "verdicts", "summary", "identity"):
        assert callable(getattr(bench, part))
    card = next(c for c in cards("eval") if c.name == name)
    assert card.implementation == BENCHMARKS[name]
    for key, field in type(bench).Options.model_fields.items():
        assert field.description, f"{name}.{key}"
