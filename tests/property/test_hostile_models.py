"""Pickles, safetensors that lie and models with code of their own: refused, nothing is run."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import (
    MARKER,
    pickles,
    safetensors_files,
)
from hostile_ends import end_of, settle
from hostile_readers import put

from t2i_align.errors import ModelError


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    """Gives an empty folder each time."""
    numbers = iter(range(1_000_000))

    def make() -> Path:
        folder = tmp_path / f"case{next(numbers)}"
        folder.mkdir()
        return folder

    return make


def adapters(folder: Path, raw: bytes) -> Iterator[Path]:
    """An adapter under every name that is looked for."""
    yield put(folder / "a" / "pytorch_lora_weights.safetensors", raw).parent
    yield put(folder / "b" / "pytorch_lora_weights.bin", raw).parent
    put(folder / "c" / "adapter_config.json", '{"peft_type": "LORA"}')
    yield put(folder / "c" / "adapter_model.bin", raw).parent
    yield put(folder / "lora.pt", raw)
    yield put(folder / "lora.safetensors", raw)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real pipeline."""
    from tiny import pipeline_folder

    return pipeline_folder("sd", tmp_path_factory.mktemp("model"))


def copied(pipeline: Path, where: Path) -> Path:
    import shutil

    return Path(shutil.copytree(pipeline, where / "model"))


def generator_of(folder: Path) -> Any:
    from t2i_align.generators.diffusers_family import DiffusersGenerator
    from t2i_align.generators.diffusers_options import DiffusersOptions

    options = {"type": "diffusers", "name_or_path": str(folder), "resolution": 16}
    return DiffusersGenerator(DiffusersOptions.model_validate(options))


def load_all(folder: Path) -> None:
    """The denoiser, then the rest."""
    found = generator_of(folder)
    found.load_module(0, reference=False)
    assert found.pipe


def test_no_pickle_runs_anything(tmp_path: Path, pipeline: Path) -> None:
    """As judge weights (with and without their hash), adapters, parts of models, checkpoints."""
    from t2i_align.export.adapter import read_adapter
    from t2i_align.judges.weight_files import load_tensors, sha256_of
    from t2i_align.rollout.generate import load_weights

    ends = {}
    base = generator_of(pipeline)
    for kind, raw in pickles(tmp_path).items():
        for suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar", ".safetensors"):
            file = put(tmp_path / kind / f"w{suffix}", raw)
            for sha256 in (None, sha256_of(file)):
                run = lambda f=file, s=sha256: load_tensors(f, s)  # noqa: E731
                ends[f"{kind} {file.name} {bool(sha256)}"] = end_of(run)
        for place in adapters(tmp_path / kind, raw):
            ends[f"{kind} export {place.name}"] = end_of(lambda p=place: read_adapter(p))
            run = lambda p=place: load_weights(base, str(p), None)  # noqa: E731
            ends[f"{kind} --lora {place.name}"] = end_of(run)
        for part in ("unet", "vae", "text_encoder"):
            model = copied(pipeline, tmp_path / kind / part)
            for file in (model / part).glob("*.safetensors"):
                file.unlink()
            name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
            put(model / part / name, raw)
            ends[f"{kind} model {part}"] = end_of(lambda m=model: load_all(m))
    settle(ends, lambda _: True)
    assert not (tmp_path / MARKER).exists()


def test_the_pickles_would_have_run(tmp_path: Path) -> None:
    """What the test above proves nothing of: without care they do."""
    import pickle

    import torch

    made = pickles(tmp_path)
    pickle.loads(made["bare"])
    (tmp_path / MARKER).rmdir()
    for name in ("zip", "legacy"):
        torch.load(io.BytesIO(made[name]), weights_only=False)
        (tmp_path / MARKER).rmdir()


def test_headers_that_lie_are_refused(fresh: Callable[[], Path], pipeline: Path) -> None:
    from hostile_readers import checkpoint_file

    from t2i_align.export.adapter import read_adapter
    from t2i_align.judges.weight_files import check_hash, load_tensors
    from t2i_align.rollout.generate import load_weights

    ends, base = {}, generator_of(pipeline)
    for what, raw in safetensors_files().items():
        file = put(fresh() / "w.safetensors", raw)
        ends[f"{what}: judge"] = end_of(lambda f=file: load_tensors(f))
        ends[f"{what}: hash"] = end_of(lambda f=file: check_hash(f, "0" * 64))
        ends[f"{what}: export"] = end_of(lambda f=file: read_adapter(f))
        ends[f"{what}: --lora"] = end_of(lambda f=file: load_weights(base, str(f), None))
        for name in ("weights.safetensors", "optimizer.safetensors"):
            run = lambda n=name, r=raw: checkpoint_file(n)(fresh(), r)  # noqa: E731
            ends[f"{what}: {name}"] = end_of(run)
    model = copied(pipeline, fresh())
    for what, raw in safetensors_files().items():
        put(model / "unet" / "diffusion_pytorch_model.safetensors", raw)
        ends[f"{what}: model"] = end_of(lambda: load_all(model))
    settle(ends, lambda _: True)


def spoiled_indexes(marker: Path) -> dict[str, dict[str, Any]]:
    """Entries of model_index.json that ask for code or for folders elsewhere."""
    return {
        "a pipeline of its own": {"_class_name": ["own", "Own"]},
        "a part of its own": {"unet": ["own", "UNet2DConditionModel"]},
        "a module": {"vae": ["os", "system"]},
        "a module to import": {"vae": ["antigravity", "x"]},
        "no class": {"unet": ["diffusers", "logging"]},
        "a folder above": {"../../unet": ["diffusers", "UNet2DConditionModel"]},
        "an absolute folder": {str(marker): ["diffusers", "AutoencoderKL"]},
        "one word": {"unet": ["diffusers"]},
        "numbers": {"unet": [1, 2]},
    }


def test_no_model_brings_code(tmp_path: Path, pipeline: Path) -> None:
    own = f"import os\nos.mkdir({str(tmp_path / MARKER)!r})\nclass Own: pass\n"
    before, ends = set(sys.modules), {}
    for what, change in spoiled_indexes(tmp_path / "elsewhere").items():
        model = copied(pipeline, tmp_path / what)
        index = json.loads((model / "model_index.json").read_text()) | change
        put(model / "model_index.json", json.dumps(index))
        for place in (model, model / "unet", model / "vae"):
            put(place / "own.py", own)
        ends[what] = end_of(lambda m=model: load_all(m))
    settle(ends, lambda _: True)
    assert not (tmp_path / MARKER).exists()
    assert not {"antigravity", "own"} & (set(sys.modules) - before)


def test_no_language_model_brings_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is the user asked whether it may."""
    from tiny import llama_folder

    from t2i_align.generators.token_lm import TokenLM, TokenLMOptions

    folder = llama_folder(tmp_path / "lm")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    put(folder / "config.json", json.dumps(config | {"model_type": "own"}))
    put(folder / "own.py", f"import os\nos.mkdir({str(tmp_path / MARKER)!r})\nclass Own: pass\n")
    options = {"type": "token_lm", "name_or_path": str(folder), "num_codes": 32}
    options |= {"tokenizer": "bytes", "code_offset": 256}
    with pytest.raises(ModelError):
        TokenLM(TokenLMOptions.model_validate(options))
    assert not (tmp_path / MARKER).exists()
    assert "y/N" not in capsys.readouterr().out
