"""Judges: the contract, the exact judge, statistics in closed form, the dual encoder."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align.catalog import cards, find_root
from t2i_align.contract import Media, MediaError
from t2i_align.errors import ModelError, RecipeError, UserError
from t2i_align.judges import base
from t2i_align.judges.dual_encoder import DualEncoder, DualEncoderOptions
from t2i_align.judges.scenes_exact import ExactJudge, ExactOptions
from t2i_align.judges.statistics import colorfulness, saturation, sharpness
from t2i_align.scenes import golden, grammar
from t2i_align.scenes.parse import parse
from t2i_align.scenes.render import Scene, Thing, render

OURS = ("colorfulness", "saturation", "scenes_clip", "scenes_exact", "scenes_vlm", "sharpness")
CPU = torch.device("cpu")


def png(pixels: np.ndarray) -> Media:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return Media("image", stream.getvalue())


def options(**given: str) -> DualEncoderOptions:
    return DualEncoderOptions.model_validate(given)


def exact(output: str) -> ExactJudge:
    return ExactJudge(Path(), ExactOptions.model_validate({"output": output}), CPU, torch.float32)


# --- parsing -----------------------------------------------------------------------------------


def test_parsing_inverts_the_grammar() -> None:
    """Every prompt of both sides gives its own metadata back, key by key."""
    sides = (grammar.prompts(held_out=h).values() for h in (False, True))
    items = [m for side in sides for task in side for m in task]
    assert len(items) > 5000
    assert [parse(m["prompt"]) for m in items] == items


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a cat",
        "A photo of a car",
        "a photo of a umbrella",
        "a photo of an red car",
        "a photo of five cars",
        "a photo of three car",
        "a photo of a car and a car",
        "a photo of a red car and a bed",
        "a photo of a red car and a red bed",
        "a photo of a red car left of a bed",
        "a photo of a car near a bed",
        "a photo of a car and a bed and a tie",
        "a photo of a car ",
        "",
    ],
)
def test_what_the_grammar_never_says_is_outside(text: str) -> None:
    with pytest.raises(
        MediaError, match=r"outside the world's grammar, e\.g\. 'a photo of a red car'"
    ):
        parse(text)


# --- the contract ------------------------------------------------------------------------------


def test_what_cannot_be_judged_is_nan_with_a_reason() -> None:
    good = golden.drawn("a photo of a bed", 3)
    media = [good, Media("image", b"no image"), Media("audio", torch.zeros(4)), good]
    texts = ["a photo of a bed", "a photo of a bed", "a photo of a bed", "a cat on a mat"]
    found = exact("graded").score(media, texts)
    assert found.values[0] > 0.9 and found.values[1:].isnan().all()
    assert found.num_failed == 3 and found.reasons[0] is None
    assert "not an image" in str(found.reasons[1])
    assert found.reasons[2] == "this judge looks at images, got audio"
    assert "'a cat on a mat' is outside the world's grammar" in str(found.reasons[3])
    with pytest.raises(ValueError, match="1 media and 2 prompts; give one prompt each"):
        exact("graded").score([good], ["a", "b"])


def test_normalising_is_the_cards_affine_map() -> None:
    """Eq. (1) of judges/base.py with the card's own numbers."""
    card = base.judge_card("scenes_exact")
    stats = card.details["normalize"]
    z = base.normalizer(card)(torch.tensor([stats["mean"], stats["mean"] + stats["std"], math.nan]))
    assert z[:2].tolist() == pytest.approx([0, 1], abs=1e-6) and bool(z[2].isnan())
    turned = card.model_copy(update={"direction": "lower is better"})
    above = torch.tensor([stats["mean"] + stats["std"]])
    assert base.normalizer(turned)(above).item() == pytest.approx(-1)
    with pytest.raises(UserError, match="judge 'bare' has no statistics to normalise with"):
        base.normalizer(card.model_copy(update={"name": "bare", "details": {}}))


def test_a_wrong_name_is_told_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"unknown judge 'scene_exact'; known: (?s:.*)did you mean"
    ) as e:
        base.load("scene_exact")
    assert "'scenes_exact'?" in str(e.value)


# --- the exact judge ---------------------------------------------------------------------------


def test_the_exact_judge_orders_near_misses() -> None:
    rng = np.random.default_rng(4)

    def scene(*things: tuple[str, str, tuple[float, float]]) -> Media:
        return png(render(Scene(tuple(Thing(c, k, at, 26) for c, k, at in things)), rng))

    car, bed = ("car", "red", (17.0, 20.0)), ("bed", "green", (46.0, 44.0))
    swapped = (("car", "green", car[2]), ("bed", "red", bed[2]))
    media = [scene(car, bed), scene(*swapped), scene(car), scene()]
    text = "a photo of a red car and a green bed"
    graded = exact("graded").score(media, [text] * 4).values.tolist()
    assert graded == sorted(graded, reverse=True) and graded[3] == 0 and graded[0] > 0.8
    assert graded[1] == pytest.approx(graded[0] / 2, abs=0.1)  # a wrong colour halves an object
    verdict = exact("verdict").score(media, [text] * 4).values.tolist()
    assert verdict == [1, 0, 0, 0]


def test_larger_pictures_are_judged_at_the_worlds_size() -> None:
    item = parse("a photo of two cars")
    rng = np.random.default_rng(5)
    small = Image.fromarray(render(grammar.scene_for(item, rng), rng))
    large = png(np.asarray(small.resize((256, 256), Image.Resampling.BICUBIC)))
    assert exact("verdict").score([large], [item["prompt"]]).values.tolist() == [1]


# --- statistics --------------------------------------------------------------------------------


def test_colorfulness_in_closed_form() -> None:
    """Half pure red, half pure blue (R = 255 a, B = 255 b).

    rg = 255 or 0: mean 127.5, std 127.5. yb = 127.5 or -255: mean -63.75, std 191.25.
    """
    picture = np.zeros((4, 6, 3))
    picture[:, :3, 0] = picture[:, 3:, 2] = 255
    expected = math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, 63.75)
    assert colorfulness(picture) == pytest.approx(expected)
    grey = np.repeat(np.arange(24.0).reshape(4, 6, 1), 3, 2)
    assert colorfulness(grey) == 0


def test_saturation_is_hsvs() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (8, 8, 3))
    hsv = np.asarray(Image.fromarray(picture.astype(np.uint8)).convert("HSV"), float)
    assert saturation(picture.astype(float)) == pytest.approx(hsv[..., 1].mean() / 255, abs=3e-3)
    assert saturation(np.zeros((2, 2, 3))) == 0


def test_sharpness_in_closed_form() -> None:
    """A 5 x 5 picture with one pixel of v: the 3 x 3 inside sees -4v once, v four times."""
    picture = np.zeros((5, 5, 3))
    picture[2, 2] = 90
    assert sharpness(picture) == pytest.approx((16 + 4) / 9 * 90**2)
    ramp = np.repeat(np.add.outer(np.arange(6.0), np.arange(6.0))[..., None], 3, 2)
    assert sharpness(ramp) == pytest.approx(0)  # a linear ramp has no second derivative
    found = base.load("sharpness").score([png(np.zeros((2, 9, 3)))], [""])
    assert found.reasons == ("sharpness needs 3 x 3 pixels, got 9 x 2",)


# --- cards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_golden_values(name: str) -> None:
    """Recomputed on renders drawn again; after a change on purpose: scenes/golden.py."""
    card = base.judge_card(name)
    known = json.loads((find_root() / "reward_models" / name / str(card.golden)).read_text())
    found = golden.compute(name)
    assert [{k: r[k] for k in ("drawn", "seed", "asked")} for r in found] == [
        {k: r[k] for k in ("drawn", "seed", "asked")} for r in known
    ]
    tolerance = card.details["golden_tolerance"]
    assert [r["value"] for r in found] == pytest.approx([r["value"] for r in known], abs=tolerance)


def test_cards_are_complete() -> None:
    found = {c.name: c for c in cards("reward_models")}
    for name in OURS:
        card = found[name]
        assert card.license == "Apache-2.0" and card.implementation and card.failure_modes
        assert card.range and card.direction and card.citation.startswith("@")
        assert card.citation.count("{") == card.citation.count("}")
        assert [c.version for c in card.changelog] == list(range(card.version, 0, -1))


def test_a_prompt_changes_the_exact_score_and_no_statistic() -> None:
    for name, same in (("scenes_exact", False), ("colorfulness", True), ("sharpness", True)):
        values = [r["value"] for r in golden.compute(name)]
        pairs = zip(values[::2], values[1::2], strict=True)
        assert all((own == other) if same else (own > other) for own, other in pairs)


# --- the dual encoder --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> DualEncoder:
    judge = base.load("scenes_clip")
    assert isinstance(judge, DualEncoder)
    return judge


@pytest.fixture(scope="module")
def shown() -> tuple[list[Media], list[str]]:
    texts = [own for own, _ in golden.CASES]
    return [golden.drawn(text, i) for i, text in enumerate(texts)], texts


def test_a_score_depends_on_nothing_beside_it(
    clip: DualEncoder, shown: tuple[list[Media], list[str]]
) -> None:
    media, texts = shown
    together = clip.score(media, texts).values
    alone = torch.cat([clip.score([m], [t]).values for m, t in zip(media, texts, strict=True)])
    assert (together - alone).abs().max() <= 1e-5
    assert torch.equal(together, clip.score(media, texts).values)
    turned = clip.score(media[::-1], texts[::-1]).values.flip(0)
    assert (together - turned).abs().max() <= 1e-5


def test_tensors_agree_with_pictures_and_carry_gradients(
    clip: DualEncoder, shown: tuple[list[Media], list[str]]
) -> None:
    media, texts = shown
    pixels = torch.stack([m.data for m in media]).requires_grad_()
    found = clip.score_tensor(pixels, texts)
    tolerance = base.judge_card("scenes_clip").details["tensor_tolerance"]
    assert (found.detach() - clip.score(media, texts).values).abs().max() <= tolerance
    found.sum().backward()
    assert pixels.grad is not None
    # the gradient is the slope: a small step along it raises each score as much as it predicts
    step = 0.02 * pixels.grad / pixels.grad.flatten(1).norm(dim=1)[:, None, None, None]
    inside = pixels.detach().clamp(0.05, 0.95)
    start = inside.clone().requires_grad_()
    clip.score_tensor(start, texts).sum().backward()
    assert start.grad is not None
    rise = clip.score_tensor(inside + step, texts) - clip.score_tensor(inside - step, texts)
    predicted = 2 * (start.grad * step).flatten(1).sum(1)
    assert rise.detach().tolist() == pytest.approx(predicted.tolist(), rel=0.3, abs=2e-4)


def test_pictures_become_rgb_before_the_resize(clip: DualEncoder) -> None:
    """A palette picture and its RGB twin score alike, also where they must be resized."""
    rng = np.random.default_rng(6)
    pixels = render(grammar.scene_for(parse("a photo of a car"), rng), rng)
    palette = Image.fromarray(pixels).quantize(16, dither=Image.Dither.NONE)
    scores = []
    for image in (palette, palette.convert("RGB")):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        scores.append(clip.score([Media("image", stream.getvalue())], ["a photo of a car"]).values)
    assert torch.equal(*scores)


def test_open_clip_itself_gives_the_same_number(
    clip: DualEncoder, shown: tuple[list[Media], list[str]]
) -> None:
    """The folder is open_clip's: its own loader, transform and tokenizer give the card's score."""
    import open_clip

    name = f"local-dir:{find_root() / 'reward_models' / 'scenes_clip'}"
    made: Any = open_clip.create_model_from_pretrained(name, return_transform=True)
    model, transform = made
    media, texts = shown
    images = torch.stack([transform(base.rgb(m)) for m in media])
    with torch.no_grad():
        seen = model.eval().encode_image(images, normalize=True)
        said = model.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    theirs = (seen * said).sum(-1)
    assert (theirs - clip.score(media, texts).values).abs().max() <= 1e-5
    logit = DualEncoder(clip.folder, options(path=".", output="logit"), CPU, torch.float32)
    expected = model.logit_scale.exp() * theirs + model.logit_bias
    assert (expected.detach() - logit.score(media, texts).values).abs().max() <= 1e-4


def test_the_bundled_folder_is_small(clip: DualEncoder) -> None:
    files = [p for p in clip.folder.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 5 * 2**20


def test_options_and_folders_of_a_dual_encoder_are_checked(tmp_path: Path) -> None:
    for given in ({}, {"path": ".", "model": "ViT-B-32"}):
        with pytest.raises(ValueError, match="give exactly one of path and model"):
            DualEncoderOptions.model_validate(given)
    with pytest.raises(ValueError, match="a path brings its own weights"):
        options(path=".", pretrained="openai")
    judge = DualEncoder(tmp_path, options(path="gone"), CPU, torch.float32)
    with pytest.raises(ModelError, match=f"no open_clip folder at {tmp_path / 'gone'}"):
        _ = judge.model
    judge = DualEncoder(tmp_path, options(path="."), CPU, torch.float32)
    with pytest.raises(ModelError, match=r"a folder holds open_clip_config\.json, weights"):
        _ = judge.model


def test_a_cards_options_are_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_root() / "reward_models" / "scenes_exact" / "card.yaml"
    folder = tmp_path / "reward_models" / "scenes_exact"
    folder.mkdir(parents=True)
    text = source.read_text().replace("{output: graded}", "{output: grade}", 1)
    (folder / "card.yaml").write_text(text)
    monkeypatch.setattr(base, "find_root", lambda: tmp_path)
    with pytest.raises(RecipeError, match="did you mean 'graded'"):
        base.load.__wrapped__("scenes_exact")
