"""Folders of pipelines: what identifies their parts, and names of bundled models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2i_align.errors import ModelError
from t2i_align.generators import diffusers_folder as folders
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.layouts import vae_blocks
from tests.tiny import pipeline_folder


def test_fingerprint_is_of_content_not_of_history(tmp_path: Path) -> None:
    """Saving a part again elsewhere keeps the cache; another weight or setting does not."""
    folder = pipeline_folder("sdxl", tmp_path / "a")
    first = folders.fingerprint(folder, ["vae"])
    config = folder / "vae" / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"_name_or_path": "x", "_diffusers_version": "9"}))
    assert folders.fingerprint(folder, ["vae"]) == first
    config.write_text(json.dumps(facts | {"scaling_factor": 0.5}))
    assert folders.fingerprint(folder, ["vae"]) != first
    config.write_text(json.dumps(facts))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert folders.fingerprint(folder, ["vae"]) != first


def test_missing_and_unknown_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no diffusers pipeline at '.*nowhere'"):
        folders.find_folder(str(tmp_path / "nowhere"), None, None, download=True)
    with pytest.raises(ModelError, match="no diffusers pipeline at 'bundled/nothing'"):
        folders.find_folder("bundled/nothing", None, None, download=True)
    with pytest.raises(
        ModelError, match="not on this machine and its architecture is not built in"
    ):
        folders.describe(DiffusersOptions(name_or_path="someone/something"))
    other = tmp_path / "model_index.json"
    other.write_text(json.dumps({"_class_name": "WuerstchenPipeline"}))
    with pytest.raises(
        ModelError, match="no family for pipeline class WuerstchenPipeline; known: "
    ):
        folders.family(json.loads(other.read_text()), DiffusersOptions(name_or_path="x"))


def test_training_can_start_from_the_denoiser_of_an_earlier_run(tmp_path: Path) -> None:
    """Policy and reference both are the other weights, not the pipeline's."""
    import torch

    from t2i_align.generators.diffusers_family import DiffusersGenerator

    folder = pipeline_folder("sdxl", tmp_path / "base")
    plain = DiffusersGenerator(DiffusersOptions(name_or_path=str(folder)), "cpu")
    plain.load_module(0, reference=False)
    with torch.no_grad():
        for p in plain.module.parameters():
            p.add_(0.25)
    plain.export(str(tmp_path / "run"))
    options = DiffusersOptions(
        name_or_path=str(folder), denoiser_name_or_path=str(tmp_path / "run" / "unet")
    )
    second = DiffusersGenerator(options, "cpu")
    second.load_module(0, reference=True)
    for view in ("policy", "reference"):
        with second.views.use(view) as net:
            assert all(
                torch.equal(a, b)
                for a, b in zip(net.parameters(), plain.module.parameters(), strict=True)
            )
    nowhere = options.model_copy(update={"denoiser_name_or_path": str(tmp_path / "no")})
    with pytest.raises(ModelError, match=r"denoiser_name_or_path: no weights of a UNet2D"):
        DiffusersGenerator(nowhere, "cpu").load_module(0, reference=False)


def test_a_text_length_is_refused_where_the_pipeline_has_none(tmp_path: Path) -> None:
    from t2i_align.generators.diffusers_family import DiffusersGenerator

    def asking(family: str) -> DiffusersOptions:
        folder = str(pipeline_folder(family, tmp_path / family))
        return DiffusersOptions(name_or_path=folder, resolution=32, max_sequence_length=16)

    with pytest.raises(ModelError, match="max_sequence_length: StableDiffusionXLPipeline does not"):
        DiffusersGenerator(asking("sdxl"), "cpu").encode_prompts(["a cat"])
    sd3 = asking("sd3")
    (short,) = DiffusersGenerator(sd3, "cpu").encode_prompts(["a cat"])
    whole = sd3.model_copy(update={"max_sequence_length": None})
    (long,) = DiffusersGenerator(whole, "cpu").encode_prompts(["a cat"])
    lengths = [c["encoder_hidden_states"].shape[0] for c in (short, long)]
    assert lengths[1] - lengths[0] == 256 - 16


def test_vae_factor_is_read_from_its_config(tmp_path: Path) -> None:
    def factor(folder: Path | None) -> tuple[int, int]:
        return vae_blocks(folders.vae_config(folder))

    assert factor(None) == (8, 1) and factor(tmp_path) == (8, 1)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8, 8]}))
    assert factor(tmp_path) == (4, 1)


def test_schedulers_without_betas_are_refused() -> None:
    """Playground v2.5 is an SDXL pipeline on continuous sigmas; DDPM's defaults would be wrong."""
    from t2i_align.process.schedule import vp_from_scheduler

    edm = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80.0}
    with pytest.raises(ModelError, match="EDMDPMSolverMultistepScheduler has no betas"):
        vp_from_scheduler(edm)


def test_missing_weights_and_variants_are_named(tmp_path: Path) -> None:
    from t2i_align.generators.diffusers_family import DiffusersGenerator

    folder = pipeline_folder("sd", tmp_path / "sd")
    options = DiffusersOptions(name_or_path=str(folder), resolution=64, variant="fp99")
    with pytest.raises(ModelError, match="cannot load the unet of"):
        DiffusersGenerator(options).load_module(0, reference=False)
