"""DoRA, rsLoRA, patterns, exclusions, and adapters on a suffix of the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.lora_targets import block_names, target_names
from t2i_align.generators.views import add_lora
from tests.denoisers import (
    errors,
    event,
    folders,
    generator,
    our_images,
    reloaded_images,
    train_adapters,
)

UNET_BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("sd", {"use_dora": True, "target_modules": "all-linear"}),
    ("sdxl", {"use_dora": True}),
    ("sdxl", {"from_block": 3, "use_rslora": True}),
    ("sdxl", {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_v": 7}}),
    ("sd3", {"use_dora": True, "from_block": 1}),
    ("sd3", {"exclude_modules": ["attn.to_q"]}),
]
IDS = ["-".join([f, *v]) for f, v in VARIANTS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("tiny"), "sd", "sdxl", "sd3")


def lora(**changes: Any) -> LoraOptions:
    return LoraOptions.model_validate({"r": 2, "lora_alpha": 4, **changes})


def linear(**changes: Any) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """One layer ``(6 -> 5)`` with a trained adapter of rank 2: output, base output, factors."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 5))
    add_lora(net, lora(target_modules=["0"], **changes), [], 0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.3)
    parts = {n.split(".")[1]: p.detach() for n, p in net.named_parameters() if "lora_" in n}
    base: Any = net.get_submodule("0.base_layer")
    return net, base.weight.detach(), parts


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    """y = W x + b + (alpha / sqrt r) B A x, with alpha 4 and r 2."""
    net, weight, p = linear(use_rslora=True)
    x = torch.randn(3, 6)
    base: Any = net.get_submodule("0.base_layer")
    wanted = x @ (weight + 4 / 2**0.5 * p["lora_B"] @ p["lora_A"]).T + base.bias
    torch.testing.assert_close(net(x), wanted)


def test_dora_trains_direction_and_length_apart() -> None:
    """y = (m / ||V||) V x + b with V = W + (alpha / r) B A and the norm of each row of V."""
    net, weight, p = linear(use_dora=True)
    x = torch.randn(3, 6)
    v = weight + 2.0 * p["lora_B"] @ p["lora_A"]
    base: Any = net.get_submodule("0.base_layer")
    scaled = (p["lora_magnitude_vector"] / v.norm(dim=1))[:, None] * v
    torch.testing.assert_close(net(x), x @ scaled.T + base.bias)


def test_patterns_set_rank_and_scale_of_the_layers_they_name() -> None:
    net = nn.ModuleDict({k: nn.Linear(4, 4) for k in ("to_q", "to_v")})
    options = lora(target_modules="all-linear", rank_pattern={"to_v": 3}, alpha_pattern={"to_v": 9})
    add_lora(net, options, [], 0)
    found = {k: (m.r["default"], m.scaling["default"]) for k, m in net.items()}  # type: ignore[index]
    assert found == {"to_q": (2, 2.0), "to_v": (3, 3.0)}


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_names_no_adapted_layer_is_refused(key: str) -> None:
    net = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_v": nn.Linear(4, 4)})
    with pytest.raises(ModelError, match=rf"model.lora.{key}: 'to_v' is the end of no adapted"):
        add_lora(net, lora(target_modules=["to_q"], **{key: {"to_v": 3}}), [], 0)


def test_dropout_is_no_option() -> None:
    with pytest.raises(ValueError, match="lora_dropout"):
        lora(lora_dropout=0.1)


def heard(net: nn.Module, names: list[str]) -> list[str]:
    """A list that grows by a module's name whenever it runs."""
    ran: list[str] = []
    for name in names:
        hook = lambda *_, name=name: ran.append(name)  # noqa: E731
        net.get_submodule(name).register_forward_pre_hook(hook)
    return ran


@pytest.mark.parametrize(
    ("family", "wanted"),
    [("sdxl", UNET_BLOCKS), ("sd3", ["transformer_blocks.0", "transformer_blocks.1"])],
)
def test_blocks_are_counted_in_forward_order(
    family: str, wanted: list[str], tiny: dict[str, Path]
) -> None:
    """The order in which the blocks really run."""
    g = generator(tiny[family])
    assert block_names(g.module) == wanted
    drawn, ran = event(g), heard(g.module, wanted[::-1])
    with torch.no_grad():
        g.score(drawn, "policy")
    assert ran == wanted


def test_flux_counts_double_blocks_before_single_ones() -> None:
    block, net = nn.Linear(2, 2), nn.Module()
    net.single_transformer_blocks = nn.ModuleList([block, block])
    net.transformer_blocks = nn.ModuleList([block])
    assert block_names(net) == [
        "transformer_blocks.0",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    ]


def test_two_stacks_of_a_kind_have_no_order() -> None:
    net = nn.ModuleDict()
    for side in ("encoder", "decoder"):
        net[side] = nn.Module()
        net[side].layers = nn.ModuleList([nn.Linear(2, 2)])
    assert block_names(net) == []
    with pytest.raises(ModelError, match="ModuleDict has no single stack of blocks"):
        target_names(net, lora(from_block=0, target_modules="all-linear"), [])


def test_a_block_beyond_the_last_is_refused_with_their_number(tiny: dict[str, Path]) -> None:
    with pytest.raises(ModelError) as caught:
        generator(tiny["sdxl"], lora=lora(from_block=5))
    assert str(caught.value) == (
        "model.lora.from_block: got 5, but UNet2DConditionModel has 5 blocks, 0 (down_blocks.0) "
        "to 4 (up_blocks.1)\n  fix: give a number below 5"
    )


def test_a_suffix_without_targets_is_refused(tiny: dict[str, Path]) -> None:
    """The last up block of the tiny UNet has no attention."""
    with pytest.raises(ModelError, match=r"from_block 4 .* leave none of \d+ target modules"):
        generator(tiny["sdxl"], lora=lora(from_block=4))


def test_gradients_reach_the_suffix_alone(tiny: dict[str, Path]) -> None:
    g = generator(tiny["sdxl"], lora=lora(from_block=2))
    drawn = event(g)
    trained = [n for n, p in g.module.named_parameters() if p.requires_grad]
    assert trained and all(n.startswith(("mid_block", "up_blocks")) for n in trained)
    blocks = dict(g.module.named_modules())
    seen: dict[str, bool] = {}
    for name in UNET_BLOCKS:
        hook = lambda _, __, out, name=name: seen.update({name: _tracked(out)})  # noqa: E731
        blocks[name].register_forward_hook(hook)
    g.score(drawn, "policy").logp.sum().backward()
    assert seen == dict(zip(UNET_BLOCKS, [False, False, True, True, True], strict=True))
    assert all(p.grad is not None for p in g.module.parameters() if p.requires_grad)


def _tracked(out: Any) -> bool:
    """Whether autograd follows a block's output."""
    return (out[0] if isinstance(out, tuple) else out).requires_grad


def test_a_suffix_from_block_0_is_every_block(tiny: dict[str, Path]) -> None:
    whole, zero = (generator(tiny["sdxl"], lora=lora(from_block=k)) for k in (None, 0))
    assert whole.views.trained().keys() == zero.views.trained().keys()


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=IDS)
def test_off_is_bitwise_the_base_and_the_export_reloads(
    family: str, changes: dict[str, Any], tiny: dict[str, Path], tmp_path: Path
) -> None:
    base, g = generator(tiny[family]), generator(tiny[family], lora=lora(**changes))
    drawn = event(g)
    with torch.no_grad():
        plain = errors(base, drawn)
        torch.testing.assert_close(errors(g, drawn), plain, atol=1e-5, rtol=1e-5)  # starts there
        train_adapters(g)
        assert torch.equal(errors(g, drawn, "reference"), plain)
        assert not torch.allclose(errors(g, drawn), plain, atol=1e-4)
    g.export(str(tmp_path))
    noise, ours = our_images(g)
    without, theirs = reloaded_images(tiny[family], str(tmp_path), noise)
    assert (without - theirs).abs().max() > 1e-3
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_dora_starts_at_the_base_in_any_precision(
    dtype: str, autocast: bool, tiny: dict[str, Path]
) -> None:
    """Magnitudes rounded to bfloat16 would move it, and a beta of thousands multiplies that."""
    g = generator(tiny["sdxl"], lora=lora(use_dora=True), dtype=dtype)
    magnitudes = {p.dtype for n, p in g.views.trained().items() if "magnitude" in n}
    drawn = event(g)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        policy, reference = errors(g, drawn), errors(g, drawn, "reference")
    assert magnitudes == {torch.float32}
    torch.testing.assert_close(policy, reference, atol=1e-6, rtol=1e-6)


def test_dora_plans_on_the_meta_device(tiny: dict[str, Path]) -> None:
    """Planning counts its magnitudes: one number a row of each adapted layer."""
    from t2i_align.generators.diffusers_family import DiffusersGenerator
    from t2i_align.generators.diffusers_options import DiffusersOptions

    counts = []
    for dora in (False, True):
        options = {"name_or_path": str(tiny["sdxl"]), "resolution": 64, "lora": lora(use_dora=dora)}
        g = DiffusersGenerator(DiffusersOptions.model_validate(options), "meta")
        g.load_module(0, reference=True)
        trained = g.views.trained()
        counts.append(sum(p.numel() for p in trained.values()))
        rows = sum(len(p) for n, p in trained.items() if "lora_B" in n)
    assert counts[1] - counts[0] == rows
