"""The bundled world models: stock pipeline folders, small, and readable by the exact judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t2i_align.evaluate.pictures import STREAM
from t2i_align.evaluate.sampling import defaults, sample
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_folder import local_path
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.process.seeds import derive, normals
from t2i_align.scenes.grammar import fixed_prompts
from t2i_align.scenes.pairs import verdicts

NAME, FLOW = "bundled/scenes_sdxl", "bundled/scenes_sd3"
BUDGET = {NAME: 15_000_000, FLOW: 12_000_000}
LENGTH = {NAME: None, FLOW: 16}  # zeros in the place of SD3's absent T5


def generator(name: str) -> DiffusersGenerator:
    options = DiffusersOptions(name_or_path=name, resolution=64, max_sequence_length=LENGTH[name])
    made = DiffusersGenerator(options)
    made.load_module(0, reference=False)
    return made


@pytest.mark.parametrize("name", [NAME, FLOW])
def test_it_is_small_and_loads_in_plain_diffusers(name: str) -> None:
    from diffusers import DiffusionPipeline

    files = [f for f in local_path(name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= BUDGET[name]
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pkl")]
    absent = {} if LENGTH[name] is None else {"text_encoder_3": None, "tokenizer_3": None}
    pipe: Any = DiffusionPipeline.from_pretrained(local_path(name), **absent)  # as in docs
    pipe.set_progress_bar_config(disable=True)
    parts = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    assert {p.dtype for m in parts for p in m.parameters()} == {torch.float32}
    g = generator(name)
    inputs = g.prepare_sampling(["a photo of a red car"], num_steps=4, guidance=3.0)
    ours = g.decode(g.rollout(inputs, torch.tensor([5]), "policy").sample)[0].data
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    if LENGTH[name] is not None:
        call |= {"max_sequence_length": LENGTH[name], "height": 64, "width": 64}
    latents = normals(torch.tensor([5]), inputs.shape)
    theirs = pipe("a photo of a red car", latents=latents, **call)
    assert (ours - theirs.images[0]).abs().max().item() <= 1e-5


@pytest.mark.parametrize("name", [NAME, FLOW])
def test_it_draws_what_is_asked_and_composes_imperfectly(name: str) -> None:
    """Coloured objects mostly right, relations mostly not: there is something to align."""
    items = fixed_prompts(24, 1, held_out=True)
    right: dict[str, list[bool]] = {}
    for task in ("colors", "position"):
        part = [item for item in items if item[0]["tag"] == task]
        prompts = [m["prompt"] for m, _ in part]
        seeds = [derive(0, m["prompt"], k, STREAM) for m, k in part]
        pictures = sample(generator(name), prompts, seeds, defaults("scenes"))
        right[task] = [verdicts([p], m)[0][0] for p, (m, _) in zip(pictures, part, strict=True)]
    assert np.mean(right["colors"]) > 0.5 > np.mean(right["position"])


def test_an_sd3_of_the_world_reads_prompts_as_its_sdxl_does(tmp_path: Path) -> None:
    """The same towers side by side, both pooled vectors, then zeros for the absent T5."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline

    from t2i_align.scenes.build import new_sd3

    folder = new_sd3(NAME, tmp_path / "sd3")
    assert sum(f.stat().st_size for f in (folder / "transformer").rglob("*")) / 2 < 9e6  # float16
    absent: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    sd3: Any = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    sdxl: Any = StableDiffusionXLPipeline.from_pretrained(local_path(NAME), dtype=torch.float32)
    text = "a photo of a red car"
    joint, _, pooled, _ = sd3.encode_prompt(text, None, None, max_sequence_length=16)
    hidden, _, second, _ = sdxl.encode_prompt(text)
    assert joint.shape == (1, 32, hidden.shape[-1])
    assert torch.allclose(joint[:, :16], hidden, atol=1e-5) and not joint[:, 16:].any()
    assert torch.allclose(pooled[:, -second.shape[-1] :], second, atol=1e-5)
    image = sd3(text, num_inference_steps=1, height=64, width=64, max_sequence_length=16).images[0]
    assert image.size == (64, 64)
