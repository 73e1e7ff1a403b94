"""Judge benchmarks: the HPS v2 table read literally, prompts, stored numbers, win rates, beside."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_clip import judge_of, open_clip_folder

from t2i_align.contract import Media
from t2i_align.errors import DataError, RecipeError, UserError
from t2i_align.evaluate.benchmarks import build
from t2i_align.evaluate.beside import BesideOptions, beside, write_beside
from t2i_align.evaluate.compare import compare
from t2i_align.evaluate.metrics.hpsv2 import STYLES, average, printed, style
from t2i_align.evaluate.pages import Section
from t2i_align.evaluate.report import build_report, read_extras
from t2i_align.evaluate.run import Request, run
from t2i_align.evaluate.win_rates import win_rate, win_rates
from t2i_align.judges import base
from t2i_align.scenes import grammar
from t2i_align.scenes.render import render

WORLD = {"judge": "scenes_clip", "held_out": ["scenes_exact", "colorfulness"]}


def quiet() -> Console:
    return Console(file=io.StringIO())


# --- HPS v2 ------------------------------------------------------------------------------------


def literal_lines(scores: dict[str, list[float]]) -> list[tuple[str, str, str]]:
    """The script's print statements, spelt out with plain sums."""
    lines, every = [], []
    for name, values in scores.items():
        chunks, start = [], 0
        while start < len(values):
            part = values[start : start + 80]
            chunks.append(sum(part) / len(part))
            start += 80
        mean = sum(chunks) / len(chunks)
        spread = math.sqrt(sum((c - mean) ** 2 for c in chunks) / len(chunks))
        lines.append((name, f"{mean:.2f}", f"{spread:.4f}"))
        every += values
    return [*lines, ("Average", f"{sum(every) / len(every):.2f}", "")]


def test_the_table_is_what_the_script_prints() -> None:
    """2,000 random tables, complete and with missing pictures."""
    rng = random.Random(0)
    for _ in range(2000):
        styles = rng.sample(STYLES, rng.randint(1, 4))
        counts = [rng.choice((1, 79, 80, 81, 160, 200, 400)) for _ in styles]
        scores = {
            s: [rng.gauss(27, 3) for _ in range(n)] for s, n in zip(styles, counts, strict=True)
        }
        assert printed(scores) == literal_lines(scores)


def test_both_variants_in_closed_form() -> None:
    """80 zeros and one 81: chunk means 0 and 81. Mean 40.5 against 1; deviation 40.5 against 9."""
    scores = [0.0] * 80 + [81.0]
    official, fixed = style(scores), style(scores, "fixed")
    assert (official.mean, official.deviation) == (40.5, 40.5)
    assert (fixed.mean, fixed.deviation) == (pytest.approx(1), pytest.approx(9))
    assert average({"a": [0.0, 0.0, 0.0], "b": [4.0]}) == 1
    whole = np.random.default_rng(0).normal(27, 3, 800).tolist()
    assert style(whole).mean == pytest.approx(style(whole, "fixed").mean)
    assert style(whole).deviation == pytest.approx(style(whole, "fixed").deviation / 9, rel=0.5)
    with pytest.raises(ValueError, match="no mean"):
        style([])


def style_folder(folder: Path, per_style: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in STYLES:
        texts = [f"a {name} picture of {k} cats" for k in range(per_style)]
        (folder / f"{name}.json").write_text(json.dumps(texts))
    return folder


def hps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The judge hpsv2_1 with the architecture it has, small."""
    open_clip_folder(folder / "hpsv2_1", False, "w.safetensors")
    changed = {"name_or_path": ".", "filename": "w.safetensors", "architecture": None}
    judge = judge_of("hpsv2_1", folder, **changed)
    known = base.load

    def load(name: str, *where: Any) -> Any:
        return judge if name == "hpsv2_1" else known(name, *where)

    monkeypatch.setattr(base, "load", load)
    return judge


def test_hpsv2_of_pictures_is_100_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = hps(tmp_path, monkeypatch)
    options = {"prompts": str(style_folder(tmp_path / "p")), "held_out": ["colorfulness"]}
    bench = build("hpsv2_bench", options)
    rng = np.random.default_rng(0)
    cosines: dict[str, list[float]] = {name: [] for name in STYLES}
    for item in bench.items():
        file = tmp_path / "given" / item.id / "samples" / "0000.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 32, 3)).astype(np.uint8)).save(file)
        found = judge.score([Media("image", file.read_bytes())], [item.prompt])
        cosines[item.task].append(float(found.values))
    request = Request("hpsv2_bench", tmp_path / "out", options, images=tmp_path / "given")
    result = run(request, quiet())
    expected = {k: [100 * x for x in v] for k, v in cosines.items()}
    assert list(result["tasks"]) == list(STYLES)
    for name, values in expected.items():
        assert result["tasks"][name] == pytest.approx(np.mean(values), abs=1e-3)
    assert result["overall"]["mean"] == pytest.approx(average(expected), abs=1e-3)
    deviations = result["tables"]["deviation of the means of 80 pictures"]
    assert deviations == dict.fromkeys(STYLES, 0.0)  # 3 pictures are one chunk
    protocol = result["protocol"]
    assert protocol["prompts"] == "custom" and protocol["variant"] == "official"
    assert len(protocol["judges"]["hpsv2_1"]["weights_sha256"]) == 64
    fixed = Request(
        "hpsv2_bench",
        tmp_path / "fixed",
        {"variant": "fixed"},
        answers=tmp_path / "out" / "answers.jsonl",
    )
    spread = run(fixed, quiet())["tables"]["deviation of the pictures"]
    assert spread["photo"] == pytest.approx(np.std(expected["photo"], ddof=1), abs=1e-3)


def test_hpsv2_prompts_are_known_by_their_texts(tmp_path: Path) -> None:
    """Another layout of the same texts is the same file; a changed text is not."""
    from t2i_align.evaluate.benchmarks.hpsv2_bench import texts_sha256

    one, two = tmp_path / "one", tmp_path / "two"
    style_folder(one)
    style_folder(two)
    for name in STYLES:
        texts = json.loads((one / f"{name}.json").read_text())
        (two / f"{name}.json").write_text(json.dumps(texts, indent=3))
    known = [build("hpsv2_bench", {"prompts": str(p)}) for p in (one, two)]
    digests = [b.prompt_identity()["prompts_sha256"] for b in known]  # type: ignore[attr-defined]
    assert digests[0] == digests[1] != texts_sha256(["another"])
    (one / "photo.json").write_text("{}")
    with pytest.raises(DataError, match=r"photo\.json holds no list of texts"):
        build("hpsv2_bench", {"prompts": str(one)}).items()
    with pytest.raises(DataError, match=r"(?s)cannot read.*zhwang/HPDv2.*--set prompts=PATH"):
        build("hpsv2_bench", {"prompts": str(tmp_path)}).items()
    assert len(build("hpsv2_bench", {"prompts": str(two), "styles": ["photo"]}).items()) == 3


# --- a judge and two models --------------------------------------------------------------------


def metadata() -> list[grammar.Metadata]:
    """Two prompts of two tasks."""
    prompts = grammar.prompts(held_out=True)
    return [*prompts["colors"][:2], *prompts["two_object"][:2]]


def table_file(folder: Path) -> Path:
    file = folder / "mine.tsv"
    lines = [f"{m['prompt']}\t{m['tag']}" for m in metadata()]
    file.write_bytes(("\r\n".join(["Prompts\tCategory", *lines]) + "\r\n").encode())
    return file


def judged(
    folder: Path, table: Path, wrong: int, per_prompt: int = 2, *, alike: bool = False
) -> Path:
    """An evaluation of true renders, the first ``wrong`` prompts with pictures of another one."""
    items = metadata()
    for k, item in enumerate(items):
        shown = items[-1 - k] if k < wrong else item
        for number in range(per_prompt):
            rng = np.random.default_rng(100 * k if alike else 100 * k + number)
            file = folder / "given" / f"{k:05d}" / "samples" / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(grammar.scene_for(shown, rng), rng)).save(file)
    options = WORLD | {"prompts": str(table), "images_per_prompt": per_prompt}
    out = folder / "out"
    run(Request("drawbench", out, options, images=folder / "given"), quiet())
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four wrong prompts before; none after, and the pictures of a prompt became one picture."""
    root = tmp_path_factory.mktemp("judged")
    table = table_file(root)
    return judged(root / "a", table, 4), judged(root / "b", table, 0, alike=True)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]


def test_scores_are_the_judges_own(two: tuple[Path, Path]) -> None:
    """Row by row against the real judges of the world, called by hand."""
    rows = rows_of(two[0])
    media = [Media("image", (two[0].parent / "given" / r["filename"]).read_bytes()) for r in rows]
    for name in ("scenes_clip", "scenes_exact", "colorfulness"):
        expected = base.load(name).score(media, [r["prompt"] for r in rows]).values.tolist()
        column = "score" if name == "scenes_clip" else None
        found = [r["score"] if column else r["parts"][f"judge {name}"] for r in rows]
        assert found == pytest.approx(expected)
    summary = json.loads((two[0] / "summary.json").read_text())
    scores = [r["score"] for r in rows]
    assert summary["overall"]["mean"] == pytest.approx(np.mean(scores))
    assert summary["tasks"]["colors"] == pytest.approx(np.mean(scores[:4]))
    table = summary["tables"]["held-out judge scenes_exact"]
    exact = [r["parts"]["judge scenes_exact"] for r in rows]
    assert table["all pictures"] == pytest.approx(np.mean(exact))
    assert table["two_object"] == pytest.approx(np.mean(exact[4:]))


def test_the_better_model_wins_with_both_judges(two: tuple[Path, Path]) -> None:
    overall = compare(*two)["overall"]
    assert (overall["win"], overall["tie"], overall["lose"]) == (8, 0, 0)
    clip, exact, color = win_rates(*two)
    assert (clip["judge"], clip["role"], clip["win_rate"]) == ("scenes_clip", "counts", 1.0)
    assert (exact["judge"], exact["role"]) == ("scenes_exact", "held out")
    assert exact["win_rate"] == 1.0 and exact["low"] > 0
    assert color["win_rate"] is None and color["difference"] is not None  # only a monitor
    same = win_rates(two[0], two[0])
    assert [r["win_rate"] for r in same] == [0.5, 0.5, None]


def test_win_rates_count_half_a_tie() -> None:
    found = win_rate([0, 1, 2, 3], [1, 1, 1, 4], "aabb")
    assert found.mean == (1 + 0.5 + 0 + 1) / 4
    assert (found.low, found.high) == (0.5, 0.75)  # the prompts' means
    assert win_rate([3], [1], ["a"]).mean == 0


def test_win_rates_turn_round_where_less_is_better(tmp_path: Path) -> None:
    """The judge that counts goes up, the held-out distance goes up too: it was gamed."""
    for name, shift in (("a", 0.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        protocol = {"protocol": {"benchmark": "drawbench", "judge": "pickscore"}}
        (tmp_path / name / "protocol.json").write_text(json.dumps(protocol))
        rows = [
            {"prompt": f"p{k}", "image": 0, "tag": "t", "correct": None, "score": k + shift}
            | {"graded": 0.0, "parts": {"judge dreamsim": k + shift, "judge gone": 1.0}}
            for k in range(3)
        ]
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (tmp_path / name / "results.jsonl").write_text(text)
    counts, held, gone = win_rates(tmp_path / "a", tmp_path / "b")
    assert counts["win_rate"] == 1 and held["win_rate"] == 0 and held["difference"] == 1
    assert gone["win_rate"] is None  # a card that is not here says no direction
    (tmp_path / "b" / "results.jsonl").write_text("")
    with pytest.raises(DataError, match="different prompts"):
        win_rates(tmp_path / "a", tmp_path / "b")


def test_failures_are_told_and_never_zeros(tmp_path: Path) -> None:
    """scenes_exact has no number for a prompt that is not of its grammar."""
    table = tmp_path / "p.tsv"
    table.write_text("Prompts\tCategory\na dog in love\tx\na cat\tx\n")
    for k in range(2):
        file = tmp_path / "given" / f"{k:05d}" / "samples" / "0000.png"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(file)
    options = {"prompts": str(table), "judge": "colorfulness"}
    with pytest.raises(UserError, match="card of judge 'colorfulness' says 'none, a monitor'"):
        build("drawbench", options)
    options = WORLD | {"prompts": str(table)}
    request = Request("drawbench", tmp_path / "out", options, images=tmp_path / "given")
    with pytest.raises(DataError, match=r"(?s)'scenes_exact' has no number for picture 0 of 00000"):
        run(request, quiet())
    answers = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    stored = json.loads(answers[1])["answer"]
    assert stored["scores"]["scenes_exact"] is None and stored["reasons"]["scenes_exact"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"judge": "pickscor"}, UserError, "(?s)unknown judge 'pickscor'.*did you mean"),
        ({"held_out": ["pickscore"]}, RecipeError, "named once"),
        ({"jugde": "pickscore"}, RecipeError, "did you mean 'judge'"),
        ({"judge": "dreamsim"}, UserError, "says 'lower is better'"),
    ],
)
def test_options_are_checked_first(options: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        build("parti_prompts", options)


def test_tables_are_not_csv(tmp_path: Path) -> None:
    """Quotation marks are letters, spaces stay, other line ends are inside a prompt."""
    file = tmp_path / "p.tsv"
    rows = ['"A B" on a wall \tArts\tBasic\t', "a\u2028b\tArts\tComplex\tn"]
    file.write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *rows]) + "\n")
    first, second = build("parti_prompts", {"prompts": str(file)}).items()
    assert first.prompt == '"A B" on a wall ' and second.prompt == "a\u2028b"
    assert second.metadata == {"challenge": "Complex", "note": "n"}
    file.write_text("Prompt\tCategory\n")
    with pytest.raises(DataError, match="the first line names the columns Prompt, Category, Chall"):
        build("parti_prompts", {"prompts": str(file)}).items()
    file.write_text("Prompts\tCategory\nx\n")
    with pytest.raises(DataError, match=r"p\.tsv:2 has 1 of 2 columns"):
        build("drawbench", {"prompts": str(file)}).items()


# --- beside ------------------------------------------------------------------------------------


def test_beside_shows_what_the_score_does_not(two: tuple[Path, Path], tmp_path: Path) -> None:
    """After: every judge is happier, and each prompt has one picture, twice."""
    before, after = two
    options = BesideOptions(embedding="scenes_clip")
    found = beside(after.parent / "given", before.parent / "given", options)
    assert (found["pictures"], found["prompts"]) == (8, 4) and found["held_out"] == []
    for row in found["diversity"]:
        assert abs(row["embedding"]) < 1e-6 < row["embedding_base"]
        assert abs(row["perceptual"]) < 1e-9 < row["perceptual_base"]
    sharp = next(r for r in found["drift"] if r["statistic"] == "sharpness")
    assert sharp["distance"] > 0
    spread = found["sections"][0]["rows"][0]
    assert spread["model"] < 1e-6 < spread["base"] and spread["high"] < 0
    same = beside(after.parent / "given", after.parent / "given", options)
    assert {r["distance"] for r in same["drift"]} == {0.0}
    file = write_beside(found, tmp_path)
    assert json.loads(file.read_text()) == json.loads(json.dumps(found))
    titles = [s.title for s in read_extras(file)]
    assert titles == ["Diversity", "Drift"]


def test_the_report_shows_beside(two: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = two
    for folder in two:  # pictures of elsewhere, brought into the evaluation
        link = folder / "images"
        if not link.exists():
            link.symlink_to(folder.parent / "given", target_is_directory=True)
    found = beside(after, before, BesideOptions(embedding="scenes_clip"))
    assert [r["win_rate"] for r in found["held_out"]] == [1.0, 1.0, None]
    extras = read_extras(write_beside(found, tmp_path))
    assert all(isinstance(s, Section) for s in extras)
    page = build_report(before, after, tmp_path / "r.html", extras=extras).read_text()
    for text in ("Held-out judges", "scenes_exact", "hue of pixels, degrees", "Diversity"):
        assert text in page


def test_beside_refuses_unlike_pictures(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 1)):
        for number in range(count):
            file = tmp_path / name / "00000" / "samples" / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64 + 8 * number)).save(file)
    options = BesideOptions(embedding="scenes_clip")
    with pytest.raises(DataError, match="pictures of one size are compared"):
        beside(tmp_path / "a", None, options)
    single = beside(tmp_path / "b", None, options)
    assert single["diversity"] == [] and "single picture" in single["sections"][0]["text"]
    (tmp_path / "a" / "00000" / "samples" / "0001.png").unlink()
    (tmp_path / "b" / "00000" / "samples" / "0000.png").rename(tmp_path / "b" / "0000.png")
    with pytest.raises(DataError, match="holds no pictures"):
        beside(tmp_path / "b", None, options)
    with pytest.raises(UserError, match="'colorfulness' has no embedding of pictures"):
        beside(tmp_path / "a", None, BesideOptions(embedding="colorfulness"))


@pytest.mark.parametrize("name", ["hpsv2_1", "scenes_clip"])
def test_embeddings_are_those_of_the_judge(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge's cosine is that of the embedding here and of its own embedding of the prompt."""
    from t2i_align.evaluate.beside import embedder

    judge: Any = hps(tmp_path, monkeypatch) if name == "hpsv2_1" else base.load(name)
    rng = np.random.default_rng(5)
    pictures = [Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))] * 2
    seen = torch.from_numpy(embedder(name)(pictures)).float()
    assert torch.equal(seen[0], seen[1])
    if name == "hpsv2_1":
        said = judge.trunk.texts(["a red car"], "ftfy")
    else:
        said = judge.model.encode_text(judge.tokenizer(["a red car"])).float()
    cosine = torch.nn.functional.cosine_similarity(seen[:1], said)
    stream = io.BytesIO()
    pictures[0].save(stream, "PNG")
    own = judge.score([Media("image", stream.getvalue())], ["a red car"]).values
    assert cosine.detach() == pytest.approx(own, abs=1e-5)
