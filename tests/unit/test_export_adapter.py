"""Adapters as numbers: files keep every scale, sums are sums of updates, cuts are the best ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2i_align.errors import ModelError, OutputError
from t2i_align.export.adapter import FILE, Adapter, LowRank, from_module, read_adapter
from t2i_align.export.adapter import write_adapter as write
from t2i_align.export.arithmetic import add, interpolate, scale, truncate
from t2i_align.export.store import store

SHAPES = {"unet.a.to_q": ((6,), 8), "unet.proj_out": ((5,), 4), "unet.b.proj_out": ((7,), 9)}
CONV = {"unet.conv1": ((3, 3, 3), 5)}


def adapter(seed: int, rank: int = 3, shapes: Any = None, dtype: Any = torch.float32) -> Adapter:
    """Random factors; every layer has a rank and a scale of its own."""
    torch.manual_seed(seed)
    layers = {}
    for number, (name, (inputs, out)) in enumerate((shapes or SHAPES).items()):
        r = rank + number % 2
        up = torch.randn(out, r, *[1] * (len(inputs) - 1), dtype=dtype)
        down = torch.randn(r, *inputs, dtype=dtype)
        layers[name] = LowRank(down, up, 0.5 + number / 3)
    return Adapter(layers)


def close(a: Tensor, b: Tensor) -> None:
    """Equal to 1e-6 of the largest entry."""
    assert (a - b).abs().max().item() <= 1e-6 * b.abs().max().item()


def test_delta_is_the_scaled_product() -> None:
    layer = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 0.5)
    assert layer.delta().tolist() == [[1.5, 3.0], [2.0, 4.0]]
    assert layer.rank == 1


@pytest.mark.parametrize("shapes", [SHAPES, CONV])
def test_a_file_gives_back_every_update(tmp_path: Path, shapes: Any) -> None:
    """Ranks and scales of their own, also where one layer's name ends another's."""
    before = adapter(0, shapes=shapes)
    write(before, tmp_path / FILE)
    after = read_adapter(tmp_path)
    assert list(after.layers) == sorted(before.layers)
    for name, layer in after.layers.items():
        close(layer.delta(), before.layers[name].delta())
        assert layer.rank == before.layers[name].rank


class Net(nn.Module):
    """A layer whose name ends another's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(5, 4)
        self.b = nn.ModuleDict({"proj_out": nn.Linear(7, 9)})
        self.a = nn.ModuleDict({"to_q": nn.Linear(6, 8)})


def test_pefts_own_reading_of_the_metadata(tmp_path: Path) -> None:
    """``LoraConfig(**metadata)`` gives peft's layers the very scales and ranks."""
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors import safe_open

    before = adapter(0)
    write(before, tmp_path / FILE)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{k.removeprefix("unet."): v for k, v in metadata.items()})
    net: Any = Net()
    inject_adapter_in_model(config, net)
    for name, layer in before.layers.items():
        module = net.get_submodule(name.removeprefix("unet."))
        assert module.scaling["default"] == pytest.approx(layer.scale)
        assert module.r["default"] == layer.rank
    trained = {k: p for k, p in net.named_parameters() if p.requires_grad}
    again = from_module(net, trained, "unet")
    assert {k: x.rank for k, x in again.layers.items()} == {
        k: x.rank for k, x in before.layers.items()
    }
    with pytest.raises(ModelError, match=r"more than LoRA factors, e\.g\. proj_out\.bias"):
        from_module(net, trained | {"proj_out.bias": torch.zeros(4)}, "unet")
    with pytest.raises(ModelError, match=r"lack proj_out\.lora_A\.default\.weight"):
        from_module(net, {}, "unet")
    with pytest.raises(ModelError, match="no LoRA layers in Linear"):
        from_module(nn.Linear(2, 2), {}, "unet")


@pytest.mark.parametrize(
    ("keys", "metadata", "expected"),
    [
        (("lora_A.weight", "lora_B.weight"), {}, 1.0),
        (("lora.down.weight", "lora.up.weight"), {}, 1.0),
        (("lora_A.weight", "lora_B.weight", "alpha"), {}, 6 / 2),
        (("lora_A.weight", "lora_B.weight"), {"unet.r": 2, "unet.lora_alpha": 5}, 5 / 2),
        (
            ("lora_A.weight", "lora_B.weight"),
            {"unet.lora_alpha": 5, "unet.use_rslora": True, "unet.alpha_pattern": {"to_q": 7}},
            7 / 2**0.5,
        ),
    ],
)
def test_every_spelling_of_a_scale(
    tmp_path: Path, keys: tuple[str, ...], metadata: dict[str, Any], expected: float
) -> None:
    from safetensors.torch import save_file

    values = [torch.ones(2, 3), torch.ones(4, 2), torch.tensor(6.0)]
    tensors = {f"unet.a.to_q.{k}": v for k, v in zip(keys, values, strict=False)}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    (layer,) = read_adapter(file).layers.values()
    assert layer.scale == pytest.approx(expected)


def test_files_that_are_no_adapter(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "x.safetensors"
    for key, message in [
        ("lora_unet_a.lora_down.weight", "kohya's format"),
        ("unet.a.weight", "no LoRA factor"),
        ("unet.a.lora_A.weight", "layer unet.a has down only"),
    ]:
        save_file({key: torch.ones(2, 3)}, file)
        with pytest.raises(ModelError, match=message):
            read_adapter(file)
    save_file({}, file)
    with pytest.raises(ModelError, match="holds no LoRA layers"):
        read_adapter(file)
    file.write_text("junk")
    with pytest.raises(ModelError, match="cannot read"):
        read_adapter(file)
    with pytest.raises(ModelError, match="no adapter file at"):
        read_adapter(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no LoRA layers"):
        write(Adapter({}), file)


# -- arithmetic


@pytest.mark.parametrize("weight", [2.5, -1.0, 0.0])
@pytest.mark.parametrize("shapes", [SHAPES, CONV])
def test_scale_scales_the_update(weight: float, shapes: Any, tmp_path: Path) -> None:
    a = adapter(1, shapes=shapes)
    store(scale(a, weight), tmp_path / FILE)
    for name, layer in read_adapter(tmp_path).layers.items():
        expected = weight * a.layers[name].delta()
        assert (layer.delta() - expected).abs().max().item() <= 1e-6


@pytest.mark.parametrize("shapes", [SHAPES, CONV])
def test_a_sum_of_adapters_is_the_sum_of_updates(shapes: Any, tmp_path: Path) -> None:
    """Ranks 2, 3 and 5; through files."""
    parts, weights = [adapter(i, r, shapes) for i, r in enumerate((2, 3, 5))], [0.3, -2.0, 1.0]
    store(add(parts, weights), tmp_path / FILE)
    for name, layer in read_adapter(tmp_path).layers.items():
        terms = [w * p.layers[name].delta() for w, p in zip(weights, parts, strict=True)]
        close(layer.delta(), sum(terms[1:], terms[0]))
        assert layer.rank == sum(p.layers[name].rank for p in parts)


def test_the_average_of_factors_is_another_thing() -> None:
    """Why ranks are stacked: (A + A') / 2 times (B + B') / 2 is not the mean update."""
    a, b = (adapter(i, 2).layers["unet.a.to_q"] for i in (0, 1))
    mean = interpolate(adapter(0, 2), adapter(1, 2), 0.5).layers["unet.a.to_q"].delta()
    close(mean, 0.5 * (a.delta() + b.delta()))
    averaged = LowRank((a.down + b.down) / 2, (a.up + b.up) / 2, a.scale).delta()
    assert (averaged - mean).abs().max().item() > 0.1


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_interpolation_ends_at_its_ends(t: float) -> None:
    a, b = adapter(0), adapter(1)
    for name, layer in interpolate(a, b, t).layers.items():
        close(layer.delta(), (1 - t) * a.layers[name].delta() + t * b.layers[name].delta())


@pytest.mark.parametrize("shapes", [SHAPES, CONV])
def test_a_cut_is_the_best_update_of_its_rank(shapes: Any) -> None:
    """Against a dense SVD, and the reported errors against the dense differences."""
    whole = add([adapter(0, 3, shapes), adapter(1, 3, shapes)], [1.0, 1.0])
    cut = truncate(whole, 2)
    lost, total, relative = 0.0, 0.0, {}
    for name, layer in cut.adapter.layers.items():
        dense = whole.layers[name].delta()
        u, s, v = torch.linalg.svd(dense, full_matrices=False)
        close(layer.delta(), u[:, :2] * s[:2] @ v[:2])
        error = (layer.delta() - dense).square().sum().item()
        assert error == pytest.approx(s[2:].square().sum().item(), rel=1e-5)
        lost, total = lost + error, total + dense.square().sum().item()
        relative[name] = (error / dense.square().sum().item()) ** 0.5
        assert layer.up.shape[2:] == whole.layers[name].up.shape[2:]
    assert cut.error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert cut.worst_error == pytest.approx(max(relative.values()), rel=1e-5)
    assert relative[cut.worst] == max(relative.values())


def test_a_cut_that_loses_nothing() -> None:
    """A sum of an adapter with itself has its rank; a rank above the layer's leaves it."""
    a = adapter(0, 2)
    cut = truncate(add([a, a], [1.0, 1.0]), 3)
    assert cut.error <= 1e-6
    for name, layer in cut.adapter.layers.items():
        close(layer.delta(), 2 * a.layers[name].delta())
        assert layer.rank == 3
    same = truncate(a, 64)
    assert same.error == 0.0 and same.adapter.layers == a.layers
    thin = {"unet.x": LowRank(torch.randn(9, 4), torch.randn(3, 9), 1.0)}  # r above in and out
    close(truncate(Adapter(thin), 8).adapter.layers["unet.x"].delta(), thin["unet.x"].delta())


def test_adapters_that_do_not_fit_are_named() -> None:
    a = adapter(0)
    fewer = Adapter({k: v for k, v in a.layers.items() if k != "unet.proj_out"})
    with pytest.raises(ModelError, match=r"only the first has unet\.proj_out \(1 layers\)"):
        add([a, fewer], [1, 1])
    with pytest.raises(ModelError, match=r"only number 3 has unet\.proj_out"):
        add([fewer, fewer, a], [1, 1, 1])
    sizes = {**SHAPES, "unet.proj_out": ((5,), 6)}
    with pytest.raises(ModelError, match=r"unet\.proj_out is \(4, 5\).*\(6, 5\) in number 2"):
        add([a, adapter(0, shapes=sizes)], [1, 1])
    with pytest.raises(ModelError, match="2 adapters and 3 weights"):
        add([a, a], [1, 1, 1])
    dora = Adapter({"unet.x": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0, torch.ones(2))})
    for wrong in (lambda: scale(dora, 2), lambda: add([dora], [1]), lambda: truncate(dora, 1)):
        with pytest.raises(ModelError, match="DoRA"):
            wrong()


def test_precision_follows_the_files() -> None:
    """Half-precision files stay so; a mixed sum takes the wider."""
    half, whole = adapter(0, dtype=torch.bfloat16), adapter(1)
    assert add([half, half], [1, 1]).layers["unet.a.to_q"].up.dtype == torch.bfloat16
    mixed = add([half, whole, half], [1, 1, 1]).layers["unet.a.to_q"]
    assert (mixed.up.dtype, mixed.down.dtype) == (torch.float32, torch.float32)


def test_what_is_stored_is_told_and_never_overwrites(tmp_path: Path) -> None:
    said = store(add([adapter(0), adapter(1)], [1, 1]), tmp_path / "x.safetensors", 2)
    assert said.startswith("wrote 3 layers of rank 2 to ") and "relative error 0." in said
    with pytest.raises(OutputError, match="exists"):
        store(adapter(0), tmp_path / "x.safetensors")
    store(adapter(0), tmp_path / "folder")
    assert (tmp_path / "folder" / FILE).is_file()
