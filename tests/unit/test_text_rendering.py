"""Text rendering: four numbers against literal readings, and real recognition of real pictures."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from t2i_align.errors import DataError, UserError
from t2i_align.evaluate.benchmarks import build
from t2i_align.evaluate.compare import compare
from t2i_align.evaluate.metrics.text_rendering import (
    flow_grpo_reward,
    similarity,
    text_scores,
    word_accuracy,
)
from t2i_align.evaluate.run import Request, run
from t2i_align.evaluate.run_report import build_run_report

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
PROMPTS = (
    'a shop sign that says "OPEN LATE"',
    'a door with "EXIT" on it',
    'a mug with the word "WORLD"',
    'a poster, "JAZZ NIGHT"',
)
OPTIONS: dict[str, Any] = {"num_threads": 1, "side": 160, "held_out": []}


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "target", "exact", "alike", "words", "reward"),
    [
        ("Open late", "OPEN LATE", 1, 1, 1, 1),
        ("OPENLATE", "OPEN LATE", 1, 1, 1, 1),  # a lost space is the recogniser's
        ("OPEN LAKE", "OPEN LATE", 0, 1 - 1 / 8, 1 / 2, 1 - 1 / 8),
        ("OPEN", "OPEN LATE", 0, 1 / 2, 1 / 2, 1 / 2),
        ("", "OPEN", 0, 0, 0, 0),
        ("OPEN OPEN", "OPEN", 0, 1 / 2, 1, 1),  # surplus text: held against it by the first two
        ("WE OPEN NOW", "OPEN", 0, 1 - 5 / 9, 1, 1),
        ("LATE OPEN", "OPEN LATE", 0, 0, 1, 0),  # words in another order; 8 of 8 letters change
        ("OPEN", "OPEN OPEN", 0, 1 / 2, 1 / 2, 1 / 2),  # counted as often as it is read
        ("OPENOPEN", "OPEN OPEN", 1, 1, 1, 1),
        ("it\u2019s", "it's", 1, 1, 1, 1 - 1 / 4),  # the released reward knows no typography
    ],
)
def test_numbers_by_hand(
    read: str, target: str, exact: float, alike: float, words: float, reward: float
) -> None:
    found = text_scores(read, target)
    assert found.exact == exact
    assert found.similarity == pytest.approx(alike)
    assert found.words == pytest.approx(words)
    assert found.reward == pytest.approx(reward)


def edits(a: str, b: str) -> int:
    """Levenshtein's recursion, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def literal_words(read: list[str], target: list[str]) -> float:
    """Take words out of the target one by one; then runs of neighbours, glued."""
    left = list(target)
    odd = []
    for word in read:
        if word in left:
            left.remove(word)
        else:
            odd.append(word)
    for word in odd:
        runs = [target[i:j] for i in range(len(target)) for j in range(i + 2, len(target) + 1)]
        for run_of in runs:
            there = all(left.count(w) >= run_of.count(w) for w in run_of)
            if "".join(run_of) == word and there:
                for w in run_of:
                    left.remove(w)
                break
    return (len(target) - len(left)) / len(target)


def test_random_texts_against_a_literal_reading() -> None:
    rng = random.Random(0)

    def text(low: int) -> list[str]:
        count = rng.randint(low, 4)
        return ["".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(count)]

    for _ in range(3000):
        read, target = text(0), text(1)
        r, t = "".join(read), "".join(target)
        said, asked = " ".join(read), " ".join(target)
        d = edits(r, t)
        assert similarity(said, asked) == pytest.approx(1 - d / max(len(r), len(t)))
        assert word_accuracy(said, asked) == pytest.approx(literal_words(read, target))
        reward = 1.0 if t in r else max(0.0, 1 - d / len(t))
        assert flow_grpo_reward(said, asked) == pytest.approx(reward)
        assert text_scores(said, asked).exact == (r == t)


def test_a_target_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="no words"):
        word_accuracy("a", "  ")


# --- pictures ----------------------------------------------------------------------------------


def sign(*lines: str) -> Image.Image:
    image = Image.new("RGB", (400, 160), "white")
    draw = ImageDraw.Draw(image)
    for k, line in enumerate(lines):
        draw.text((16, 24 + 60 * k), line, fill="black", font=ImageFont.truetype(str(FONT), 30))
    return image


def evaluation(folder: Path, *texts: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """Pictures of some texts, read and judged."""
    given, out = folder / "given", folder / "out"
    for k, lines in enumerate(texts):
        file = given / f"{k:05d}" / "samples" / "0000.png"
        file.parent.mkdir(parents=True)
        sign(*lines).save(file)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    settings = OPTIONS | {"prompts": str(prompts)} | options
    request = Request("text_rendering", out, settings, images=given)
    return run(request, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def spelt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One right picture, one with a wrong letter, one with surplus text, one blank."""
    folder = tmp_path_factory.mktemp("spelt")
    texts = (("OPEN LATE",), ("EXAT",), ("WORLD", "2024"), ())
    evaluation(folder, *texts)
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "results.jsonl").read_text().splitlines()]


def test_right_and_wrong_spellings(spelt: Path) -> None:
    rows = rows_of(spelt / "out")
    assert [r["correct"] for r in rows] == [True, False, False, False]
    assert [r["tag"] for r in rows] == ["2 words", "1 word", "1 word", "2 words"]
    assert rows[0]["reason"] == "" and rows[1]["reason"] == 'expected "EXIT", read "EXAT"'
    assert rows[2]["parts"]["words"] == 1 and rows[2]["graded"] == pytest.approx(5 / 9, abs=1e-5)
    assert rows[2]["parts"]["reward"] == 1  # what the released reward does not see
    assert rows[3]["reason"] == 'expected "JAZZ NIGHT", read nothing' and rows[3]["graded"] == 0
    found = json.loads((spelt / "out" / "summary.json").read_text())
    assert found["tasks"] == {"2 words": 0.5, "1 word": 0.0}
    assert found["overall"]["mean"] == 0.25
    assert found["tables"]["all pictures"]["exact match"] == 0.25
    assert found["tables"]["all pictures"]["reward of Flow-GRPO"] == pytest.approx(2.75 / 4)
    assert len(found["protocol"]["ocr_sha256"]) == 64 and found["protocol"]["prompts"] == "custom"


def test_lines_are_stored_with_their_boxes_and_shown(spelt: Path) -> None:
    row = rows_of(spelt / "out")[2]
    boxes = [d["box"] for d in row["detections"]]
    assert len(boxes) == 2
    for (x1, y1, x2, y2), top in zip(boxes, (24, 84), strict=True):
        assert 0 <= x1 <= 30 and x1 < x2 <= 400 and top - 10 <= y1 < y2 <= top + 50
    page = build_run_report(spelt / "out", spelt / "page.html").read_text()
    assert "expected &#34;EXIT&#34;, read &#34;EXAT&#34;" in page


def test_stored_lines_are_judged_by_other_rules(spelt: Path) -> None:
    """The released reward; a confidence nothing reaches; held-out judges that were not asked."""
    answers = spelt / "out" / "answers.jsonl"

    def again(name: str, **options: Any) -> dict[str, Any]:
        request = Request("text_rendering", spelt / name, options, answers=answers)
        return run(request, Console(file=io.StringIO()))

    official = again("official", variant="official")
    assert official["overall"]["mean"] == pytest.approx((1 + 0.75 + 1 + 0) / 4)
    assert [r["correct"] for r in rows_of(spelt / "official")] == [None] * 4
    strict = again("strict", text_score=1.0)
    assert strict["overall"]["mean"] == 0
    with pytest.raises(DataError, match="judge 'colorfulness' was not asked of picture 0 of 00000"):
        again("held", held_out=["colorfulness"])


def test_two_models_are_compared_on_exact_texts(spelt: Path, tmp_path: Path) -> None:
    """EXIT repaired, the rest as before."""
    texts = (("OPEN LATE",), ("EXIT",), ("WORLD", "2024"), ())
    evaluation(tmp_path, *texts, prompts=str(spelt / "prompts.txt"))
    overall = compare(spelt / "out", tmp_path / "out")["overall"]
    assert (overall["win"], overall["tie"], overall["lose"]) == (1, 3, 0)


def test_the_recogniser_reads_as_the_judge_does(spelt: Path) -> None:
    """Lines down to confidence 0, cut at 0.5, are what judges/ocr.py reads at 0.5."""
    import torch

    from t2i_align.evaluate.benchmarks.text_rendering import text_of
    from t2i_align.judges.ocr import OcrJudge, OcrOptions

    made = OcrOptions.model_validate({"num_threads": 1, "side": 160})
    judge = OcrJudge(Path(), made, torch.device("cpu"), torch.float32)
    stored = [json.loads(x) for x in (spelt / "out" / "answers.jsonl").read_text().splitlines()[1:]]
    for k, line in enumerate(stored):
        image = Image.open(spelt / "given" / f"{k:05d}" / "samples" / "0000.png")
        assert text_of(line["answer"], 0.5) == judge.read(image)


# --- prompts -----------------------------------------------------------------------------------


def test_prompts_must_quote(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text('a "SIGN"\n\na sign\n')
    with pytest.raises(DataError, match=r"p\.txt:3: 'a sign' quotes no text"):
        build("text_rendering", OPTIONS | {"prompts": str(file)}).items()
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a \\"B C\\" and \\"D\\""}\n')
    both, first = (
        build("text_rendering", OPTIONS | {"prompts": str(lines), "target": t}).items()[0]
        for t in ("quotes", "first_quote")
    )
    assert (both.metadata["target"], both.task) == ("B C D", "3 words")
    assert (first.metadata["target"], first.task) == ("B C", "2 words")
    lines.write_text("[]\n")
    with pytest.raises(DataError, match=r"p\.jsonl:1 is no JSON object"):
        build("text_rendering", OPTIONS | {"prompts": str(lines)}).items()
    with pytest.raises(UserError, match="unknown judge 'clip_scor'"):
        build("text_rendering", {"held_out": ["clip_scor"]})
