"""The loss of a fit in closed form, its data as functions of seed and step, its recipe's errors."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2i_align.contract import Media
from t2i_align.data.records import Item, Record
from t2i_align.errors import DataError, RecipeError
from t2i_align.judges.fit import bradley_terry
from t2i_align.judges.fit_data import Pairs, pixel_noise, split
from t2i_align.judges.fit_options import NoiseOptions
from t2i_align.judges.fit_recipe import load_fit_recipe, shipped_judges


def pairs(num: int, seed: int = 0) -> Pairs:
    rng = torch.Generator().manual_seed(4)
    made = [
        Record(
            f"r{i}",
            "pair",
            tuple(
                Item(Media("image", torch.rand(3, 8, 8, generator=rng)), f"p{i % 5}")
                for _ in range(2)
            ),
            preference=0.5 if i % 3 == 0 else 1.0,
        )
        for i in range(num)
    ]
    return Pairs(made, None, seed)


def noise(**given: object) -> NoiseOptions:
    return NoiseOptions.model_validate(given)


# --- the loss ---


def test_the_loss_in_closed_form() -> None:
    """A won pair costs log(1 + e^-d); a tie their mean, log 2 at d = 0 and more elsewhere."""
    d = torch.tensor([0.7, -1.2, 0.7, 0.0], dtype=torch.float64)
    p = torch.tensor([1.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    w = torch.tensor([1.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    cost = lambda x: math.log(1 + math.exp(-x))  # noqa: E731
    expected = cost(0.7) + 2 * cost(-1.2) + (cost(0.7) + cost(-0.7)) / 2 + 3 * math.log(2)
    assert bradley_terry(d, p, w).item() == pytest.approx(expected / 4, abs=1e-12)


def test_the_gradient_is_the_error_of_the_probability() -> None:
    """dL/dd = -(p - sigmoid(d)): a tie pulls scores together, from either side."""
    d = torch.tensor([0.7, -1.2, 0.7, -0.7, 0.0], requires_grad=True)
    p = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5])
    (grad,) = torch.autograd.grad(bradley_terry(d, p, torch.ones(5)) * 5, d)
    assert torch.allclose(grad, d.detach().sigmoid() - p, atol=1e-6)
    assert grad[2] > 0 > grad[3] and grad[4] == 0


def test_exchanging_winner_and_loser_exchanges_the_label() -> None:
    d, w = torch.linspace(-3, 3, 7), torch.ones(7)
    p = torch.linspace(0, 1, 7)
    assert bradley_terry(d, p, w).item() == pytest.approx(bradley_terry(-d, 1 - p, w).item())


# --- data ---


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    options = noise()
    first, again = (pairs(10).step(7, 4, options, None) for _ in range(2))
    assert torch.equal(first.pixels, again.pixels) and first.prompts == again.prompts
    other, later = pairs(10, seed=1).step(7, 4, options, None), pairs(10).step(8, 4, options, None)
    assert not torch.equal(first.pixels, other.pixels)
    assert not torch.equal(first.pixels, later.pixels)


def test_an_epoch_sees_every_pair_once() -> None:
    data, seen = pairs(12), []
    for step in range(3):
        seen += data.step(step, 4, None, None).pixels[:4].flatten(1).sum(1).tolist()
    whole = data.batch([(i, 0) for i in range(12)]).pixels[:12].flatten(1).sum(1).tolist()
    assert sorted(seen) == pytest.approx(sorted(whole))


def test_a_pair_differs_in_nothing_but_its_pictures() -> None:
    """At level 1 - 1e-6 only the noise is left, and it is the same on both."""
    data = pairs(6)
    batch = data.step(0, 6, noise(min_level=0.999999, max_level=1.0), None)
    winners, losers = batch.pixels.chunk(2)
    assert (winners - losers).abs().max() <= 1e-5
    assert (winners[0] - winners[1]).abs().max() > 0.1
    assert batch.level is not None and torch.equal(*batch.level.chunk(2))


@pytest.mark.parametrize("process", ["rectified", "variance_preserving"])
def test_pixel_noise_is_the_process(process: str) -> None:
    """Of grey pictures only the noise is left, with the standard deviation of the process."""
    level = torch.tensor([0.0, 0.1])
    x = torch.full((2, 3, 64, 64), 0.5)
    found = pixel_noise(noise(process=process))(x, level, torch.tensor([1, 2]), ["p", "p"])
    assert torch.equal(found[0], x[0])
    sigma = 0.1 if process == "rectified" else math.sin(0.05 * math.pi)
    assert (2 * found[1] - 1).std().item() == pytest.approx(sigma, rel=0.03)


def test_prompts_lie_on_one_side_of_the_split() -> None:
    records = pairs(60).records
    kept, held = split(records, 0.4, seed=3)
    said = lambda side: {r.items[0].prompt for r in side}  # noqa: E731
    assert len(kept) + len(held) == 60 and not said(kept) & said(held)
    assert split(records, 0.0, seed=3) == (records, [])
    with pytest.raises(DataError, match=r"split by prompt into 60 for training and 0 held out"):
        split(records, 0.001, seed=3)


def test_ties_have_half_a_preference() -> None:
    batch = pairs(4).batch([(0, 0), (1, 0)])
    assert batch.preference.tolist() == [0.5, 1.0] and batch.weight.tolist() == [1.0, 1.0]
    assert batch.prompts == ["p0", "p1", "p0", "p1"] and batch.level is None


# --- recipes ---


def messages(name: str, *more: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_fit_recipe(name, more)
    return str(caught.value)


def test_all_problems_come_together() -> None:
    text = messages(
        "judge_scenes_bt", "fit.learning_rat=1", "judge.train=heads", "data.type=absent", "sed=1"
    )
    assert "4 problems" in text
    assert "unknown key; allowed: " in text and "did you mean 'learning_rate'?" in text
    assert "got the text 'heads'; allowed: 'all' or 'vision' or 'modulation'" in text
    assert "known sources: pickapic" in text and "did you mean 'seed'?" in text


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["judge.type=timed_clip"], "noise: is missing; a judge that is told the noise level"),
        (["noise={}"], "belongs to judge.type: timed_clip"),
        (["judge.train=modulation"], "train: modulation needs type: timed_clip"),
        (["judge.weights=scratch", "judge.train=vision"], "scratch needs train: all"),
        (["judge.path=bundled/nowhere"], "judge.path: no open_clip folder at"),
        (["data=3"], "data: got the number 3; must be a section"),
        (["output_dir=''"], "output_dir: got the text ''"),
    ],
)
def test_what_does_not_go_together_is_said(more: list[str], text: str) -> None:
    assert text in messages("judge_scenes_bt", *more)


def test_a_wrong_name_is_told_with_the_nearest() -> None:
    assert "did you mean 'judge_scenes_bt'?" in messages("judge_scene_bt")


def test_levels_are_ordered() -> None:
    text = messages("judge_scenes_timed", "noise.min_level=0.9", "noise.max_level=0.2")
    assert "min_level must be under max_level" in text


# --- the shipped ones ---


def test_the_list() -> None:
    assert list(shipped_judges()) == ["judge_scenes_bt", "judge_scenes_timed"]


@pytest.mark.parametrize("name", sorted(shipped_judges()))
def test_shipped_recipes_load_from_files_of_the_package(name: str) -> None:
    recipe = load_fit_recipe(name)
    assert recipe.judge.folder.is_dir() and (recipe.noise is None) == (name == "judge_scenes_bt")
    assert next(iter(recipe.source())).layout == "pair"
    assert load_fit_recipe(name).fingerprint() == recipe.fingerprint()
    assert load_fit_recipe(name, ["seed=1"]).fingerprint() != recipe.fingerprint()
    elsewhere = load_fit_recipe(name, ["output_dir=x"])
    assert elsewhere.fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize("name", sorted(shipped_judges()))
def test_shipped_recipes_say_how_to_run_them_and_why_each_number(name: str) -> None:
    lines = shipped_judges()[name].read_text().splitlines()
    header = lines[: lines.index("")]
    assert len(lines) <= 60 and all(line.startswith("#") for line in header)
    text = "\n".join(header)
    for part in ("# Data:", "# Run:", "# Hardware:", "# Cost:"):
        assert part in text
    assert re.search(rf"t2i-align judges fit {name}$", text, re.MULTILINE)
    for line in lines[len(header) :]:
        key, _, rest = line.partition(":")
        if rest.strip() and key.strip() not in {"output_dir", "type"}:
            assert "  # " in rest, line


def test_a_recipe_survives_writing_and_reading(tmp_path: Path) -> None:
    import json

    recipe = load_fit_recipe("judge_scenes_timed")
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.to_dict()))
    assert load_fit_recipe(tmp_path / "r.yaml") == recipe


def test_the_size_is_a_centre_crop() -> None:
    from t2i_align.judges.fit_data import picture

    wide = torch.zeros(3, 8, 24)
    wide[:, :, 8:16] = 1.0
    found: Tensor = picture(Media("image", wide), 8)
    assert found.shape == (3, 8, 8) and bool((found == 255).all())
