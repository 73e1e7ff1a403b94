"""The main job end to end, by the command line.

SDXL LoRA DPO on Pick-a-Pic-shaped data, loaded by stock diffusers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests import runs
from tests.tiny import pipeline_folder


def test_sdxl_lora_dpo_on_pickapic_columns(tmp_path: Path) -> None:
    """200 pairs, 20 ties, two truncated JPEGs.

    Then ``load_lora_weights`` reproduces our own picture.
    """
    from diffusers import StableDiffusionXLPipeline

    from t2i_align.generators.diffusers_family import DiffusersGenerator
    from t2i_align.generators.diffusers_options import DiffusersOptions
    from t2i_align.process.seeds import normals
    from t2i_align.rollout.generate import load_weights

    model = pipeline_folder("sdxl", tmp_path / "sdxl")
    data = runs.pickapic(tmp_path / "pairs.parquet", 222, broken=(5, 17), ties=range(100, 120))
    recipe = runs.write_recipe(
        tmp_path,
        "run",
        {
            "model": {
                "name_or_path": str(model),
                "resolution": 64,
                "lora": {"r": 4, "lora_alpha": 8},
            },
            "objective": {"type": "dpo", "beta": 500.0},
            "data": {"type": "pickapic", "path": str(data)},
            "cache": {"dir": str(tmp_path / "cache")},
            "train": {"learning_rate": 1e-3, "train_batch_size": 8, "max_train_steps": 12},
            "validation": {
                "prompts": ["a cat", "a dog"],
                "num_inference_steps": 2,
                "validation_steps": 6,
            },
        },
    )
    command = [sys.executable, "-m", "t2i_align", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    report = summary["data"]
    assert (report["usable"], report["ties"], report["num_skipped"]) == (200, 20, 2)
    assert sorted(name for name, _ in report["skipped"]) == ["17", "5"]
    assert abs(runs.losses(tmp_path / "run")[0] - 0.6931472) < 1e-6
    assert (tmp_path / "run" / "samples" / "step-00000012.png").is_file()
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))

    pipe: Any = StableDiffusionXLPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    latents = normals(torch.tensor([9]), (4, 8, 8))
    call = {"prompt": ["a cat"], "height": 64, "width": 64, "num_inference_steps": 3}
    base = pipe(**call, guidance_scale=4.0, latents=latents, output_type="pt").images
    pipe.load_lora_weights(tmp_path / "run")
    theirs = pipe(**call, guidance_scale=4.0, latents=latents, output_type="pt").images
    assert (base - theirs).abs().max().item() > 1e-3
    scaling = next(iter(pipe.unet.peft_config.values())).lora_alpha
    assert scaling == 8  # alpha travels in the file's metadata

    g = DiffusersGenerator(
        DiffusersOptions.model_validate({"name_or_path": str(model), "resolution": 64})
    )
    load_weights(g, str(tmp_path / "run"), None)
    inputs = g.prepare_sampling(["a cat"], num_steps=3, guidance=4.0)
    ours = g.decode(g.rollout(inputs, torch.tensor([9]), "policy").sample)[0].data
    assert (ours - theirs[0]).abs().max().item() <= 1e-5
