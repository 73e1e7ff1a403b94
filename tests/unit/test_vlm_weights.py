"""The bundled weights of ``scenes_vlm``: they see, and order pictures as the exact judge does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_align.catalog import find_root
from t2i_align.contract import Media
from t2i_align.judges.base import judge_card, load
from t2i_align.judges.vqa_score import VQAScore
from t2i_align.scenes.grammar import fixed_prompts, scene_for
from t2i_align.scenes.render import render
from t2i_align.scenes.vlm_report import vqa_accuracy

FOLDER = find_root() / "reward_models" / "scenes_vlm"


@pytest.fixture(scope="module")
def judge() -> VQAScore:
    found = load("scenes_vlm")
    assert isinstance(found, VQAScore)
    return found


def test_the_folder_is_small_and_safe() -> None:
    assert sum(f.stat().st_size for f in FOLDER.rglob("*")) <= 6e6
    assert {f.suffix for f in FOLDER.iterdir()} <= {
        ".yaml",
        ".json",
        ".jinja",
        ".safetensors",
        ".md",
    }


def test_accuracy_on_held_out_prompts_is_what_the_card_says(judge: VQAScore) -> None:
    """30 questions a task, so within three standard errors below the card's figure."""
    said = judge_card("scenes_vlm").details["vqa_accuracy"]
    found = vqa_accuracy(judge.ask, per_task=30, seed=1)
    for name in ("overall", "figure"):
        slack = 3 * (said[name] * (1 - said[name]) / 180) ** 0.5 + 0.01
        assert found[name]["mean"] > said[name] - slack, name
    assert min(found["tasks"][t]["mean"] for t in ("single_object", "two_object")) > 0.8


def test_a_render_scores_higher_than_an_empty_picture_and_noise(judge: VQAScore) -> None:
    rng = np.random.default_rng(0)
    items = [m for m, _ in fixed_prompts(8, 2, held_out=False)]
    own = [render(scene_for(m, rng), rng) for m in items]
    for other in (np.full((64, 64, 3), 138, np.uint8), rng.integers(0, 256, (64, 64, 3), np.uint8)):
        pictures = [*own, *[other] * len(own)]
        media = [Media("image", torch.from_numpy(p).permute(2, 0, 1) / 255) for p in pictures]
        scores = judge.score(media, [m["prompt"] for m in items] * 2).values.view(2, -1)
        assert (scores[0] > scores[1]).float().mean() > 0.85


def test_generated_answers_are_one_word_of_the_world(judge: VQAScore) -> None:
    rng = np.random.default_rng(0)
    metadata = fixed_prompts(1, 0, held_out=False)[0][0]
    image = Image.fromarray(render(scene_for(metadata, rng), rng))
    inputs = judge.inputs([image], ["Is there a car in the picture?"])
    out = judge.model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    answer, end = judge.tokenizer.convert_ids_to_tokens(out.tolist())
    assert answer in ("yes", "no") and end == "</s>"
