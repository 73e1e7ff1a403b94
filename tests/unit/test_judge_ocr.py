"""The text judge: which text is asked for, the distance in closed form, and real recognition."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from t2i_align.contract import Media, MediaError
from t2i_align.judges import ocr as module
from t2i_align.judges.base import judge_card, load
from t2i_align.judges.ocr import OcrJudge, OcrOptions, target_text, text_score

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
PROMPT = 'a shop sign that says "OPEN LATE"'


def judge(**options: Any) -> OcrJudge:
    made = OcrOptions.model_validate({"num_threads": 1, "side": 160} | options)
    return OcrJudge(Path(), made, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def reader() -> OcrJudge:
    return judge()


def sign(*lines: str, width: int = 220) -> Image.Image:
    image = Image.new("RGB", (width, 160), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.truetype(str(FONT), 30)
    for number, line in enumerate(lines):
        draw.text((16, 24 + 60 * number), line, fill="black", font=font)
    return image


def png(image: Image.Image) -> Media:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return Media("image", stream.getvalue())


# --- the target --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "Hello"', "Hello"),
        ("a sign “Hello”", "Hello"),
        ("ein Schild „Hallo“", "Hallo"),
        ("un panneau « Salut »", " Salut "),
        ('a sign "Open" and a note “till nine”', "Open till nine"),
        ("the baker's \"Bread\" isn't old", "Bread"),
    ],
)
def test_the_target_stands_in_quotes(prompt: str, text: str) -> None:
    assert target_text(prompt, "quotes") == text


def test_other_targets() -> None:
    both = 'a "first" and a "second"'
    assert target_text(both, "first_quote") == "first"
    assert target_text(both, "prompt") == both


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("a sign", 'quotes no text; write it as "..."'),
        ('a sign ""', "the text to look for in 'a sign \"\"' is empty"),
        ('a sign "  "', "is empty"),
        ('a 5" screen that says "HI"', "is not closed"),
    ],
)
def test_what_cannot_be_looked_for_has_a_reason(prompt: str, why: str) -> None:
    with pytest.raises(MediaError) as error:
        target_text(prompt, "quotes")
    assert why in str(error.value)
    found = judge().score([png(sign("HI"))], [prompt])
    assert found.values.isnan().all() and why in str(found.reasons[0])


# --- the distance ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("OPEN LATE", "open  late", 1.0),  # case and spaces do not count
        ("It\u2019s 24\u20137", "it's 24-7", 1.0),  # typographic marks are their plain ones
        ("\uff2f\uff30\uff25\uff2e", "OPEN", 1.0),  # full-width letters
        ("OPAN", "OPEN", 0.75),
        ("PEN", "OPEN", 0.75),
        ("", "OPEN", 0.0),
        ("OPEN OPEN", "OPEN", 0.0),  # the released reward: 1
        ("NOW OPEN", "OPEN", 0.25),  # the released reward: 1
    ],
)
def test_the_score_in_closed_form(read: str, target: str, score: float) -> None:
    """1 - edits / length: a surplus letter costs what a missing one does."""
    assert text_score(read, target) == pytest.approx(score)


def edits(a: str, b: str) -> int:
    """Levenshtein's recursion, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@given(st.text("abc ", max_size=12), st.text("abc", min_size=1, max_size=8))
def test_the_distance_is_levenshteins(read: str, target: str) -> None:
    expected = max(0.0, 1 - edits(read.replace(" ", ""), target) / len(target))
    assert text_score(read, target) == pytest.approx(expected)


# --- pictures ----------------------------------------------------------------------------------


def test_the_text_itself_wins_and_more_of_it_does_not_pay(reader: OcrJudge) -> None:
    """Right near 1; wrong, repeated, embedded and missing text lower."""
    pictures = [
        sign("OPEN LATE"),
        sign("OPEN LAKE"),
        sign("CLOSED"),
        sign("OPEN LATE", "OPEN LATE"),
        sign("WE OPEN LATE TODAY", width=380),
        sign(),
    ]
    found = reader.score([png(p) for p in pictures], [PROMPT] * len(pictures))
    right, near, wrong, repeated, inside, blank = found.values.tolist()
    assert right >= 0.99 and found.num_failed == 0
    assert right > near > wrong
    assert repeated == 0 and inside <= 0.3 and blank == 0


def test_a_rotated_file_is_read_upright(reader: OcrJudge) -> None:
    """EXIF says how to turn the picture; the same pixels without the tag are read as they lie."""
    turned = sign("OPEN LATE").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    stream = io.BytesIO()
    turned.save(stream, "JPEG", quality=95, exif=exif)
    found = reader.score([Media("image", stream.getvalue())], [PROMPT])
    assert found.values.item() >= 0.99


def test_a_score_depends_on_nothing_beside_it(reader: OcrJudge) -> None:
    media = [png(sign("OPEN LATE")), png(sign("24 HOURS"))]
    texts = [PROMPT, 'a sign "24 hours"']
    together = reader.score(media, texts).values
    turned = reader.score(media[::-1], texts[::-1]).values.flip(0)
    assert torch.equal(together, turned) and bool((together >= 0.99).all())


def test_failures_are_nan_with_a_reason(reader: OcrJudge) -> None:
    media = [Media("image", b"no image"), png(Image.new("RGB", (20, 3000)))]
    found = reader.score(media, [PROMPT] * 2)
    assert found.values.isnan().all()
    assert "not an image" in str(found.reasons[0])
    assert str(found.reasons[1]).startswith("the text recogniser broke: ")


def test_the_card_loads_and_names_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("ocr")
    assert isinstance(loaded, OcrJudge)
    assert len(loaded.weights_sha256) == 64 and loaded.weights_sha256 == judge().weights_sha256
    assert judge_card("ocr").license == "Apache-2.0"
    from t2i_align.errors import MissingDependencyError

    def absent(dist: str, extra: str, feature: str) -> None:
        raise MissingDependencyError(f"{feature} needs '{dist}'", f"extra {extra}")

    monkeypatch.setattr(module, "require", absent)
    with pytest.raises(MissingDependencyError, match="the judge ocr needs 'rapidocr-onnxruntime'"):
        judge()
