"""Every export is loaded back by stock diffusers and makes the policy's pictures.

The oracle is the policy itself, sampled by our own loop; the exports go through
``load_lora_weights`` and ``from_pretrained``, which know nothing of ours.
"""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.errors import ModelError, OutputError
from t2i_align.export.adapter import FILE, from_module, read_adapter
from t2i_align.export.program import Request, export
from t2i_align.export.trained import open_run
from tests import export_runs
from tests.export_runs import Made, make, ours, theirs
from tests.tiny import pipeline_folder, vae

FAMILIES = ["sd", "sdxl", "sd3"]
LORAS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8},
    "all-linear": {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"to_q": 2},
        "alpha_pattern": {"to_v": 3},
    },
}
Runs = Any


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs by (family, lora), built once."""

    @cache
    def base(family: str) -> Path:
        return pipeline_folder(family, tmp_path_factory.mktemp(family))

    @cache
    def build(family: str, lora: str | None) -> Made:
        where = tmp_path_factory.mktemp(f"{family}-{lora}")
        return make(where, base(family), LORAS[lora] if lora else None)

    return build


def stock(folder: Path) -> Any:
    """A pipeline without any of our code; SD3 saved without T5 is loaded without it."""
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text())
    absent = {k: None for k, v in index.items() if v == [None, None] and k.endswith("_3")}
    return DiffusionPipeline.from_pretrained(folder, **absent)


def exported(run: Made, form: Any, out: Path, **more: Any) -> Any:
    """The stock pipeline with the export in it."""
    export(Request(run.folder, form, out, **more))
    if form == "merged":
        return stock(out)
    pipe = stock(Path(run.generator.options.name_or_path))
    pipe.load_lora_weights(out)
    return pipe


def tiny_vae(folder: Path) -> Path:
    """Another VAE."""
    torch.manual_seed(99)
    vae().save_pretrained(folder)
    return folder


CASES = [
    *itertools.product(FAMILIES, ["attention", "all-linear"], ["peft", "kohya", "merged"]),
    *itertools.product(["sdxl", "sd3"], ["rslora", "patterns"], ["peft", "kohya"]),
    *itertools.product(["sd", "sdxl"], ["dora"], ["peft", "merged"]),
]


@pytest.mark.parametrize(("family", "lora", "form"), CASES)
def test_the_export_makes_the_policys_pictures(
    made: Runs, family: str, lora: str, form: str, tmp_path: Path
) -> None:
    run = made(family, lora)
    found = theirs(exported(run, form, tmp_path / "out"))
    expected = ours(run.generator)
    assert (found - expected).abs().max().item() <= 1e-4
    base = theirs(stock(Path(run.generator.options.name_or_path)))
    assert (base - expected).abs().max().item() > 1e-2  # the adapter does something


def test_full_fine_tuning_is_a_merged_pipeline(made: Runs, tmp_path: Path) -> None:
    run = made("sd", None)
    found = theirs(exported(run, "merged", tmp_path / "out"))
    assert (found - ours(run.generator)).abs().max().item() <= 1e-4
    for form in ("peft", "kohya"):
        with pytest.raises(ModelError, match="trained all weights"):
            export(Request(run.folder, form, tmp_path / form))  # type: ignore[arg-type]
        assert not (tmp_path / form).exists()


def test_merged_weights_are_sharded_and_of_the_asked_precision(made: Runs, tmp_path: Path) -> None:
    """Half precision rounds each merged weight once: half an ulp of the float32 merge."""
    run = made("sdxl", "attention")
    half = exported(run, "merged", tmp_path / "half", dtype="float16", shard="100KB")
    assert len(list((tmp_path / "half" / "unet").glob("*-of-*.safetensors"))) > 1
    whole = exported(run, "merged", tmp_path / "whole")
    for (name, a), b in zip(half.unet.named_parameters(), whole.unet.parameters(), strict=True):
        assert a.dtype == torch.float16 or a.dtype == torch.float32, name
        assert torch.equal(a.half(), b.half()), name
    from safetensors.torch import load_file

    for file in (tmp_path / "half").rglob("*.safetensors"):
        assert {v.dtype for v in load_file(file).values() if v.is_floating_point()} == {
            torch.float16
        }, file


def test_the_network_of_a_run_is_not_needed_for_its_adapter(made: Runs, tmp_path: Path) -> None:
    """Peft and kohya read configs only: the base model's weights may be gone."""
    import shutil

    run = made("sd3", "attention")
    bare = tmp_path / "bare"
    base = Path(run.generator.options.name_or_path)
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    export(Request(run.folder, "peft", tmp_path / "out", model=str(bare)))
    direct = from_module(
        run.generator.module, open_run(run.folder).weights, run.generator.layout.denoiser
    )
    read = read_adapter(tmp_path / "out")
    assert read.layers.keys() == direct.layers.keys()
    for name, layer in read.layers.items():
        assert torch.equal(layer.delta(), direct.layers[name].delta())


def test_the_runs_own_file_is_the_same_adapter(made: Runs, tmp_path: Path) -> None:
    """What training writes at its end, with attention and other layers mixed."""
    run = made("sdxl", "all-linear")
    assert run.generator.export(str(tmp_path)) == [FILE]
    export(Request(run.folder, "peft", tmp_path / "out"))
    a, b = read_adapter(tmp_path), read_adapter(tmp_path / "out")
    assert a.layers.keys() == b.layers.keys()
    for name, layer in a.layers.items():
        torch.testing.assert_close(layer.delta(), b.layers[name].delta())
    pipe = stock(Path(run.generator.options.name_or_path))
    pipe.load_lora_weights(tmp_path)
    assert (theirs(pipe) - ours(run.generator)).abs().max().item() <= 1e-4


def test_an_adapter_file_is_exported_with_its_base_model(made: Runs, tmp_path: Path) -> None:
    run = made("sdxl", "attention")
    export(Request(run.folder, "peft", tmp_path / "a"))
    base = run.generator.options.name_or_path
    for form in ("kohya", "merged", "peft"):
        again = Made(tmp_path / "a", run.generator)
        pipe = exported(again, form, tmp_path / form, model=base)
        assert (theirs(pipe) - ours(run.generator)).abs().max().item() <= 1e-4
    with pytest.raises(ModelError, match="name the base model with --model"):
        export(Request(tmp_path / "a", "kohya", tmp_path / "c"))


def test_which_weights(made: Runs, tmp_path: Path) -> None:
    """Latest or a step; averaged where the run averages, unless told otherwise."""
    run = make(tmp_path, Path(made("sd", "attention").generator.options.name_or_path), {"r": 2})
    first = open_run(run.folder).weights
    later = {k: v + 1 for k, v in first.items()}
    average = {k: v + 2 for k, v in first.items()}
    export_runs.save(run.folder, 5, later, average)
    key = next(iter(first))
    for which, averaged, shift in [
        ("3", None, 0),
        ("latest", None, 2),
        ("5", True, 2),
        ("latest", False, 1),
    ]:
        found = open_run(run.folder, which, averaged)
        torch.testing.assert_close(found.weights[key], first[key] + shift)
        assert found.averaged == (shift == 2)
    with pytest.raises(ModelError, match="step-00000003 holds no averaged weights"):
        open_run(run.folder, "3", True)
    with pytest.raises(ModelError, match="no step '4'; there are 3, 5"):
        open_run(run.folder, "4")
    (run.folder / "checkpoints" / "step-00000005" / "ema.safetensors").write_bytes(b"torn")
    assert open_run(run.folder).checkpoint.name == "step-00000003"
    with pytest.raises(ModelError, match="does not match its hash"):
        open_run(run.folder, "5")


def test_another_vae_and_prediction_go_with_the_pipeline(made: Runs, tmp_path: Path) -> None:
    """What the recipe overrides is in the merged folder, which needs no recipe."""
    base = Path(made("sd", "attention").generator.options.name_or_path)
    vae = tiny_vae(tmp_path / "vae")
    section = {"resolution": 64, "vae_name_or_path": str(vae), "prediction_type": "v_prediction"}
    run = make(tmp_path / "x", base, {"r": 2}, section=section)
    found = theirs(exported(run, "merged", tmp_path / "out"))
    assert (found - ours(run.generator)).abs().max().item() <= 1e-4
    plain = theirs(exported(made("sd", "attention"), "merged", tmp_path / "plain"))
    assert (found - plain).abs().max().item() > 1e-2


def test_a_quantised_run_is_merged_into_the_whole_weights(made: Runs, tmp_path: Path) -> None:
    """Stock diffusers adds the adapter to the unquantised base, and so do we; the card says so."""
    base = Path(made("sdxl", "attention").generator.options.name_or_path)
    section = {"resolution": 64, "quantization": {"type": "int8"}}
    run = make(tmp_path / "x", base, {"r": 4}, section=section)
    merged = theirs(exported(run, "merged", tmp_path / "m"))
    for form in ("peft", "kohya"):
        pictures = theirs(exported(run, form, tmp_path / form))
        assert (pictures - merged).abs().max().item() <= 1e-4
    assert "| base weights in training | int8 |" in (tmp_path / "m" / "README.md").read_text()


def test_rounds_mean_their_last_round(made: Runs, tmp_path: Path) -> None:
    base = Path(made("sd", "attention").generator.options.name_or_path)
    for number in (1, 2):
        run = make(tmp_path / str(number), base, {"r": 2}, step=number)
        run.folder.rename(tmp_path / f"round-{number:02d}")
    assert open_run(tmp_path).checkpoint.name == "step-00000002"


def test_what_cannot_be_written_is_refused_and_leaves_nothing(made: Runs, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("x")
    run = made("sd", "dora")
    with pytest.raises(OutputError, match="exists"):
        export(Request(run.folder, "peft", tmp_path / "used"))
    with pytest.raises(ModelError, match="DoRA"):
        export(Request(run.folder, "kohya", tmp_path / "out"))
    with pytest.raises(ModelError, match="no run of t2i-align"):
        export(Request(tmp_path / "none", "peft", tmp_path / "out"))
    other = made("sd3", "attention").generator.options.name_or_path
    with pytest.raises(ModelError):
        export(Request(run.folder, "merged", tmp_path / "out", model=other))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["used"]
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["mine.txt"]
