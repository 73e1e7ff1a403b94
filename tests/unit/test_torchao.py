"""A denoiser in torchao's numbers under LoRA: what they are, what is kept, a run on them.

What holds of every kind of quantisation (bits, gradients, neighbours, adapters off, the plan) is in
test_ways_to_train_quantized.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_files import write_recipe
from torch import Tensor, nn

from t2i_align import checks_model
from t2i_align.errors import MissingDependencyError, ModelError, RecipeError
from t2i_align.export.merge import fold
from t2i_align.generators.diffusers_options import QuantizationOptions
from t2i_align.generators.quantize import quantize
from t2i_align.generators.torchao_linear import TorchaoLinear
from t2i_align.recipe import load_recipe
from tests import runs
from tests.denoisers import generator
from tests.tiny import pipeline_folder

KINDS = ["int8", "float8"]
AO8 = {"type": "int8", "backend": "torchao"}
OPTIONS = {"int8": AO8, "float8": {"type": "float8"}}
E4M3 = torch.tensor(  # every positive number of the format: 2^(e - 7) (1 + m / 8), subnormal at e 0
    [2.0**-9 * m for m in range(8)]
    + [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8)][:-1]
)


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(48, 40).to(dtype)


def torchaos_own(kind: str, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The same layer as torchao leaves it."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    net = linear(dtype).requires_grad_(False)
    config: Any = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[kind]
    quantize_(net, config(set_inductor_config=False))
    return net


def test_int8_is_the_nearest_of_a_rows_steps() -> None:
    """Eq. (1): multiples of max |W| / 127.5, the nearest; the largest is half a step from two."""
    weight, found = linear().weight.detach(), TorchaoLinear(linear(), "int8").weight
    step = weight.abs().amax(1, keepdim=True) / 127.5
    codes = found / step
    assert (codes - codes.round()).abs().max() < 1e-3 and codes.round().unique().numel() > 200
    assert ((found - weight).abs() <= step * (0.5 + 1e-4)).all()


def test_float8_is_the_nearest_number_of_the_format() -> None:
    """Eq. (2), the format written out: its largest number is 448."""
    assert E4M3.max() == 448 and len(E4M3.unique()) == 127
    weight, found = linear().weight.detach(), TorchaoLinear(linear(), "float8").weight
    scale = weight.abs().amax(1, keepdim=True) / 448
    ratio = (weight / scale).abs()
    nearest = (ratio[..., None] - E4M3).abs().amin(-1)
    off = ((found - weight) / scale).abs()
    torch.testing.assert_close(off, nearest, atol=1e-4, rtol=1e-3)


def test_which_of_the_two_is_nearer_depends_on_the_row() -> None:
    """Normal rows: int8. One weight 100 times the others in each row: float8."""
    far = linear()
    far.weight.data[:, 0] = 100 * far.weight.abs().amax()
    off = []
    for made in (linear(), far):
        weight = made.weight.detach().clone()
        for kind in KINDS:
            found = TorchaoLinear(copy.deepcopy(made), kind).weight
            off.append(((found - weight)[:, 1:].norm() / weight[:, 1:].norm()).item())
    assert off[0] < off[1] / 2 and off[3] < off[2] / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_torchaos_own_layer(
    kind: str, dtype: torch.dtype
) -> None:
    """Up to the order in which its product multiplies by the scales."""
    ours, theirs = TorchaoLinear(linear(dtype), kind), torchaos_own(kind, dtype)
    seen: list[Tensor] = []
    for net in (ours, theirs):
        x = torch.linspace(-1, 1, 5 * 48, dtype=dtype).view(5, 48).requires_grad_()
        out = net(x)
        (grad,) = torch.autograd.grad(out.float().square().sum(), x)
        seen += [out.detach(), grad]
    off = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(seen[0], seen[2], atol=off, rtol=off)
    torch.testing.assert_close(seen[1], seen[3], atol=off, rtol=off)


def kept_for_backward(net: nn.Module) -> int:
    """Bytes that a forward pass leaves for the backward pass, besides what the layer has."""
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(5, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        net(x).sum()
    return sum(seen.values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_rebuilt_weight_waits_for_the_backward_pass(kind: str) -> None:
    """torchao's own layer keeps all 40 x 48 of it in float32: why the layer is ours."""
    assert kept_for_backward(torchaos_own(kind)) >= 40 * 48 * 4
    assert kept_for_backward(TorchaoLinear(linear(), kind)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_from_a_state_dict(kind: str, tmp_path: Path) -> None:
    """As plain tensors, which safetensors holds."""
    from safetensors.torch import load_file, save_file

    one = TorchaoLinear(linear(), kind)
    save_file(one.state_dict(), tmp_path / "a.safetensors")
    other = TorchaoLinear(nn.Linear(48, 40), kind)
    assert not torch.equal(other.weight, one.weight)
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert torch.equal(other.weight, one.weight)
    assert torch.equal(copy.deepcopy(one).weight, one.weight)


def test_nothing_is_merged_into_it(tmp_path: Path) -> None:
    g = generator(pipeline_folder("sd3", tmp_path), quantization=AO8, lora={"r": 2})
    with pytest.raises(ModelError, match="is quantised, so nothing can be folded into it"):
        fold(g.module)


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and fix; validation needs the package, and so does planning."""
    path = write_recipe(tmp_path)
    for given, said in [
        ("{type: nf4, backend: torchao}", "got 'torchao', which has int8 and float8 here"),
        ("{type: float8, double_quant: true}", "belongs to nf4; float8 has one scale a row"),
    ]:
        with pytest.raises(RecipeError, match=said):
            load_recipe(path, [f"model.quantization={given}"])
    assert load_recipe(path, ["model.quantization={type: float8}"])
    monkeypatch.setattr(checks_model, "version_of", lambda dist: None)
    with pytest.raises(RecipeError, match=r"needs the package 'torchao'.*\n.*t2i-align\[torchao\]"):
        load_recipe(path, ["model.quantization={type: float8}"])
    monkeypatch.setattr("t2i_align.optional.version_of", lambda dist: None)
    for where in ("cpu", "meta"):
        options = QuantizationOptions.model_validate(AO8)
        with pytest.raises(MissingDependencyError, match=r"t2i-align\[torchao\]"):
            quantize(nn.Sequential(linear()), options, torch.device(where))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_resumes_and_loads_on_the_full_base(kind: str, tmp_path: Path) -> None:
    """DPO on the tiny SDXL: log 2 first, bit for bit after a stop; stock diffusers loads it."""
    from tests.denoisers import our_images, reloaded_images

    model, data = pipeline_folder("sdxl", tmp_path / "sdxl"), tmp_path / "pairs.parquet"
    sections = {
        "model": {
            "name_or_path": str(model),
            "resolution": 64,
            "lora": {"r": 4, "lora_alpha": 4},
            "quantization": OPTIONS[kind],
        },
        "objective": {"type": "dpo", "beta": 500.0},
        "data": {"type": "pickapic", "path": str(runs.pickapic(data, 8))},
        "cache": {"dir": str(tmp_path / "cache")},
        "train": {
            "learning_rate": 1e-2,
            "train_batch_size": 4,
            "max_train_steps": 2,
            "checkpointing_steps": 1,
            "report_to": "none",
        },
    }
    runs.train(tmp_path, "whole", sections)
    assert runs.losses(tmp_path / "whole")[0] == pytest.approx(0.6931472, abs=1e-5)
    runs.train(tmp_path, "parts", sections, "train.max_train_steps=1")
    runs.train(tmp_path, "parts", sections, "train.resume_from_checkpoint=latest")
    one, two = (runs.weights(tmp_path / name, 2) for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert all("lora_" in k for k in one)
    full = generator(model)
    full.load_adapter(str(tmp_path / "whole"))
    noise, ours = our_images(full)
    without, theirs = reloaded_images(model, str(tmp_path / "whole"), noise)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (without - theirs).abs().max() > 1e-3
