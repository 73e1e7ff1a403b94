"""The trunk that policy and reference share: the same numbers, fewer FLOPs, an earlier end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from t2i_align.contract import Event
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.lora_targets import block_names
from t2i_align.generators.trunk import Trunk, parts
from t2i_align.generators.views import Views, add_lora, build_views
from t2i_align.recipe import Recipe, load_recipe
from t2i_align.train.compiled import compile_views
from t2i_align.train.plan import plan
from tests import measuring, runs
from tests.denoisers import errors, event, folders, generator, train_adapters
from tests.tiny import pipeline_folder

# of SDXL: down 0 has no attention, so no adapter; 1 and 2 are a down and the mid block, 3 an up one
CASES = [("sdxl", 1), ("sdxl", 2), ("sdxl", 3), ("sd3", 1)]
IDS = [f"{family}-{k}" for family, k in CASES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders(tmp_path_factory.mktemp("tiny"), "sdxl", "sd3")


def made(folder: Path, k: int | None, **model: Any) -> tuple[DiffusersGenerator, Event]:
    """A generator with moved adapters from block k on, and an event."""
    lora = {"r": 2, "lora_alpha": 4, "from_block": k}
    g = generator(folder, lora=lora, **model)
    train_adapters(g)
    return g, event(g)


def step(
    g: DiffusersGenerator, drawn: Event, *, shared: bool, first: str = "reference"
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """Errors by view, gradients, and FLOPs of forwards and backward, of one step."""
    trunk, flops = g.views.trunk, {}
    g.views.trunk = trunk if shared else None
    found: dict[str, Tensor] = {}
    with g.views.sharing():
        for view in ("reference", "policy") if first == "reference" else ("policy", "reference"):
            with (
                FlopCounterMode(display=False) as counter,
                torch.set_grad_enabled(view == "policy"),
            ):
                found[view] = errors(g, drawn, view)
            flops[view] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        found["policy"].sum().backward()
    flops["backward"] = counter.get_total_flops()
    g.views.trunk = trunk
    grads = {k: p.grad.clone() for k, p in g.views.trained().items() if p.grad is not None}
    g.module.zero_grad(set_to_none=True)
    return {k: v.detach() for k, v in found.items()}, grads, flops


def block_flops(g: DiffusersGenerator, drawn: Event, k: int) -> int:
    """FLOPs of the blocks before block k, by the modules' names."""
    counter = FlopCounterMode(display=False)
    spent = {"at": 0, "blocks": 0}

    def enter(*_: Any) -> None:
        spent["at"] = counter.get_total_flops()

    def leave(*_: Any) -> None:
        spent["blocks"] += counter.get_total_flops() - spent["at"]

    blocks = [g.module.get_submodule(name) for name in block_names(g.module)[:k]]
    hooks = [b.register_forward_pre_hook(enter) for b in blocks]
    hooks += [b.register_forward_hook(leave) for b in blocks]
    with counter, torch.no_grad():
        errors(g, drawn)
    for hook in hooks:
        hook.remove()
    return spent["blocks"]


def trunk_flops(g: DiffusersGenerator, drawn: Event) -> int:
    """FLOPs of every unit's calls that end before the first adapted layer, without sharing."""
    counter = FlopCounterMode(display=False)
    spent = {"at": 0, "trunk": 0, "below": 1}
    assert g.views.trunk is not None
    units, adapted = g.views.trunk.units, g.views.trunk.adapted

    def enter(*_: Any) -> None:
        spent["at"] = counter.get_total_flops()

    def leave(*_: Any) -> None:
        spent["trunk"] += spent["below"] * (counter.get_total_flops() - spent["at"])

    def head(*_: Any) -> None:
        spent["below"] = 0

    hooks = [h for u in units for h in (u.register_forward_pre_hook(enter),)]
    hooks += [u.register_forward_hook(leave) for u in units]
    hooks += [a.register_forward_pre_hook(head) for a in adapted]
    with counter, torch.no_grad():
        errors(g, drawn)
    for hook in hooks:
        hook.remove()
    return spent["trunk"]


@pytest.mark.parametrize(("family", "k"), CASES, ids=IDS)
def test_shared_equals_plain_bit_for_bit(family: str, k: int, tiny: dict[str, Path]) -> None:
    """Errors of both views and every gradient; the views differ, or it would show nothing."""
    g, drawn = made(tiny[family], k)
    plain, plain_grads, _ = step(g, drawn, shared=False)
    shared, grads, _ = step(g, drawn, shared=True)
    assert not torch.equal(plain["policy"], plain["reference"])
    assert all(torch.equal(plain[v], shared[v]) for v in ("policy", "reference"))
    assert plain_grads.keys() == grads.keys() == g.views.trained().keys()
    assert all(torch.equal(plain_grads[n], grads[n]) for n in grads)


@pytest.mark.parametrize(("family", "k"), CASES, ids=IDS)
def test_the_second_view_lacks_the_trunk_alone(family: str, k: int, tiny: dict[str, Path]) -> None:
    """Eq. (2): the trunk's FLOPs are saved, to the last one, in the second view's forward."""
    g, drawn = made(tiny[family], k)
    _, _, plain = step(g, drawn, shared=False)
    _, _, shared = step(g, drawn, shared=True)
    trunk = trunk_flops(g, drawn)
    assert trunk >= block_flops(g, drawn, k) > 0
    assert shared == plain | {"policy": plain["policy"] - trunk}


def test_the_trunk_grows_with_the_block_and_the_backward_pass_shrinks(
    tiny: dict[str, Path],
) -> None:
    """From block 0, 2 and 3 of a UNet."""
    found = []
    for k in (0, 2, 3):
        g, drawn = made(tiny["sdxl"], k)
        found.append((trunk_flops(g, drawn), step(g, drawn, shared=True)[2]["backward"]))
    assert found[0][0] < found[1][0] < found[2][0]
    assert found[0][1] > found[1][1] > found[2][1]


def test_the_policy_may_come_first(tiny: dict[str, Path]) -> None:
    g, drawn = made(tiny["sdxl"], 3)
    plain, plain_grads, flops = step(g, drawn, shared=False)
    shared, grads, fewer = step(g, drawn, shared=True, first="policy")
    assert all(torch.equal(plain[v], shared[v]) for v in plain)
    assert all(torch.equal(plain_grads[n], grads[n]) for n in grads)
    assert fewer["reference"] == flops["reference"] - trunk_flops(g, drawn)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_recomputed_blocks_share_too(family: str, tiny: dict[str, Path]) -> None:
    """Recomputation runs when nothing is shared any more, and gives the same gradients."""
    g, drawn = made(tiny[family], 1)
    _, grads, _ = step(g, drawn, shared=True)
    lean, drawn = made(tiny[family], 1, gradient_checkpointing=True)
    lean.module.train()
    _, again, _ = step(lean, drawn, shared=True)
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad)


def test_nothing_is_left_behind(tiny: dict[str, Path]) -> None:
    """Modules have their own forward again, after an error too; the next event is scored anew."""
    g, drawn = made(tiny["sdxl"], 3)
    assert g.views.trunk is not None
    units = g.views.trunk.units
    with pytest.raises(KeyError), g.views.sharing():
        assert any("forward" in u.__dict__ for u in units)
        raise KeyError
    assert not any("forward" in m.__dict__ for m in g.module.modules())
    assert not any(m._forward_pre_hooks for m in g.module.modules())
    other = Event(**{**vars(drawn), "x_t": drawn.x_t + 1.0})  # type: ignore[operator]
    step(g, drawn, shared=True)
    assert not torch.equal(step(g, other, shared=True)[0]["policy"], errors(g, drawn).detach())
    assert torch.equal(step(g, other, shared=True)[0]["policy"], errors(g, other).detach())


class Net(nn.Module):
    """Two layers of which the second is adapted; what is between may be written into."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(4, 4), nn.Linear(4, 4)
        self.ran = 0
        self.low.register_forward_pre_hook(lambda *_: None)
        self.in_place = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.low(x)
        if self.in_place:
            h += 1.0
        return self.high(h)


def small(*, in_place: bool = False) -> Views:
    torch.manual_seed(0)
    net = Net()
    net.in_place = in_place
    lora = LoraOptions.model_validate({"r": 2, "lora_alpha": 4, "target_modules": ["high"]})
    views = build_views(net, lora, [], 0, reference=True)
    views.trunk = Trunk(views.module)
    return views


def scores(views: Views, x: Tensor) -> dict[str, Tensor]:
    found = {}
    with views.sharing():
        for view in ("reference", "policy"):
            with views.use(view) as net, torch.set_grad_enabled(view == "policy"):
                found[view] = net(x)
    return found


def test_an_output_that_was_written_into_is_not_taken() -> None:
    """In place, the second view would get it changed twice."""
    x = torch.randn(3, 4)
    views = small(in_place=True)
    found = scores(views, x)
    with views.use("policy") as net:
        assert torch.equal(found["policy"], net(x))
    torch.testing.assert_close(found["reference"], found["policy"])  # B is zero


def test_other_inputs_of_a_view_are_refused() -> None:
    views = small()
    with (
        pytest.raises(RuntimeError, match="call 0 of view policy has other inputs"),
        views.sharing(),
    ):
        with views.use("reference") as net:
            net(torch.randn(3, 4))
        with views.use("policy") as net:
            net(torch.randn(2, 4))


def test_calls_are_matched_in_order() -> None:
    """Two calls a view, as with guidance: the second is not given the first's trunk."""
    views, xs = small(), [torch.randn(3, 4), torch.randn(3, 4)]
    with views.sharing(), torch.no_grad():
        found = {}
        for view in ("reference", "policy"):
            with views.use(view) as net:
                found[view] = [net(x) for x in xs]
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
    with views.use("policy") as net, torch.no_grad():
        assert all(torch.equal(a, net(x)) for a, x in zip(found["policy"], xs, strict=True))


def test_units_are_the_largest_modules_that_no_view_changes(tiny: dict[str, Path]) -> None:
    g, _ = made(tiny["sdxl"], 3)
    units, adapted = parts(g.module)
    names = {id(m): n for n, m in g.module.named_modules()}
    found = [names[id(u)] for u in units]
    assert {"conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1"} <= set(found)
    assert all(names[id(a)].startswith("up_blocks.0") for a in adapted)


def test_when_there_is_a_trunk(tiny: dict[str, Path]) -> None:
    """Adapters from a block on, and the reference is the policy without them; not compiled."""
    lora: dict[str, Any] = {"r": 2, "lora_alpha": 2}
    assert generator(tiny["sdxl"], lora=lora).views.trunk is None
    from_2 = lora | {"from_block": 2}
    assert generator(tiny["sdxl"], lora=from_2, reference_mode="frozen_copy").views.trunk is None
    views = generator(tiny["sdxl"], lora=from_2).views
    assert views.trunk is not None
    compile_views(views, "full")
    assert views.trunk is None


def test_a_copy_of_the_network_is_its_own(tiny: dict[str, Path]) -> None:
    """Sharing changes no module for good, so a copy calls its own layers."""
    net = Net()
    add_lora(
        net,
        LoraOptions.model_validate({"r": 2, "lora_alpha": 4, "target_modules": ["high"]}),
        [],
        0,
    )
    trunk = Trunk(net)
    with trunk.shared():
        net(torch.zeros(1, 4))
    other = copy.deepcopy(net)
    other.low.bias.data += 1.0
    assert not torch.equal(net(torch.zeros(1, 4)), other(torch.zeros(1, 4)))


def run_recipe(folder: Path, k: int, **train: Any) -> Recipe:
    model = {
        "name_or_path": str(pipeline_folder("sdxl", folder / "m")),
        "resolution": 64,
        "lora": {"r": 2, "lora_alpha": 4, "from_block": k},
    }
    data = {"type": "pickapic", "path": str(runs.pickapic(folder / "pairs.parquet", 6))}
    sections = {
        "model": model,
        "data": data,
        "objective": {"type": "dpo"},
        "cache": {"dir": str(folder / "cache")},
        "train": {"report_to": "none", "max_train_steps": 4, "learning_rate": 1e-2, **train},
    }
    return load_recipe(runs.write_recipe(folder, f"run{k}", sections))


def test_a_run_with_a_shared_trunk_is_the_plain_run(tmp_path: Path) -> None:
    """Trained weights after three steps are the same, and the plan knows what a record costs."""
    recipe = run_recipe(tmp_path, 3)
    found, weights, cost = plan(recipe, "cpu"), [], []
    for shared in (True, False):
        run = measuring.started(recipe)
        if not shared:
            run.generator.views.trunk = None
        cost.append(measuring.flops(run, 3) / 3)
        run.feed.close()
        weights.append({n: p.detach().clone() for n, p in run.engine.trained.items()})
        for path in (tmp_path / "run3").glob("*"):
            if path.is_file():
                path.unlink()
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert cost[0] < cost[1]
    assert found.flops_per_record == pytest.approx(cost[0], rel=0.02)
    assert found.flops["reference"] * 2 > cost[1] - cost[0]
