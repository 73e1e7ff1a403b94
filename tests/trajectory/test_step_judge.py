"""SPO as published: its judge is fitted on decoded predictions and told the level of each step.

``judges fit`` with the bundled model's predictions makes the judge; ``train`` on a real SDXL
pipeline asks it about predictions of the clean picture, with the level they were made at.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from t2i_align.catalog import find_root, read_card
from t2i_align.judges.fit_recipe import load_fit_recipe
from t2i_align.judges.fit_run import fit_judge
from t2i_align.judges.timed_clip import TimedClip, TimedClipOptions
from tests import runs
from tests.judged_points import judge_by
from tests.tiny import pipeline_folder

PAIRS, STEPS = 30, 4


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge fitted for some steps on predictions."""
    folder = tmp_path_factory.mktemp("judge")
    pairs = pq.read_table(find_root() / "datasets/scenes/pairs_repairs.parquet").slice(0, PAIRS)
    pq.write_table(pairs, folder / "some.parquet")
    edits = [f"data.path={folder}/some.parquet", f"output_dir={folder}/timed"]
    edits += ["fit.max_train_steps=3", "fit.train_batch_size=8", "fit.held_out=0.2"]
    result = fit_judge(load_fit_recipe("judge_scenes_timed", edits), console=Console(quiet=True))
    assert result["pairs"]["train"] + result["pairs"]["held_out"] == PAIRS
    return folder / "timed"


def opened(folder: Path) -> TimedClip:
    """The judge of a folder that ``judges fit`` wrote."""
    options = read_card(folder / "card.yaml").details["options"]
    given = TimedClipOptions.model_validate(options)
    return TimedClip(folder, given, torch.device("cpu"), torch.float32)


def spo(folder: Path, rollout: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a tiny SDXL; one round, two steps."""
    model = pipeline_folder("sdxl", folder / "sdxl")
    return {
        "model": {"name_or_path": str(model), "resolution": 64, "lora": {"r": 2, "lora_alpha": 2}},
        "objective": {"type": "spo"},
        "data": {"type": "none"},
        "rollout": {"judge": "jpeg", "prompts": ["a photo of a red car"], **rollout},
        "train": {"report_to": "none", "max_train_steps": 2, "train_batch_size": 2},
    }


def test_the_judge_of_predictions_is_told_every_step(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, asked = opened(fitted), []
    own = judge.score

    def score(media: Any, prompts: Any) -> Any:
        found = own(media, prompts)
        asked.append(({float(m.meta["level"]) for m in media}, found.values, media, prompts))
        return found

    monkeypatch.setattr(judge, "score", score)
    judge_by(monkeypatch, judge)
    rollout = {"num_inference_steps": STEPS, "num_candidates": 2, "divert_start_step": 1}
    rollout |= {"threshold": 0.0, "prompts_per_round": 2, "batch_size": 2, "guidance_scale": 3.0}
    runs.train(tmp_path, "spo", spo(tmp_path, rollout))
    levels = [level for found, *_ in asked for level in found]
    assert all(len(found) == 1 for found, *_ in asked)  # one step at a time
    assert len(set(levels)) == STEPS - 2  # the first is not judged, the last has no noise
    assert 0 <= min(levels) < max(levels) < 1
    seen = json.loads((tmp_path / "spo" / "rollouts.jsonl").read_text().splitlines()[0])
    values = torch.cat([v for _, v, *_ in asked])
    assert values.isfinite().all() and values.std() > 0
    assert seen["judge/std"] > 0
    _, values, media, prompts = asked[0]
    flat = [replace(m, meta={**m.meta, "level": 0.0}) for m in media]
    assert not torch.equal(own(flat, prompts).values, values)  # the level is heard
