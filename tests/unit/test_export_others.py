"""Exports of generators that are no diffusers pipeline: their own adapter, or a merged network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.errors import ModelError, OutputError
from t2i_align.export.adapter import read_adapter
from t2i_align.export.arithmetic import add
from t2i_align.export.program import Request, export
from t2i_align.export.store import store
from tests import export_runs
from tests.kinds import event, items
from tests.tiny import llama_folder, voxel_folder
from tests.tiny_image import pixart

SECTIONS: dict[str, dict[str, Any]] = {
    "llama": {"type": "token_lm", "num_codes": 32},
    "voxels": {"type": "voxel_flow"},
    "pixart": {"resolution": 64, "max_sequence_length": 32},
}
LORAS: dict[str, dict[str, Any] | None] = {
    "lora": {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    "dora": {"r": 2, "lora_alpha": 6, "use_dora": True},
    "full": None,
}


def run_of(name: str, lora: str, folder: Path) -> export_runs.Made:
    """A run and its policy."""
    build: Any = {"llama": llama_folder, "voxels": voxel_folder, "pixart": pixart}[name]
    base = build(folder / "base")
    return export_runs.make(folder / "x", base, LORAS[lora], section=SECTIONS[name])


def said(generator: Any) -> Any:
    """What a policy says of one drawn batch."""
    generator.module.eval()
    with torch.no_grad():
        drawn = event(generator, items(generator), "none", None)
        return generator.score(drawn, "policy").logp


def plain(run: export_runs.Made, folder: Path) -> Any:
    """The same generator on another base, without adapters."""
    changes = {"name_or_path": str(folder), "lora": None}
    made = type(run.generator)(run.generator.options.model_copy(update=changes))
    made.load_module(0, reference=False)
    return made


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("name", SECTIONS)
def test_merged_networks_score_like_the_policy(name: str, lora: str, tmp_path: Path) -> None:
    """The folder is a base model like the one the run began with."""
    run = run_of(name, lora, tmp_path)
    export(Request(run.folder, "merged", tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").is_file()
    expected = said(run.generator)
    torch.testing.assert_close(said(plain(run, tmp_path / "out")), expected, atol=2e-5, rtol=1e-5)
    base = said(plain(run, tmp_path / "base"))
    assert (base - expected).abs().max().item() > 5e-4


def test_a_language_models_adapter_is_pefts(tmp_path: Path) -> None:
    """``PeftModel.from_pretrained`` and the merged folder's own class give one set of logits."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    run = run_of("llama", "lora", tmp_path)
    ids = torch.tensor([[1, 2, 256, 260]])
    with torch.no_grad():
        expected = run.generator.module(input_ids=ids).logits
        for form in ("peft", "merged"):
            export(Request(run.folder, form, tmp_path / form))  # type: ignore[arg-type]
        base: Any = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        stock = PeftModel.from_pretrained(base, str(tmp_path / "peft"))
        torch.testing.assert_close(stock(input_ids=ids).logits, expected)
        merged: Any = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(input_ids=ids).logits, expected)


@pytest.mark.parametrize("lora", ["plain", "patterns"])
def test_arithmetic_of_peft_folders(lora: str, tmp_path: Path) -> None:
    """Three times the adapter by ``PeftModel`` is the policy with B three times as large."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    more = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True}
    options = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}
    section = SECTIONS["llama"]
    chosen = options | (more if lora == "patterns" else {})
    run = export_runs.make(tmp_path / "x", llama_folder(tmp_path / "base"), chosen, section=section)
    export(Request(run.folder, "peft", tmp_path / "a"))
    store(add([read_adapter(tmp_path / "a")] * 2, [1.0, 2.0]), tmp_path / "b")
    with torch.no_grad():
        for name, p in run.generator.module.named_parameters():
            if "lora_B" in name:
                p.mul_(3.0)
        ids = torch.tensor([[1, 2, 256, 260]])
        base: Any = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        stock = PeftModel.from_pretrained(base, str(tmp_path / "b"))
        expected = run.generator.module(input_ids=ids).logits
        torch.testing.assert_close(stock(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(OutputError, match="give a folder"):
        store(read_adapter(tmp_path / "a"), tmp_path / "c.safetensors")
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="holds the scale"):
        read_adapter(tmp_path / "a")


def test_a_pipeline_without_a_lora_loader(tmp_path: Path) -> None:
    """PixArt's adapter is a peft folder, for ``PeftModel``, ``generate --lora`` and merging."""
    from diffusers import PixArtTransformer2DModel
    from peft import PeftModel

    from t2i_align.rollout.generate import load_weights

    run = run_of("pixart", "lora", tmp_path)
    expected = said(run.generator)
    export(Request(run.folder, "peft", tmp_path / "a"))
    assert "library_name: peft" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(ModelError, match="no kohya format for PixArtAlphaPipeline"):
        export(Request(run.folder, "kohya", tmp_path / "k"))
    options = run.generator.options.model_copy(update={"lora": None})
    loaded = type(run.generator)(options)
    load_weights(loaded, str(tmp_path / "a"), None)
    torch.testing.assert_close(said(loaded), expected, atol=2e-5, rtol=1e-5)
    stock: Any = PixArtTransformer2DModel.from_pretrained(tmp_path / "base" / "transformer")
    PeftModel.from_pretrained(stock, str(tmp_path / "a"))
    other = plain(run, tmp_path / "base")
    other.views.module = stock.eval()
    torch.testing.assert_close(said(other), expected, atol=2e-5, rtol=1e-5)
    export(Request(tmp_path / "a", "merged", tmp_path / "m", model=str(tmp_path / "base")))
    torch.testing.assert_close(said(plain(run, tmp_path / "m")), expected, atol=2e-5, rtol=1e-5)


def test_they_have_no_kohya_format(tmp_path: Path) -> None:
    run = run_of("voxels", "lora", tmp_path)
    with pytest.raises(ModelError, match=r"no kohya format for model\.type voxel_flow"):
        export(Request(run.folder, "kohya", tmp_path / "out"))
