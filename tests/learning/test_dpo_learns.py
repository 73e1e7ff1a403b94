"""DPO raises the true reward on generators whose optimum is known, and does not when labels are
shuffled.

Plane: a flow is first fitted by ``sft`` to a standard normal; pairs are then labelled by the first
    coordinate. The
optimum of DPO tilts the density towards larger x, so the mean of x over samples must rise; with
coin-flip labels the tilt is zero. Both runs see the same points, noise and order.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t2i_align.generators.token_lm import TokenLM, TokenLMOptions
from t2i_align.generators.voxel_flow import VoxelFlow, VoxelFlowOptions
from tests import runs
from tests.tiny import llama_folder


def sample_points(model: Path, num: int = 512) -> torch.Tensor:
    """``(num, 2)`` samples of a saved flow, from fixed noise."""
    flow = VoxelFlow(VoxelFlowOptions(name_or_path=str(model)))
    flow.load_module(0, reference=False)
    inputs = flow.prepare_sampling(["p"] * num, num_steps=20, guidance=1.0)
    return flow.rollout(inputs, torch.arange(num), "policy").sample.state["x0"].view(num, 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow fitted to N(0, I) by the suite's own ``sft``."""
    folder = tmp_path_factory.mktemp("plane")
    model = runs.point_model(folder / "init")
    data = runs.point_pairs(folder / "sft.jsonl", 1500, seed=1, shuffled=True)
    sections = runs.voxel_sections(
        model, data, folder / "cache", learning_rate=2e-3, train_batch_size=128, max_train_steps=250
    )
    sections["objective"] = {"type": "sft"}
    runs.train(folder, "sft", sections)
    return folder / "sft"


def test_sft_fits_the_normal(base: Path) -> None:
    x = sample_points(base)
    assert x.mean(0).abs().max().item() < 0.2
    assert x.std(0).tolist() == pytest.approx([1, 1], abs=0.2)


def test_dpo_on_a_plane_and_its_shuffled_control(base: Path, tmp_path: Path) -> None:
    gain = {}
    before = sample_points(base)[:, 0]
    for name, shuffled in (("true", False), ("shuffled", True)):
        data = runs.point_pairs(tmp_path / f"{name}.jsonl", 1000, seed=2, shuffled=shuffled)
        sections = runs.voxel_sections(
            base,
            data,
            tmp_path / "cache",
            learning_rate=3e-4,
            train_batch_size=64,
            max_train_steps=120,
        )
        runs.train(tmp_path, name, sections)
        after = sample_points(tmp_path / name)[:, 0]
        gain[name] = ((after - before).mean() / ((after - before).std() / math.sqrt(512))).item()
        gain[f"{name} mean"] = (after - before).mean().item()
    assert gain["true mean"] > 0.3 and gain["true"] > 10
    assert abs(gain["shuffled mean"]) < 0.15
    accuracies = runs.losses(tmp_path / "true", "rewards/accuracies")
    assert np.mean(accuracies[-20:]) > 0.6
    noise = runs.losses(tmp_path / "shuffled", "rewards/accuracies")
    assert abs(np.mean(noise[-20:]) - 0.5) < 0.1


def codes_file(path: Path, num: int, *, shuffled: bool) -> Path:
    """Two random code sequences a record.

    The one with more codes below 16 wins (or a coin decides).
    """
    rng = np.random.default_rng(4)
    rows: list[dict[str, Any]] = []
    while len(rows) < num:
        a, b = rng.integers(0, 32, size=(2, 8))
        low = int((a < 16).sum()) - int((b < 16).sum())
        if low == 0:
            continue
        first = rng.random() < 0.5 if shuffled else low > 0
        w, l = (a, b) if first else (b, a)  # noqa: E741
        rows.append(
            {"id": str(len(rows)), "prompt": "say", "chosen": w.tolist(), "rejected": l.tolist()}
        )
    return runs.write_jsonl(path, rows)


def test_dpo_on_tokens_and_its_shuffled_control(tmp_path: Path) -> None:
    """P(code < 16) of fresh samples rises from one half.

    Not with coin-flip labels. LoRA, adapters-off reference.
    """
    model = llama_folder(tmp_path / "llama")
    share = {}
    for name, shuffled in (("true", False), ("shuffled", True)):
        data = codes_file(tmp_path / f"{name}.jsonl", 600, shuffled=shuffled)
        sections = {
            "model": {
                "type": "token_lm",
                "name_or_path": str(model),
                "num_codes": 32,
                "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
            },
            "objective": {"type": "dpo", "beta": 0.3},
            "data": {"type": "trl", "path": str(data), "media": "codes"},
            "cache": {"dir": str(tmp_path / "cache")},
            "train": {
                "report_to": "none",
                "lr_scheduler": "constant",
                "learning_rate": 5e-3,
                "train_batch_size": 32,
                "max_train_steps": 60,
            },
        }
        runs.train(tmp_path, name, sections)
        share[name] = low_share(model, tmp_path / name)
    assert abs(low_share(model, None) - 0.5) < 0.1
    assert share["true"] > 0.65
    assert abs(share["shuffled"] - 0.5) < 0.1


def low_share(model: Path, adapter: Path | None) -> float:
    """Share of codes below 16 among the first eight of 64 samples."""
    from peft import PeftModel

    lm = TokenLM(TokenLMOptions(name_or_path=str(model), num_codes=32))
    lm.load_module(0, reference=False)
    if adapter is not None:  # a stock peft loader reads the exported adapter
        loaded: Any = PeftModel.from_pretrained(lm.module, str(adapter))
        lm.views.module = loaded
    inputs = lm.prepare_sampling(["say"] * 64, num_steps=8, guidance=1.0)
    sample = lm.rollout(inputs, torch.arange(64), "policy").sample
    codes = torch.cat([m.data for m in lm.decode(sample)])
    return (codes < 16).float().mean().item()
