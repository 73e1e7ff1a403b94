"""Attention kernels tried before they are used; torch.compile block by block and whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_files import write_recipe
from torch import Tensor, nn

from t2i_align import checks
from t2i_align.errors import ModelError, RecipeError, TrainingError
from t2i_align.generators import attention
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.attention import choose, compare, set_attention, unusable
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.views import Views
from t2i_align.recipe import load_recipe
from t2i_align.train.compiled import compile_views, missing_compiler, repeated_blocks
from tests.denoisers import errors, event, folders, generator, train_adapters
from tests.tiny_flux import chroma as masking
from tests.tiny_flux import flux as build

CPU, FLOAT, HALF = torch.device("cpu"), torch.float32, torch.float16
LORA = LoraOptions(r=2, lora_alpha=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("tiny"), "sdxl", "sd3")


# -- attention


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt d) v of ``(batch, tokens, heads, channels)``, written out."""
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v)


def qkv() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 16, 2, 32, requires_grad=True) for _ in range(3)]


def test_the_probe_passes_attention_and_nothing_else() -> None:
    """A kernel without the scale, with a wrong gradient, or that gives NaN does not pass."""
    assert unusable("sdpa", "cpu", FLOAT) is None
    assert compare(plain, qkv()) is None
    unscaled = compare(lambda q, k, v: plain(q * 2, k, v), qkv())
    assert unscaled is not None and unscaled.startswith("its output differs from plain attention")
    halved = compare(lambda q, k, v: plain(q, k, v / 2 + (v / 2).detach()), qkv())
    assert halved is not None and halved.startswith("its value differs")
    broken = compare(lambda q, k, v: plain(q, k, v) * float("nan"), qkv())
    assert broken is not None and broken.endswith("by nan")


@pytest.mark.parametrize(
    ("kernel", "install"),
    [("xformers", r'pip install "t2i-align\[xformers\]'), ("flash", "pip install flash-attn")],
)
def test_a_missing_package_is_the_reason(
    kernel: Any, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "version_of", lambda dist: None)
    with pytest.raises(ModelError, match=rf"{kernel} is not usable: the package .* {install}"):
        choose(kernel, "cpu", FLOAT)


@pytest.mark.parametrize("kernel", ["xformers", "flash"])
def test_a_kernel_that_does_not_run_here_says_why(
    kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is there, its kernel raises: the first line of that is the reason."""

    def no_kernel(*_: Tensor) -> Tensor:
        raise NotImplementedError("No operator found\nfor these inputs")

    monkeypatch.setattr(attention, "version_of", lambda dist: "1.0")
    monkeypatch.setattr(attention, "resolve", lambda name: no_kernel)
    with pytest.raises(ModelError, match="on cpu in float16: No operator found\n  fix: set model"):
        choose(kernel, "cpu", HALF)
    assert choose("auto", "cpu", HALF) == "sdpa"


def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "version_of", lambda dist: "1.0" if dist == "xformers" else None)
    monkeypatch.setattr(attention, "resolve", lambda name: plain)
    assert choose("auto", "cpu", FLOAT) == "xformers"
    monkeypatch.setattr(attention, "version_of", lambda dist: "1.0")
    assert choose("auto", "cpu", FLOAT) == "flash"


def test_what_is_not_installed_here_is_refused_by_validate_and_train(tmp_path: Path) -> None:
    """The real probe of this machine: neither package is in the test environment."""
    path = write_recipe(tmp_path)
    for kernel in ("xformers", "flash"):
        if attention.version_of(attention.PACKAGES[kernel]) is not None:
            continue
        recipe = load_recipe(path, [f"model.attention={kernel}"])  # may be written here
        assert list(checks.run_machine(recipe, cuda=False)) == ["attention-backend"]
        with pytest.raises(RecipeError, match=rf"got '{kernel}', which is not usable: the package"):
            load_recipe(path, [f"model.attention={kernel}"], cuda=False)
    assert load_recipe(path, ["model.attention=auto"], cuda=False)


class Processor:
    """An attention processor of the kind that asks diffusers' switch."""

    _attention_backend = None


class Switched(nn.Module):
    """A network that notes what was switched on."""

    def __init__(self, processor: object) -> None:
        """One layer of attention."""
        super().__init__()
        self.layer: Any = nn.Identity()
        self.layer.processor = processor
        self.asked: list[str] = []

    def set_attention_backend(self, name: str) -> None:
        """Diffusers' dispatcher."""
        self.asked.append(name)

    def enable_xformers_memory_efficient_attention(self) -> None:
        """The older switch."""
        self.asked.append("older switch")


def test_the_networks_own_switch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatching layers by name, UNets and SD3 by the older switch; flash only by name."""
    monkeypatch.setattr(attention, "unusable", lambda *_: None)
    new, old = Switched(Processor()), Switched(object())
    choices: list[Any] = ["sdpa", "xformers", "flash", "auto"]
    for choice in choices:
        set_attention(new, choice, CPU, FLOAT)
    assert new.asked == ["xformers", "flash", "flash"]
    assert [set_attention(old, c, CPU, FLOAT) for c in ("sdpa", "xformers", "auto")] == [
        "sdpa",
        "xformers",
        "xformers",
    ]
    assert old.asked == ["older switch"] * 2


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_no_switch_for_flash_is_said_while_planning(family: str, tiny: dict[str, Path]) -> None:
    from t2i_align.generators.diffusers_family import DiffusersGenerator
    from t2i_align.generators.diffusers_options import DiffusersOptions

    options = {"name_or_path": str(tiny[family]), "resolution": 64, "attention": "flash"}
    g = DiffusersGenerator(DiffusersOptions.model_validate(options), "meta")
    with pytest.raises(
        ModelError, match=r"has no switch for flash\n  fix: set model.attention: sd"
    ):
        g.load_module(0, reference=False)


@pytest.mark.parametrize("masked", [False, True])
def test_flash_is_not_given_a_mask(
    masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backend raises at the first masked call, so such a family gets another kernel before."""
    monkeypatch.setattr(attention, "unusable", lambda *_: None)
    used: list[str] = []
    net = generator(build(tmp_path / "flux")).module.to(HALF)
    monkeypatch.setattr(type(net), "set_attention_backend", lambda self, name: used.append(name))
    assert set_attention(net, "auto", CPU, HALF, masked=masked) == used[0]
    assert used == (["xformers"] if masked else ["flash"])
    if masked:
        with pytest.raises(ModelError, match="flash takes no mask"):
            set_attention(net, "flash", CPU, HALF, masked=True)


def test_families_that_mask_their_text_say_so(tmp_path: Path) -> None:
    """Chroma's call has a mask, FLUX's has none; told while planning."""
    flux, chroma = (made(tmp_path / made.__name__) for made in (build, masking))
    options = {"resolution": 64, "attention": "flash"}
    DiffusersGenerator(DiffusersOptions(name_or_path=str(flux), **options), "meta").load_module(
        0, reference=False
    )
    with pytest.raises(ModelError, match="flash takes no mask"):
        DiffusersGenerator(
            DiffusersOptions(name_or_path=str(chroma), **options), "meta"
        ).load_module(0, reference=False)


def test_real_dispatching_layers_are_recognised(tiny: dict[str, Path]) -> None:
    from diffusers import FluxTransformer2DModel

    flux = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    assert attention.dispatches(flux)
    assert not attention.dispatches(generator(tiny["sdxl"]).module)


def test_the_probes_precision_is_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast decides what attention sees, else the weights do."""
    asked: list[torch.dtype] = []
    monkeypatch.setattr(attention, "unusable", lambda kernel, device, dtype: asked.append(dtype))
    path = write_recipe(tmp_path)
    for extra in (["train.mixed_precision=bf16"], ["model.dtype=float16"], []):
        load_recipe(path, ["model.attention=xformers", *extra], cuda=False)
    assert asked == [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize(("own", "mixed"), [(FLOAT, True), (HALF, False)])
def test_kernels_outside_autocast_are_not_given_two_precisions(
    own: torch.dtype, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of queries and keys answer in float32 beside values in half precision."""
    from diffusers.models.attention_processor import Attention

    net = Attention(query_dim=8, heads=2, dim_head=4, qk_norm="rms_norm").to(own)
    x = torch.randn(1, 3, 8, dtype=own)
    with torch.autocast("cpu", HALF):
        key = net.norm_k(net.to_k(x).unflatten(-1, (2, 4)))  # type: ignore[operator,misc]
        assert (key.dtype != net.to_v(x).dtype) == mixed  # type: ignore[operator,union-attr]
    assert attention.mixes(net, HALF) == mixed
    plain = Attention(query_dim=8, heads=2, dim_head=4)
    assert not attention.mixes(plain, HALF)
    monkeypatch.setattr(attention, "unusable", lambda *_: None)
    used: list[str] = []
    monkeypatch.setattr(attention, "dispatches", lambda _: True)
    monkeypatch.setattr(net, "set_attention_backend", used.append, raising=False)
    if mixed:
        assert set_attention(net, "auto", CPU, HALF) == "sdpa" and used == []
        with pytest.raises(ModelError, match="flash takes one precision"):
            set_attention(net, "flash", CPU, HALF)
    else:
        assert set_attention(net, "auto", CPU, HALF) == "flash" and used == ["flash"]


def test_what_validation_probes_is_what_loading_probes(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel of half precision under autocast over float32 weights: both say yes.

    Without autocast both say no, and `auto` passes it over.
    """
    from accelerate.state import AcceleratorState
    from rich.console import Console

    from t2i_align.train.setup import Setup

    def only_half(kernel: str, device: str, dtype: torch.dtype) -> str | None:
        half = dtype == torch.bfloat16 and kernel == "xformers"
        return None if half or kernel == "sdpa" else "half precision alone"

    monkeypatch.setattr(attention, "unusable", only_half)
    used: list[str] = []
    monkeypatch.setattr(
        "diffusers.UNet2DConditionModel.enable_xformers_memory_efficient_attention",
        lambda self: used.append("xformers"),
    )
    path = write_recipe(tmp_path)
    where = [f"model.name_or_path={tiny['sdxl']}", "model.resolution=64"]
    for precision, works in (("bf16", True), ("no", False)):
        for choice in ("xformers", "auto"):
            asked = [*where, f"model.attention={choice}", f"train.mixed_precision={precision}"]
            recipe = load_recipe(path, asked)
            AcceleratorState._reset_state(reset_partial_state=True)
            made = Setup(recipe, Console(quiet=True), claim=False).generator()
            used.clear()
            if works or choice == "auto":
                assert list(checks.run_machine(recipe, cuda=False)) == []
                made.load_module(0, reference=False)
                assert used == (["xformers"] if works else [])
            else:
                assert list(checks.run_machine(recipe, cuda=False)) == ["attention-backend"]
                with pytest.raises(ModelError, match="half precision alone"):
                    made.load_module(0, reference=False)
    AcceleratorState._reset_state(reset_partial_state=True)


# -- torch.compile


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert missing_compiler("cpu") == (
        "torch.compile needs a C++ compiler on cpu: no g++, clang++, c++, and $CXX names none"
    )
    assert "a C compiler on cuda: no gcc, clang, cc" in (missing_compiler("cuda") or "")
    with pytest.raises(
        RecipeError, match=r"train.compile: got 'regional', but torch.compile needs"
    ):
        load_recipe(path, ["train.compile=regional"], cuda=False)
    recipe = load_recipe(path, ["train.compile=regional"])
    assert list(checks.run_machine(recipe, cuda=False)) == ["compile-toolchain"]
    assert load_recipe(path, cuda=False)
    monkeypatch.setenv("CXX", "my-c++")
    assert "no my-c++ ($CXX)" in (missing_compiler("cpu") or "")
    (tmp_path / "my-c++").touch(mode=0o755)
    assert missing_compiler("cpu") is None


def test_blocks_to_compile_are_the_repeated_ones(tiny: dict[str, Path]) -> None:
    """Both joint blocks of SD3; the transformer blocks of SDXL, wherever in the UNet they are."""
    kinds = {
        family: [type(b).__name__ for b in repeated_blocks(generator(tiny[family]).module)]
        for family in ("sd3", "sdxl")
    }
    assert kinds["sd3"] == ["JointTransformerBlock"] * 2
    assert set(kinds["sdxl"]) == {"BasicTransformerBlock"} and len(kinds["sdxl"]) > 3


def test_a_network_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(TrainingError, match="Linear names no repeated blocks to compile"):
        compile_views(Views(nn.Linear(2, 2), None), "regional")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code of other tests is forgotten, and ours after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", ["regional", "full"])
def test_compiled_is_eager(how: Any, tiny: dict[str, Path]) -> None:
    """Loss and gradients of policy and reference agree; prompts are still encoded afterwards."""
    eager, compiled = (generator(tiny["sd3"], lora=LORA) for _ in range(2))
    compile_views(compiled.views, how)
    drawn, seen = event(eager), []
    for g in (eager, compiled):
        train_adapters(g)
        with torch.no_grad():
            reference = errors(g, drawn, "reference")
        loss = (errors(g, drawn) - reference).sum()
        loss.backward()
        grads = {k: p.grad for k, p in g.views.trained().items() if p.grad is not None}
        seen.append({"loss": loss.detach(), "reference": reference, **grads})
    assert seen[0].keys() == seen[1].keys()
    assert compiled.views.trained().keys() == eager.views.trained().keys()
    for name, value in seen[0].items():
        torch.testing.assert_close(seen[1][name], value, atol=1e-4, rtol=1e-4)
    for a, b in zip(compiled.encode_prompts(["a"]), eager.encode_prompts(["a"]), strict=True):
        for name, value in b.items():
            assert torch.equal(a[name], value)
