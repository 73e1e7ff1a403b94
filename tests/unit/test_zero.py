"""DeepSpeed's configuration is a function of the recipe; what it would ignore or break is refused.

Runs of it are in ``tests/gpu/test_zero.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from t2i_align.checks import run_machine
from t2i_align.errors import MissingDependencyError, RecipeError
from t2i_align.optional import version_of
from t2i_align.recipe import load_recipe
from t2i_align.train.options import TrainOptions
from t2i_align.train.zero import FEATURE, config
from tests import runs

RUNNER = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
ABSENT = version_of("deepspeed") is None


def made(how: dict[str, Any], **train: Any) -> dict[str, Any]:
    backend = {"backend": "deepspeed"} | how
    return config(TrainOptions.model_validate({"distributed": backend, **train}))


def test_the_whole_configuration_of_a_plain_recipe() -> None:
    """Stage 2, float32, the default clipping; the optimizer and the schedule are handed over."""
    assert made({}) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
    }


@pytest.mark.parametrize(
    ("how", "train", "key", "value"),
    [
        ({}, {"train_batch_size": 3}, "train_micro_batch_size_per_gpu", 3),
        ({}, {"gradient_accumulation_steps": 5}, "gradient_accumulation_steps", 5),
        ({}, {"max_grad_norm": 0.25}, "gradient_clipping", 0.25),
        ({}, {"max_grad_norm": None}, "gradient_clipping", 0.0),
        ({"zero_stage": 2}, {}, "zero_optimization", {"stage": 2}),
        ({"zero_stage": 3}, {}, "zero_optimization", {"stage": 3}),
        (
            {},
            {"mixed_precision": "bf16"},
            "torch_autocast",
            {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        ),
        (
            {"zero_stage": 3, "offload_parameters": True},
            {},
            "zero_optimization",
            {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}},
        ),
        (
            {"offload_optimizer": True},
            {},
            "zero_optimization",
            {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        ),
        ({"offload_optimizer": True}, {}, "zero_force_ds_cpu_optimizer", False),
    ],
)
def test_each_option_has_its_key_and_no_other(
    how: dict[str, Any], train: dict[str, Any], key: str, value: Any
) -> None:
    found, plain = made(how, **train), made({})
    assert found[key] == value
    also = {"zero_optimization", "zero_force_ds_cpu_optimizer"} if "offload" in str(how) else {key}
    assert {k for k in found.keys() | plain.keys() if found.get(k) != plain.get(k)} <= also | {key}


def test_no_section_rounds_weights_or_takes_the_optimizer() -> None:
    """``bf16`` would round what is trained; ``optimizer`` and ``scheduler`` are torch's."""
    for half in ("no", "bf16"):
        found = made({"zero_stage": 3}, mixed_precision=half)
        assert not {"bf16", "fp16", "optimizer", "scheduler", "amp"} & found.keys()
        assert json.loads(json.dumps(found)) == found


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    runs.point_model(tmp_path / "model")
    data = runs.point_pairs(tmp_path / "pairs.jsonl", 4, seed=0)
    how = {"backend": "deepspeed", "zero_stage": 3}
    sections = runs.voxel_sections(
        tmp_path / "model", data, tmp_path / "cache", train_batch_size=2, distributed=how
    )
    return runs.write_recipe(tmp_path, "run", sections)


@pytest.mark.parametrize(
    ("override", "key", "stages"),
    [
        ("train.optimizer=adafactor", "train.optimizer", (2, 3)),
        ("train.mixed_precision=fp16", "train.mixed_precision", (2, 3)),
        ("train.max_skipped_steps=1", "train.max_skipped_steps", (2, 3)),
        ("train.channels_last=true", "train.channels_last", (2, 3)),
        ("train.compile=regional", "train.compile", (2, 3)),
        ("rounds={data: [{path: pairs.jsonl}]}", "rounds", (2, 3)),
        ("train.ema_decay=0.9", "train.ema_decay", (3,)),
        ("model.lora={r: 4, from_block: 1}", "model.lora.from_block", (3,)),
        ("reference.refresh=hard", "reference.refresh", (3,)),
        ("validation={prompts: [p], validation_steps: 5}", "validation", (3,)),
    ],
)
def test_what_it_would_break_is_refused(
    recipe: Path, override: str, key: str, stages: tuple[int, ...]
) -> None:
    for stage in (2, 3):
        overrides = [override, f"train.distributed.zero_stage={stage}"]
        try:
            load_recipe(recipe, overrides)
            keys = set()
        except RecipeError as error:
            found = [p for p in error.problems if "train.distributed.backend deepspeed" in str(p)]
            keys = {p.key for p in found}
            assert all(p.message and p.fix for p in found)
        assert keys == ({key} if stage in stages else set()), stage


def test_its_options_are_refused_elsewhere(recipe: Path) -> None:
    for override, key in (
        ("train.distributed={backend: ddp, zero_stage: 2}", "train.distributed.zero_stage"),
        (
            "train.distributed={backend: fsdp2, offload_optimizer: true}",
            "train.distributed.offload_optimizer",
        ),
        (
            "train.distributed={backend: deepspeed, offload_parameters: true}",
            "train.distributed.offload_parameters",
        ),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, [override])
        assert [p.key for p in caught.value.problems] == [key]


@pytest.mark.skipif(not ABSENT, reason="deepspeed is installed")
def test_a_machine_without_it_or_without_cuda_is_told(recipe: Path) -> None:
    from t2i_align.train.zero import Zero

    loaded = load_recipe(recipe)
    assert set(run_machine(loaded, cuda=True)) == {"deepspeed-installed"}
    found = run_machine(loaded, cuda=False)
    assert set(found) == {"deepspeed-installed", "deepspeed-needs-cuda"}
    (missing,), (cpu,) = found.values()
    assert 'pip install "t2i-align[deepspeed]"' in missing.fix
    assert "this machine has none" in cpu.message and "fsdp2" in cpu.fix
    with pytest.raises(RecipeError, match="not installed"):
        load_recipe(recipe, cuda=False)
    with pytest.raises(MissingDependencyError, match=FEATURE):
        Zero(loaded.train, None, None)  # type: ignore[arg-type]


def test_validate_shows_the_configuration(recipe: Path) -> None:
    from t2i_align.cli import build_app

    said = RUNNER.invoke(build_app(), ["validate", str(recipe), "--json"]).stdout
    shown = json.loads(said[said.index("{") :])
    assert shown["ok"] and shown["deepspeed"] == config(load_recipe(recipe).train)
    text = RUNNER.invoke(build_app(), ["validate", str(recipe)]).stdout
    assert '"zero_optimization": {"stage":' in " ".join(text.split())
