"""An adapter none of whose layers the network has is an error, never a silent base model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.errors import ModelError
from t2i_align.export.adapter import Adapter, LowRank, write_adapter
from t2i_align.export.program import Request, export
from t2i_align.generators.diffusers_export import check_match, layer_name
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.rollout.generate import load_weights
from tests import export_runs, tiny


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny pipelines."""
    where = tmp_path_factory.mktemp("bases")
    return {f: tiny.pipeline_folder(f, where / f) for f in ("sd", "sdxl", "sd3")}


def loaded(base: Path, adapter: Path) -> DiffusersGenerator:
    """What ``generate --lora`` and ``eval --lora`` do."""
    g = DiffusersGenerator(DiffusersOptions(name_or_path=str(base), resolution=64))
    load_weights(g, str(adapter), None)
    return g


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        ("unet.a.attn1.to_q.lora_A.weight", "unet.a.attn1.to_q"),
        ("unet.a.attn1.to_q.lora.down.weight", "unet.a.attn1.to_q"),
        ("unet.a.attn1.processor.to_q_lora.up.weight", "unet.a.attn1.to_q"),
        ("unet.a.attn1.processor.to_out_lora.up.weight", "unet.a.attn1.to_out.0"),
        ("unet.a.attn1.to_out.0.lora.up.weight", "unet.a.attn1.to_out.0"),
        ("unet.a.to_q.lora_magnitude_vector", "unet.a.to_q"),
        ("text_encoder.x.q_proj.lora_linear_layer.down.weight", "text_encoder.x.q_proj"),
        ("transformer.a.lora_B.default.weight", "transformer.a"),
        ("transformer.a.alpha", "transformer.a"),
    ],
)
def test_the_layer_of_a_key(key: str, layer: str) -> None:
    assert layer_name(key) == layer


def test_none_some_and_all() -> None:
    network = ["unet.a", "unet.a.base_layer", "unet.b.to_q"]
    with pytest.raises(ModelError, match=r"adapter has transformer\.x; the network has unet\.a"):
        check_match(["transformer.x"], network, "adapter f")
    with pytest.raises(ModelError, match="no LoRA keys"):
        check_match([], network, "adapter f")
    with pytest.warns(UserWarning, match=r"1 of 2 layers are not in this network .*unet\.z"):
        check_match(["unet.a", "unet.z"], network, "adapter f")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_match(["unet.a", "unet.b.to_q"], network, "adapter f")


@pytest.mark.parametrize(
    ("trained", "base"), [("sd3", "sd"), ("sd", "sd3"), ("sd3", "sdxl"), ("sdxl", "sd3")]
)
def test_another_familys_adapter_is_refused(
    bases: dict[str, Path], trained: str, base: str, tmp_path: Path
) -> None:
    """Stock diffusers loads it without an error and changes nothing."""
    run = export_runs.make(tmp_path, bases[trained], {"r": 2})
    export(Request(run.folder, "peft", tmp_path / "a"))
    with pytest.raises(ModelError) as caught:
        loaded(bases[base], tmp_path / "a")
    said = caught.value.message
    mine, other = ("transformer", "unet") if trained == "sd3" else ("unet", "transformer")
    assert "none of its layers is in this network" in said
    assert f"the adapter has {mine}." in said and f"the network has {other}." in said
    with pytest.raises(ModelError, match="none of its layers"):
        export(Request(tmp_path / "a", "merged", tmp_path / "m", model=str(bases[base])))
    assert not (tmp_path / "m").exists()


def test_the_silence_this_guards_against(bases: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    layer = LowRank(torch.ones(2, 16), torch.ones(16, 2), 1.0)
    write_adapter(Adapter({"transformer.x": layer}), tmp_path / "a.safetensors")
    pipe: Any = StableDiffusionPipeline.from_pretrained(bases["sd"])
    before = export_runs.theirs(pipe)
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    assert torch.equal(export_runs.theirs(pipe), before)


@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_the_own_adapter_passes_without_a_word(
    bases: dict[str, Path], family: str, form: Any, tmp_path: Path
) -> None:
    """In every spelling that is loaded, by our own generator."""
    run = export_runs.make(tmp_path, bases[family], {"r": 2, "target_modules": "all-linear"})
    export(Request(run.folder, form, tmp_path / "a"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not in this network.*")
        g = loaded(bases[family], tmp_path / "a")
    torch.testing.assert_close(
        export_runs.ours(g), export_runs.ours(run.generator), atol=1e-4, rtol=0
    )


def test_start_from_of_another_family_names_both(bases: dict[str, Path], tmp_path: Path) -> None:
    from t2i_align.train.start import start_from

    run = export_runs.make(tmp_path / "a", bases["sd3"], {"r": 2})
    other = export_runs.make(tmp_path / "b", bases["sd"], {"r": 2})
    with pytest.raises(
        ModelError, match=r"not one of them the same: transformer_blocks.* there, down_blocks"
    ):
        start_from(other.generator.views, str(run.folder))


def test_an_empty_adapter_is_not_written(bases: dict[str, Path], tmp_path: Path) -> None:
    from t2i_align.generators.diffusers_export import refuse_empty

    with pytest.raises(ModelError, match="there are no LoRA layers in X"):
        refuse_empty({}, "X")
    run = export_runs.make(tmp_path, bases["sd"], {"r": 2})
    with pytest.raises(ModelError, match="no LoRA layers"):
        write_adapter(Adapter({}), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    assert run.generator.export(str(tmp_path / "b"))
