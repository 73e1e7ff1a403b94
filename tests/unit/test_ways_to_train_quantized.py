"""A denoiser in few bits under LoRA: what is rounded, what is exact, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_files import write_recipe
from torch import Tensor, nn

from t2i_align import checks_model
from t2i_align.contract import DrawSpec, Seeds
from t2i_align.errors import MissingDependencyError, ModelError, RecipeError
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import QuantizationOptions
from t2i_align.generators.quantize import (
    Int8Linear,
    Nf4Linear,
    quantize,
    quantized_names,
    rounded,
)
from t2i_align.recipe import load_recipe
from t2i_align.train.memory import net_bytes, num_parameters
from tests import runs
from tests.denoisers import errors, event, folders, generator, train_adapters

CPU = torch.device("cpu")
LORA = LoraOptions(r=2, lora_alpha=2)
INT8 = QuantizationOptions(type="int8")
NF4 = QuantizationOptions(type="nf4")
DOUBLE = QuantizationOptions(type="nf4", double_quant=True)
AO8 = QuantizationOptions(type="int8", backend="torchao")
FLOAT8 = QuantizationOptions(type="float8")
KINDS = [INT8, NF4, DOUBLE, AO8, FLOAT8]
IDS = ["int8", "nf4", "nf4-double", "torchao-int8", "torchao-float8"]
# quantiles of a normal by which nf4 codes (appendix E of the paper, rounded)
NF4_CODE = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
NF4_CODE += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("tiny"), "sdxl", "sd3")


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(48, 40).to(dtype)


def bare(folder: Path, options: QuantizationOptions) -> DiffusersGenerator:
    """A quantised denoiser that never had adapters."""
    g = generator(folder)
    quantize(g.module, options, CPU)
    return g


def weight_of(net: nn.Module) -> Tensor:
    """The weights a layer computes with ``(40, 48)``: its outputs of the unit vectors."""
    bias: Any = net.bias
    with torch.no_grad():
        return (net(torch.eye(48)) - bias).T


def test_int8_rounds_to_the_nearest_of_255_steps_of_a_row() -> None:
    """Eq. (1): |W - W'| <= s/2, s = max |W| / 127; the largest of a row is exact."""
    linear = layer()
    linear.weight.data[3] = 0  # a row of zeros stays one
    found, weight = weight_of(Int8Linear(linear)), linear.weight.detach()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((found - weight).abs() <= step / 2 + 1e-6).all()
    assert found[3].abs().max() == 0
    largest = weight.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(found.gather(1, largest), weight.gather(1, largest))
    assert (found / step)[0].round().sub((found / step)[0]).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(40, 48), (7, 9), (8, 128)])
def test_nf4_is_the_nearest_code_times_the_blocks_largest(shape: tuple[int, int]) -> None:
    """Eq. (1), also where a row ends within a block, or the last block is not full."""
    torch.manual_seed(3)
    linear = nn.Linear(shape[1], shape[0])
    weight = linear.weight.detach().flatten()
    padded = nn.functional.pad(weight, (0, -len(weight) % 64)).view(-1, 64)
    scale = padded.abs().amax(1, keepdim=True)
    code = torch.tensor(NF4_CODE)
    nearest = code[(padded / scale)[..., None].sub(code).abs().argmin(-1)] * scale
    found = Nf4Linear(linear, double=False).weight.flatten()
    off = (found - nearest.flatten()[: len(weight)]).abs() / scale.repeat_interleave(64)[
        : len(weight)
    ]
    # the code is published with four digits, so a weight on an edge may fall on either side
    assert (off < 1e-3).float().mean() > 0.998


def test_double_quantisation_rounds_the_scales_alone() -> None:
    """Codes are those of plain nf4; the 8-bit float of a scale is off by at most 1/16 or so."""
    linear = layer()
    once, twice = (Nf4Linear(linear, double=d) for d in (False, True))
    assert torch.equal(once.codes, twice.codes)
    nonzero = once.weight != 0
    ratio = (twice.weight[nonzero] / once.weight[nonzero] - 1).abs()
    assert 0 < ratio.max() < 0.02


@pytest.mark.parametrize("options", KINDS, ids=IDS)
def test_gradient_of_the_input_is_that_of_the_rounded_weights(options: QuantizationOptions) -> None:
    net = rounded(layer(), options)
    x = torch.randn(2, 5, 48, requires_grad=True)
    g = torch.randn(2, 5, 40)
    (found,) = torch.autograd.grad((net(x) * g).sum(), x)
    torch.testing.assert_close(found, g @ weight_of(net), atol=1e-5, rtol=1e-5)


def test_int8_passes_gradcheck() -> None:
    net = Int8Linear(layer().double())
    assert torch.autograd.gradcheck(
        net, torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    )


@pytest.mark.parametrize("options", KINDS, ids=IDS)
def test_an_item_does_not_depend_on_its_neighbours(options: QuantizationOptions) -> None:
    """Not even beside an outlier of 50, for which LLM.int8() would change the whole batch."""
    net, x = rounded(layer(), options), torch.randn(4, 3, 48)
    other = torch.cat([x[:1], x[1:] + 50 * torch.nn.functional.one_hot(torch.tensor(7), 48)])
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:1], net(other)[:1], atol=0, rtol=0)


@pytest.mark.parametrize("options", KINDS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_gradients_is_the_same_number(
    options: QuantizationOptions, dtype: torch.dtype
) -> None:
    """Policy (gradients) and reference (none) must not differ by the kernel they run on."""
    net, x = rounded(layer(dtype), options).eval(), torch.randn(5, 48, dtype=dtype)
    tracked = net(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(net(x), tracked)
        assert torch.equal(net(x), tracked)  # the first call changed nothing in place
    assert tracked.dtype == dtype


def test_int8_follows_autocast() -> None:
    net, x = Int8Linear(layer()), torch.randn(5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), net(x), atol=0.05, rtol=0.05)


def test_skipped_layers_stay_as_they_are(tiny: dict[str, Path]) -> None:
    net = generator(tiny["sd3"]).module
    linears = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    assert quantized_names(net, INT8) == linears
    options = QuantizationOptions(type="int8", skip_modules=["to_q", "proj_out"])
    left = set(linears) - set(quantized_names(net, options))
    assert left and all(n.endswith((".to_q", "proj_out")) for n in left)
    kept: Any = net
    kept._keep_in_fp32_modules = ["norm_out"]
    assert "norm_out.linear" in linears and "norm_out.linear" not in quantized_names(net, INT8)


def test_nothing_left_to_quantise_is_refused() -> None:
    with pytest.raises(ModelError, match="Conv2d has no linear layer to quantise"):
        quantize(nn.Conv2d(2, 2, 1), INT8, CPU)


def test_nf4_without_its_package_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2i_align.optional.version_of", lambda dist: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "t2i-align\[quant\]"'):
        quantize(nn.Sequential(layer()), NF4, CPU)
    assert isinstance(quantize(nn.Sequential(layer()), INT8, CPU).get_submodule("0"), Int8Linear)


@pytest.mark.parametrize("options", KINDS, ids=IDS)
def test_the_planned_network_keeps_what_the_real_one_does(
    options: QuantizationOptions, tiny: dict[str, Path]
) -> None:
    """Without values: the same tensors, so the same bytes; and it is scored for its FLOPs."""
    g = generator(tiny["sdxl"], quantization=options, lora=LORA)
    planned = DiffusersGenerator(g.options, "meta")
    planned.load_module(0, reference=True)
    kinds = [
        {n: (tuple(t.shape), t.dtype) for n, t in net.state_dict().items()}
        for net in (planned.module, g.module)
    ]
    assert kinds[0] == kinds[1]
    assert net_bytes(planned.module, torch.float32) == net_bytes(g.module, torch.float32)
    whole = sum(p.numel() for p in generator(tiny["sdxl"]).module.parameters())
    assert num_parameters(planned.module) == num_parameters(g.module) == whole
    spec, seeds = DrawSpec(), torch.zeros(2, dtype=torch.int64)
    drawn = planned.draw(planned.example(2), spec, Seeds(seeds, seeds)).to("meta")
    planned.score(drawn, "policy").logp.sum().backward()
    assert all(p.grad is not None for p in planned.views.trained().values())


@pytest.mark.parametrize(
    ("options", "bits"),
    list(
        zip(
            KINDS,
            [8 + 1 / 32, 4.5, 4 + 8 / 64 + 32 / (64 * 256), 8 + 5 / 128, 8 + 1 / 32],
            strict=True,
        )
    ),
    ids=IDS,
)
def test_bits_a_weight(options: QuantizationOptions, bits: float) -> None:
    """A row of 1024 has one scale (torchao's int8 an offset, too), nf4's scales a code, 8192 bits.

    Of torchao's offsets all are 0.
    """
    with torch.device("meta"):
        linear = nn.Linear(1024, 512, bias=False)
    kept = rounded(linear, options)
    num = (
        sum(b.numel() * b.element_size() * 8 for b in kept.buffers()) - 8192 * options.double_quant
    )
    assert num / (1024 * 512) == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("options", KINDS, ids=IDS)
def test_adapters_off_is_bitwise_the_quantised_base(
    options: QuantizationOptions, family: str, tiny: dict[str, Path]
) -> None:
    full = generator(tiny[family])
    base = bare(tiny[family], options)
    g = generator(tiny[family], quantization=options, lora=LORA)
    drawn = event(full)
    with torch.no_grad():
        plain, exact = errors(base, drawn), errors(full, drawn)
        assert torch.equal(errors(g, drawn), plain)
        train_adapters(g)
        assert torch.equal(errors(g, drawn, "reference"), plain)
        assert not torch.equal(errors(g, drawn), plain)
    off = ((plain - exact).abs() / exact).max().item()
    assert 0 < off < {"int8": 0.02, "float8": 0.1, "nf4": 0.3}[options.type]
    errors(g, drawn).sum().backward()
    grads = {k for k, p in g.module.named_parameters() if p.grad is not None}
    assert grads == g.views.trained().keys() and all("lora_" in k for k in grads)


@pytest.mark.parametrize("options", KINDS, ids=IDS)
def test_dora_starts_with_the_rows_it_finds(
    options: QuantizationOptions, tiny: dict[str, Path]
) -> None:
    """Magnitudes are the lengths of the rounded rows, so it starts at the quantised base."""
    dora = LoraOptions(r=2, lora_alpha=2, use_dora=True)
    base = bare(tiny["sdxl"], options)
    g = generator(tiny["sdxl"], quantization=options, lora=dora)
    drawn = event(g)
    with torch.no_grad():
        torch.testing.assert_close(errors(g, drawn), errors(base, drawn), atol=1e-5, rtol=1e-5)


def test_a_frozen_copy_is_the_same_quantised_base(tiny: dict[str, Path]) -> None:
    """Why the recipe refuses it: it costs a second network and says the same numbers."""
    made: Callable[..., Any] = generator
    off = made(tiny["sdxl"], quantization=NF4, lora=LORA)
    copied = made(tiny["sdxl"], quantization=NF4, lora=LORA, reference_mode="frozen_copy")
    drawn = event(off)
    with torch.no_grad():
        assert torch.equal(errors(off, drawn, "reference"), errors(copied, drawn, "reference"))


def test_full_fine_tuning_is_refused_from_python_too(tiny: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="rounded weights have no gradient"):
        generator(tiny["sdxl"], quantization=INT8)


REFUSED = [
    (["model.lora=null", "model.dtype=float32"], "model.quantization: got 'int8', but without"),
    (["model.quantization.double_quant=true"], "double_quant: belongs to nf4; int8 has one"),
    (["reference.mode=frozen_copy"], "a second copy of the same quantised weights, not the model"),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED)
def test_refused(overrides: list[str], said: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["model.quantization={type: int8}", *overrides])
    assert said in str(caught.value)
    assert load_recipe(path, ["model.quantization={type: int8}"])


def test_nf4_is_refused_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_model, "version_of", lambda dist: None)
    with pytest.raises(RecipeError, match="needs the package 'bitsandbytes'; it is not installed"):
        load_recipe(write_recipe(tmp_path), ["model.quantization={type: nf4}"])


def test_a_run_on_nf4_trains_adapters_that_load_on_the_full_base(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    """DPO on the tiny SDXL: loss log 2 first, then lower; stock diffusers loads what it wrote."""
    from tests.denoisers import our_images, reloaded_images

    data = runs.pickapic(tmp_path / "pairs.parquet", 12)
    sections = {
        "model": {
            "name_or_path": str(tiny["sdxl"]),
            "resolution": 64,
            "lora": {"r": 4, "lora_alpha": 4, "use_dora": True},
            "quantization": {"type": "nf4", "double_quant": True},
        },
        "objective": {"type": "dpo", "beta": 500.0},
        "data": {"type": "pickapic", "path": str(data)},
        "cache": {"dir": str(tmp_path / "cache")},
        "train": {
            "learning_rate": 1e-2,
            "train_batch_size": 4,
            "max_train_steps": 3,
            "ema_decay": 0.9,
            "report_to": "none",
        },
    }
    summary = runs.train(tmp_path, "run", sections)
    losses = runs.losses(tmp_path / "run")
    assert losses[0] == pytest.approx(0.6931472, abs=1e-4) and all(x > 0 for x in losses)
    assert summary["exported"] == ["pytorch_lora_weights.safetensors"]
    saved = runs.weights(tmp_path / "run", 3)
    assert saved and all("lora_" in k for k in saved)

    full = generator(tiny["sdxl"])
    full.load_adapter(str(tmp_path / "run"))
    noise, ours = our_images(full)
    without, theirs = reloaded_images(tiny["sdxl"], str(tmp_path / "run"), noise)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (without - theirs).abs().max() > 1e-3
