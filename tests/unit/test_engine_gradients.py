"""The engine's gradient step: the norm, what is clipped, and what is said when it is no number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from t2i_align.generators.views import Views
from t2i_align.train.engine import Engine
from t2i_align.train.options import TrainOptions


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.ModuleDict({"proj": nn.Linear(3, 2)})


def engine(**options: Any) -> Engine:
    torch.manual_seed(0)
    chosen = TrainOptions.model_validate({"report_to": "none", "learning_rate": 0.1} | options)
    return Engine(chosen, Views(Net(), None), Accelerator(cpu=True), 4)


def fill(run: Engine, value: float) -> float:
    """Every gradient to one value; their norm, in closed form."""
    num = 0
    for p in run.trained.values():
        p.grad = torch.full_like(p, value)
        num += p.numel()
    return abs(value) * math.sqrt(num)


@pytest.mark.parametrize("limit", [None, 0.5, 1e6])
def test_norm_is_before_clipping_and_the_direction_stays(limit: float | None) -> None:
    """20 equal gradients g: norm |g| sqrt 20; clipped to limit / sqrt 20 each, never raised."""
    run = engine(max_grad_norm=limit)
    norm = fill(run, -3.0)
    seen: list[float] = []
    run.optimizer.step = lambda: seen.extend(
        x for g in run._gradients().values() for x in g.flatten().tolist()
    )
    assert run.step(4) == pytest.approx(norm, rel=1e-6)
    expected = -3.0 if limit is None or limit > norm else -limit / math.sqrt(20)
    assert len(seen) == 20 and seen == pytest.approx([expected] * 20, rel=1e-5)
    assert (run.step_count, run.samples_seen) == (1, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_gradient_names_its_module_and_touches_nothing(bad: float) -> None:
    run = engine(max_grad_norm=1.0)
    before = {k: p.detach().clone() for k, p in run.trained.items()}
    fill(run, 1.0)
    run.trained["second.proj.weight"].grad[1, 2] = bad  # type: ignore[index]
    with pytest.raises(FloatingPointError, match=rf"^gradient norm {bad}, in second\.proj$"):
        run.step(4)
    assert all(torch.equal(before[k], p) for k, p in run.trained.items())
    assert run.trained["first.weight"].grad.eq(1.0).all(), "nothing was clipped"  # type: ignore[union-attr]
    assert (run.step_count, run.samples_seen) == (0, 0)


def test_of_several_the_one_nearest_to_the_loss_is_named() -> None:
    """A broken activation breaks every gradient before it, so the last module is the lead."""
    run = engine()
    fill(run, float("nan"))
    with pytest.raises(FloatingPointError, match=r"in second\.proj and 3 other parameters"):
        run.step(4)
