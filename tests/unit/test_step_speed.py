"""What a step does not do twice or wait for: one forward, reading ahead, formats, no talk."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from t2i_align.generators.views import Views
from t2i_align.recipe import Recipe, load_recipe
from t2i_align.train.engine import Engine
from t2i_align.train.options import TrainOptions
from tests import measuring, runs
from tests.runs import forget_precision
from tests.tiny import pipeline_folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL, eight pairs, and their cache."""
    folder = tmp_path_factory.mktemp("speed")
    pipeline_folder("sdxl", folder / "m")
    runs.pickapic(folder / "pairs.parquet", 8)
    return folder


def recipe(files: Path, where: Path, name: str, *, lora: bool = True, **train: Any) -> Recipe:
    model: dict[str, Any] = {"name_or_path": str(files / "m"), "resolution": 64}
    if lora:
        model["lora"] = {"r": 2, "lora_alpha": 4}
    sections = {
        "model": model,
        "data": {"type": "pickapic", "path": str(files / "pairs.parquet")},
        "objective": {"type": "dpo", "beta": 50.0},  # 5000 would show the last bits of an error
        "cache": {"dir": str(files / "cache")},
        "train": {"report_to": "none", "max_train_steps": 3, "train_batch_size": 2, **train},
    }
    return load_recipe(runs.write_recipe(where, name, sections))


def test_one_forward_a_view_for_winners_and_losers(files: Path, tmp_path: Path) -> None:
    """Two pairs a micro-batch: four items in each of two calls."""
    run = measuring.started(recipe(files, tmp_path, "fused"))
    sizes: list[int] = []

    def called(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        sizes.append(len(given["sample"]))

    run.generator.module.register_forward_pre_hook(called, with_kwargs=True)
    run._step()
    run.feed.close()
    assert sizes == [4, 4]


def test_the_next_batch_is_read_by_another_thread(files: Path, tmp_path: Path) -> None:
    """Handing out a batch has asked for the one after it; a step waits for no reading thread."""
    run = measuring.started(recipe(files, tmp_path, "ahead"))
    feed: Any = run.feed
    asked: list[tuple[int, bool]] = []
    load, begun = feed._load, threading.Event()

    def noted(at: int) -> Any:
        asked.append((at, threading.current_thread() is threading.main_thread()))
        begun.set()
        return load(at)

    feed._load = noted
    feed.next()
    assert begun.wait(timeout=30)
    feed.close()
    assert asked == [(2, False)]


def convolutions(net: nn.Module) -> list[Tensor]:
    """Weights with more than one channel and pixel, in which a format shows."""
    found = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    return [w for w in found if w.shape[1] > 1 and w.shape[2] > 1]


def test_channels_last_is_a_format_and_no_other_loss(files: Path, tmp_path: Path) -> None:
    """Policy and frozen copy are stored so, and three steps of full training are the same."""
    curves = []
    for last in (False, True):
        name = f"last-{last}"
        run = measuring.started(
            recipe(files, tmp_path, name, lora=False, channels_last=last, adam_epsilon=1e-4)
        )
        assert run.generator.views.reference is not None
        for net in (run.generator.module, run.generator.views.reference):
            kernels = convolutions(net)
            format_ = torch.channels_last if last else torch.contiguous_format
            assert kernels and all(w.is_contiguous(memory_format=format_) for w in kernels)
        curves.append([run._step()["loss"] for _ in range(3)])
        run.feed.close()
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert len(set(curves[0])) == 3


def test_adamw_is_fused(files: Path, tmp_path: Path) -> None:
    run = measuring.started(recipe(files, tmp_path, "fused-adamw"))
    run.feed.close()
    assert all(group["fused"] for group in run.engine.optimizer.param_groups)


@pytest.fixture
def group(tmp_path: Path) -> Any:
    """A process group of one, on gloo."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_processes_talk_on_a_steps_last_micro_batch_only(
    group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three micro-batches, one reduction; gradients are of all three."""
    forget_precision()
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    engine = Engine(TrainOptions(), Views(net, None), Accelerator(cpu=True), 3)
    monkeypatch.setattr(Accelerator, "use_distributed", property(lambda _: True))
    wrapped = DistributedDataParallel(net)
    engine.views.wrapped = wrapped
    talks: list[int] = []

    def reduced(_: Any, bucket: Any) -> Any:
        talks.append(1)
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    reduced.__annotations__.clear()  # they are texts here, which torch does not read
    wrapped.register_comm_hook(None, reduced)
    xs = torch.randn(3, 2, 3)
    for k, x in enumerate(xs):
        with engine.micro(last=k == 2):
            engine.backward(wrapped(x).sum())
        assert len(talks) == (k == 2)
    assert net.weight.grad is not None
    torch.testing.assert_close(net.weight.grad, xs.sum((0, 1))[None])
