"""Fitting a judge: it learns what pairs say and nothing from a coin, and a stop changes nothing."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from t2i_align.catalog import read_card
from t2i_align.contract import Media
from t2i_align.errors import InterruptedRun, OutputError
from t2i_align.judges.dual_encoder import DualEncoder, DualEncoderOptions
from t2i_align.judges.fit_recipe import FitRecipe, load_fit_recipe
from t2i_align.judges.fit_run import fit_judge
from t2i_align.judges.timed_clip import TimedClip, TimedClipOptions
from t2i_align.scenes.clip_model import export, word_tokenizer
from t2i_align.scenes.grammar import COLORS
from t2i_align.scenes.render import CLASSES

CPU, QUIET = torch.device("cpu"), Console(quiet=True)
SIDE, PAIRS = 16, 240
RGB = dict(zip(COLORS, np.random.default_rng(5).integers(0, 256, (len(COLORS), 3)), strict=True))


def picture(color: str, rng: np.random.Generator) -> bytes:
    """One colour, with noise."""
    pixels = RGB[color] + rng.normal(0, 12, (SIDE, SIDE, 3))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in which the colour of the prompt wins, and a tiny untrained open_clip folder."""
    from open_clip.model import CLIP

    folder, rng = tmp_path_factory.mktemp("fit"), np.random.default_rng(0)
    rows = []
    for number in range(PAIRS):
        right, wrong = rng.choice(COLORS, 2, replace=False)
        label = float(rng.integers(2)) if number % 12 else 0.5
        order = (right, wrong) if label == 1 else (wrong, right)
        rows.append(
            {
                "caption": f"a photo of a {right} {rng.choice(CLASSES)}",
                "jpg_0": picture(order[0], rng),
                "jpg_1": picture(order[1] if label != 0.5 else order[0], rng),
                "label_0": label,
                "ranking_id": number,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    tok = word_tokenizer()
    text = {"context_length": 12, "vocab_size": len(tok), "width": 48, "heads": 2, "layers": 1}
    text |= {"pool_type": "eos", "eos_id": tok.eos_token_id, "hf_tokenizer_name": "."}
    vision = {"image_size": SIDE, "layers": 1, "width": 48, "head_width": 24, "patch_size": 8}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    build: Any = CLIP
    export(build(**config).state_dict(), tok, folder / "clip")
    found = json.loads((folder / "clip/open_clip_config.json").read_text())
    found["model_cfg"] = config
    found["preprocess_cfg"]["size"] = SIDE
    (folder / "clip/open_clip_config.json").write_text(json.dumps(found))
    return folder


def recipe(place: Path, out: str, *more: str) -> FitRecipe:
    text = {
        "output_dir": str(place / out),
        "judge": {"path": str(place / "clip")},
        "data": {"type": "pickapic", "path": str(place / "pairs.parquet"), "ties": "keep"},
        "fit": {
            "learning_rate": 4e-3,
            "max_train_steps": 50,
            "lr_warmup_steps": 5,
            "held_out": 0.25,
            "learn_temperature": True,
        },
    }
    (place / "recipe.yaml").write_text(json.dumps(text))
    return load_fit_recipe(place / "recipe.yaml", more)


def weights(folder: Path, name: str = "open_clip_model.safetensors") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- learning ---


@pytest.fixture(scope="module")
def fitted(place: Path) -> dict[str, Any]:
    return fit_judge(recipe(place, "fitted"), console=QUIET)


def test_a_fit_raises_the_accuracy_also_on_prompts_held_out(fitted: dict[str, Any]) -> None:
    before, after = fitted["accuracy_before"], fitted["accuracy"]
    assert max(before.values()) < 0.75
    assert after["train"] > 0.9 and after["held_out"] > 0.85
    assert fitted["pairs"]["train"] + fitted["pairs"]["held_out"] == PAIRS


def test_from_a_coins_labels_nothing_is_learned(place: Path, fitted: dict[str, Any]) -> None:
    """Held-out pairs keep their labels, so they would show it."""
    result = fit_judge(recipe(place, "coin", "data.shuffle_labels=true"), console=QUIET)
    assert result["pairs"] == fitted["pairs"]
    assert result["accuracy"]["held_out"] < 0.65


def test_a_fit_from_scratch_learns_too(place: Path) -> None:
    given = ("judge.weights=scratch", "seed=3", "fit.max_train_steps=60")
    result = fit_judge(recipe(place, "scratch", *given), console=QUIET)
    assert result["accuracy"]["held_out"] > 0.8


def test_the_folder_is_a_judge_by_its_card(place: Path, fitted: dict[str, Any]) -> None:
    card = read_card(place / "fitted/card.yaml")
    options = DualEncoderOptions.model_validate(card.details["options"])
    judge = DualEncoder(place / "fitted", options, CPU, torch.float32)
    rng = np.random.default_rng(9)
    colors = list(COLORS)
    media = [Media("image", picture(c, rng)) for c in colors]
    table = torch.stack(
        [
            judge.score(media, [f"a photo of a {c} {CLASSES[0]}"] * len(colors)).values
            for c in colors
        ]
    )
    assert (table.argmax(1) == torch.arange(len(colors))).float().mean() > 0.6
    begun = weights(place / "clip")["logit_scale"].float()
    assert weights(place / "fitted")["logit_scale"] != begun  # the temperature is part of it


# --- the noise level ---


def test_told_the_level_a_judge_orders_noisy_pictures_better(place: Path) -> None:
    """From the same start, on the same noisy pairs: conditioned and trained against untrained."""
    given = ("judge.type=timed_clip", "judge.width=32", "noise.max_level=0.7")
    result = fit_judge(recipe(place, "timed", *given), console=QUIET)
    assert result["accuracy"]["held_out"] > result["accuracy_before"]["held_out"] + 0.15
    card = read_card(place / "timed/card.yaml")
    options = TimedClipOptions.model_validate(card.details["options"])
    judge = TimedClip(place / "timed", options, CPU, torch.float32)
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    clean, noisy = (judge.score_tensor(pixels, ["a photo of a car"] * 2, v) for v in (0.0, 0.6))
    assert (clean - noisy).abs().min() > 1e-3


def test_modulation_alone_leaves_the_base_as_it_was(place: Path) -> None:
    given = ("judge.type=timed_clip", "judge.train=modulation", "judge.width=32", "noise={}")
    few = ("fit.max_train_steps=4", "fit.learn_temperature=false")
    fit_judge(recipe(place, "modulation", *given, *few), console=QUIET)
    base, after = weights(place / "clip"), weights(place / "modulation")
    assert same({k: v.float() for k, v in base.items()}, after)
    timed = weights(place / "modulation", "timed.safetensors")
    assert all(v.abs().sum() > 0 for k, v in timed.items() if k.startswith("layers"))


def test_what_a_generator_makes_of_noise_can_be_given(place: Path) -> None:
    """Both pictures of a pair get one level and one seed; what comes back is what is judged."""
    seen = []

    def degrade(
        pixels: torch.Tensor, level: torch.Tensor, seeds: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        assert len(prompts) == len(pixels) and all("photo" in p for p in prompts)
        seen.append((level, seeds))
        return pixels.mean((2, 3), keepdim=True).expand_as(pixels)

    given = ("judge.type=timed_clip", "judge.width=32", "noise={}", "fit.max_train_steps=2")
    fit_judge(recipe(place, "given", *given), console=QUIET, degrade=degrade)
    level, seeds = seen[-1]
    assert torch.equal(*level.chunk(2)) and torch.equal(*seeds.chunk(2))
    assert level.unique().numel() == len(level) // 2


# --- stopping ---


@pytest.mark.parametrize("timed", [False, True])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(place: Path, timed: bool) -> None:
    given = ["fit.max_train_steps=6", "fit.logging_steps=1", "judge.batch_norm=train"]
    given += ["judge.type=timed_clip", "judge.width=32", "noise={}"] if timed else []
    whole = recipe(place, f"whole{timed}", *given)
    parts = recipe(place, f"parts{timed}", *given)
    expected = fit_judge(whole, console=QUIET)
    with pytest.raises(InterruptedRun, match="stopped; step 1 of 6 is saved"):
        fit_judge(parts, console=QUIET, stop=lambda: True)
    answers = iter([False, True])
    with pytest.raises(InterruptedRun, match="step 3 of 6"):
        fit_judge(parts, console=QUIET, stop=lambda: next(answers))
    found = fit_judge(parts, console=QUIET)
    assert {k: v for k, v in found.items() if k != "seconds"} == {
        k: v for k, v in expected.items() if k != "seconds"
    }
    a, b = Path(whole.output_dir), Path(parts.output_dir)
    assert same(weights(a), weights(b))
    assert not timed or same(weights(a, "timed.safetensors"), weights(b, "timed.safetensors"))
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()


def test_a_folder_of_another_run_is_not_touched(place: Path) -> None:
    short = ("fit.max_train_steps=3",)
    with pytest.raises(InterruptedRun):
        fit_judge(recipe(place, "mine", *short), console=QUIET, stop=lambda: True)
    with pytest.raises(OutputError, match="unfinished run of another recipe"):
        fit_judge(recipe(place, "mine", *short, "seed=1"), console=QUIET)
    fit_judge(recipe(place, "mine", *short), console=QUIET)
    with pytest.raises(OutputError, match="holds a fitted judge"):
        fit_judge(recipe(place, "mine", *short), console=QUIET)
    (place / "other").mkdir()
    (place / "other/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty and no run of this kind"):
        fit_judge(recipe(place, "other", *short), console=QUIET)


def test_the_verb_runs_a_recipe_and_says_what_came_out(place: Path) -> None:
    import typer
    from typer.testing import CliRunner

    from t2i_align.cli.judges_fit import fit

    app = typer.Typer()
    app.command()(fit)
    recipe(place, "verb")
    more = ["fit.max_train_steps=2", "fit.logging_steps=1", "--device", "cpu"]
    run = CliRunner().invoke(app, [str(place / "recipe.yaml"), *more])
    assert run.exit_code == 0, run.output
    assert "held out; at the start train accuracy" in run.output
    assert "step 2/2: loss" in run.output
    assert json.loads((place / "verb/result.json").read_text())["steps"] == 2


def test_pictures_of_several_sizes_need_a_size(place: Path) -> None:
    from t2i_align.data.records import Item, Record
    from t2i_align.errors import DataError
    from t2i_align.judges.fit_data import Pairs, read_pairs

    items = tuple(Item(Media("image", torch.zeros(3, 8, s)), "a car") for s in (8, 12))

    @dataclasses.dataclass
    class Source:
        stats: Any = dataclasses.field(
            default_factory=lambda: dataclasses.make_dataclass(
                "Stats", [("skipped", list, dataclasses.field(default_factory=list))]
            )()
        )

        def __iter__(self) -> Any:
            return iter([Record("r", "pair", items)])

    with pytest.raises(DataError, match=r"'r' has pictures of .*(?s:.*)set size to a number"):
        read_pairs(Source(), "best_worst", None)
    records, skipped = read_pairs(Source(), "best_worst", 6)
    assert Pairs(records, 6, 0).batch([(0, 0)]).pixels.shape == (2, 3, 6, 6) and not skipped
