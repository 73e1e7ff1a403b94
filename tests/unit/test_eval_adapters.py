"""An adapter on top of the evaluated model, and what the number of threads may change."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from t2i_align.cli import build_app
from t2i_align.evaluate.run import Request, run
from t2i_align.evaluate.sampling import Model, defaults
from t2i_align.evaluate.work import spread
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions

BUNDLED = "bundled/scenes_sdxl"
RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def adapter(folder: Path, scale: float) -> Path:
    """A LoRA of rank 2 on the bundled model, as training exports it."""
    options = {"name_or_path": BUNDLED, "resolution": 64, "lora": {"r": 2, "lora_alpha": 2}}
    generator = DiffusersGenerator(DiffusersOptions.model_validate(options), "cpu")
    generator.load_module(0, reference=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in generator.module.named_parameters():
            if "lora_" in name:
                value.copy_(scale * torch.randn(value.shape))
    generator.export(str(folder))
    return folder


def pixels(out: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted(out.rglob("*.png"))]).astype(int)


def test_a_lora_is_loaded_named_and_compared(tmp_path: Path) -> None:
    """Of zeros it changes no bit; another one changes pictures and the hash, not the protocol."""
    size = ["--per-task", "2", "--num-inference-steps", "2", "--num-threads", "1"]
    words = ["eval", "scenes", "--model", BUNDLED, *size]
    found = {}
    for name, scale in (("none", None), ("zero", 0.0), ("some", 0.5)):
        lora = [] if scale is None else ["--lora", str(adapter(tmp_path / f"l{name}", scale))]
        done = RUNNER.invoke(build_app(), [*words, *lora, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())
    shown = {name: pixels(tmp_path / name) for name in found}
    assert (shown["none"] == shown["zero"]).all() and (shown["none"] != shown["some"]).any()
    assert len({f["weights_sha256"] for f in found.values()}) == 3
    assert [bool(f["lora"]) for f in found.values()] == [False, True, True]
    assert found["none"]["protocol"] == found["some"]["protocol"]
    line = ["compare", str(tmp_path / "none"), str(tmp_path / "some")]
    told = RUNNER.invoke(build_app(), line)
    assert told.exit_code == 0 and "McNemar's exact test" in told.stdout
    other = RUNNER.invoke(build_app(), [*words, "--lora", str(tmp_path / "lsome"), "--out",
                                        str(tmp_path / "none")])  # fmt: skip
    assert other.exit_code != 0 and "weights_sha256" in other.output


def test_a_number_of_threads_holds_for_the_work_alone() -> None:
    """Afterwards, and where a reader stops in the middle, the caller's own number is back."""
    worker: Any = SimpleNamespace(draw=lambda piece: torch.get_num_threads(), answer=None)
    pieces: Any = ["one", "two"]
    before = torch.get_num_threads()
    drawn = list(spread(worker, "draw", pieces, num_threads=before + 1))
    assert drawn == [(piece, before + 1) for piece in pieces]
    assert torch.get_num_threads() == before
    stopped: Any = spread(worker, "draw", pieces, num_threads=before + 1)
    assert next(stopped) == ("one", before + 1)
    stopped.close()
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["autocast_bf16", "float32"])
def test_other_threads_round_otherwise_and_judge_alike(tmp_path: Path, precision: Any) -> None:
    """One thread against two: verdicts equal, pixels within 2 of 255."""
    sampling = replace(defaults("scenes"), num_inference_steps=2, batch_size=6, precision=precision)
    verdicts = []
    for threads in (1, 2):
        request = Request(
            "scenes",
            tmp_path / str(threads),
            {"per_task": 2},
            Model(BUNDLED),
            sampling=sampling,
            processes=(1, threads),
        )
        run(request, Console(file=io.StringIO()))
        rows = (tmp_path / str(threads) / "results.jsonl").read_text().splitlines()
        verdicts.append([json.loads(row)["correct"] for row in rows])
    assert verdicts[0] == verdicts[1] and len(verdicts[0]) == 12
    assert abs(pixels(tmp_path / "1") - pixels(tmp_path / "2")).max() <= 2
