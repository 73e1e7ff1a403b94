"""FLOPs of a record as planned against those of real steps, for every way an objective feeds them.

The real number is FlopCounterMode's around whole steps of the training loop on a tiny SDXL: what
the feed computes (inversion, sampling) is in it, as are both views and the backward pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align.contract import DrawSpec, Inversion
from t2i_align.process.inversion import exact_path
from t2i_align.process.schedule import Rectified
from t2i_align.recipe import Recipe, load_recipe
from t2i_align.train.cost import (
    Calls,
    inversion_calls,
    resampled,
    whole,
)
from t2i_align.train.plan import Plan, plan
from tests import measuring, runs
from tests.tiny import pipeline_folder
from tests.tiny_flux import flux

PUSH = {"draw": {"min_level": 0.71, "max_level": 0.79}}  # 8 of 10 steps lie below every level
TRAJECTORY: dict[str, Any] = {
    "data": {"type": "none"},
    "rollout": {
        "prompts": ["a cat", "two dogs", "a red umbrella"],
        "judge": "jpeg",  # replaced
        "threshold": 0.0,
        "num_candidates": 3,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "divert_start_step": 1,
        "prompts_per_round": 2,
        "batch_size": 2,
    },
}
REPLAY = {"rollout": {"num_inference_steps": 6, "replay_size": 8}}


def lists(path: Path, num: int, length: int) -> dict[str, Any]:
    """A data section over rankings of ``length`` pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "prompt": f"thing {i}",
            "images": [runs.jpeg(10 * i + k, 64, 64) for k in range(length)],
            "ranks": list(range(length)),
            "values": [float(-k) for k in range(length)],
        }
        for i in range(num)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return {"type": "ranked", "path": str(path)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny SDXL with data of both kinds."""
    where = tmp_path_factory.mktemp("cost")
    pairs = {"type": "pickapic", "path": str(runs.pickapic(where / "pairs.parquet", 8))}
    return {
        "model": {"name_or_path": str(pipeline_folder("sdxl", where / "m")), "resolution": 64},
        "cache": {"dir": str(where / "cache")},
        "pairs": pairs,
        "judged": pairs | {"label_by": {"judges": ["jpeg"]}},
        "lists": lists(where / "lists.parquet", 6, 3),
    }


def recipe_of(
    folder: Path, world: dict[str, Any], objective: dict[str, Any], sections: dict[str, Any]
) -> Recipe:
    """Two records a micro-batch."""
    base: dict[str, Any] = {k: world[k] for k in ("model", "cache")} | {"data": world["pairs"]}
    base["train"] = {"report_to": "none", "max_train_steps": 4, "train_batch_size": 2}
    for name, value in sections.items():
        given = world[value] if isinstance(value, str) else value
        base[name] = base.get(name, {}) | given if name in ("model", "train") else given
    return load_recipe(runs.write_recipe(folder, "run", base | {"objective": objective}))


class Fair:
    """A judge that decodes nothing and tells all samples apart; counts them."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, latents: Tensor, prompts: list[str], level: float) -> Tensor:
        self.seen += len(latents)
        return latents.flatten(1).mean(1).float()


def compared(recipe: Recipe, num_steps: int) -> tuple[Plan, float, float]:
    """The plan, the FLOPs of a record in real steps, and samples judged for one."""
    found, run, judge = plan(recipe, "cpu"), measuring.started(recipe), Fair()
    collect: Any = getattr(run.feed, "collect", None)
    if collect is not None:
        collect.judge = judge
    real = measuring.flops(run, num_steps)
    run.feed.close()
    records = num_steps * recipe.train.train_batch_size * recipe.train.gradient_accumulation_steps
    return found, real / records, judge.seen / records


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({"type": "dpo"}, {}),
    "dpo, LoRA": ({"type": "dpo"}, {"model": {"lora": {"r": 4, "lora_alpha": 4}}}),
    "dpo, 3 draws": ({"type": "dpo"}, {"draw": {"num_draws": 3}}),
    "dpo, recomputed": ({"type": "dpo"}, {"model": {"gradient_checkpointing": True}}),
    "dpo, bf16, accumulated": (
        {"type": "dpo"},
        {"train": {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}},
    ),
    "dpo, reference follows": (
        {"type": "dpo"},
        {"reference": {"refresh": "soft", "refresh_steps": 1}},
    ),
    "mapo": ({"type": "mapo"}, {}),
    "sft": ({"type": "sft"}, {}),
    "kto": ({"type": "kto"}, {}),
    "lipo, pairs": ({"type": "lipo"}, {"data": "judged"}),
    "lipo": ({"type": "lipo"}, {"data": "lists"}),
    "rankdpo": ({"type": "rankdpo"}, {"data": "lists"}),
    "inpo": ({"type": "inpo", "inversion_steps": 10}, PUSH),
    "inpo, by the reference": (
        {"type": "inpo", "inversion_steps": 10, "inversion_view": "reference"},
        PUSH | {"model": {"lora": {"r": 4, "lora_alpha": 4}}},
    ),
    "smpo": (
        {"type": "smpo", "inversion_steps": 10, "values": "from_data"},
        PUSH | {"data": "judged"},
    ),
    "spo": ({"type": "spo"}, TRAJECTORY),
    "spo, LoRA": ({"type": "spo"}, TRAJECTORY | {"model": {"lora": {"r": 4, "lora_alpha": 4}}}),
    "spo, inner steps": (
        {"type": "spo"},
        TRAJECTORY | {"rollout": TRAJECTORY["rollout"] | {"num_inner_steps": 1}},
    ),
    "spo, detached": (
        {"type": "spo"},
        TRAJECTORY | {"rollout": TRAJECTORY["rollout"] | {"detach_negative": True}},
    ),
    "spo, unguided": (
        {"type": "spo"},
        TRAJECTORY | {"rollout": TRAJECTORY["rollout"] | {"guidance_scale": 1.0}},
    ),
    "d3po": ({"type": "d3po"}, TRAJECTORY),
    "diffusion_dro": ({"type": "diffusion_dro"}, REPLAY),
}


FAST = ("dpo", "mapo", "kto", "lipo", "rankdpo", "inpo", "smpo", "spo", "diffusion_dro")


def cases() -> list[Any]:
    """All; variants of one objective are marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in FAST else slow) for name in CASES]


@pytest.mark.parametrize("case", cases())
def test_a_record_costs_what_was_planned(tmp_path: Path, world: dict[str, Any], case: str) -> None:
    """Within 2 %; six micro-batches use up whole rounds of the sampler."""
    objective, sections = CASES[case]
    found, real, judged = compared(recipe_of(tmp_path, world, objective, sections), 6)
    print(f"{case}: planned / real {found.flops_per_record / real:.4f}")
    assert found.flops_per_record == pytest.approx(real, rel=0.02)
    assert found.judged_per_record == pytest.approx(judged)


def test_a_network_that_is_told_its_guidance_is_asked_once(
    tmp_path: Path, world: dict[str, Any]
) -> None:
    """FLUX on trajectories: the scale is an input, so there is no second branch to pay or miss."""
    folder = flux(tmp_path / "flux")
    sections = TRAJECTORY | {"model": {"name_or_path": str(folder)}}
    recipe = recipe_of(tmp_path, world, {"type": "spo"}, sections)
    found, real, judged = compared(recipe, 6)
    assert found.flops_per_record == pytest.approx(real, rel=0.02)
    assert found.judged_per_record == pytest.approx(judged)


def test_parts_are_told_apart(tmp_path: Path, world: dict[str, Any]) -> None:
    """Inversion 8 forwards of two items, sampling 6 of one; only what there is has a row."""
    inpo = plan(recipe_of(tmp_path, world, *CASES["inpo"]))
    assert inpo.flops["inversion"] == 8 * inpo.flops["reference"]  # full: both views cost the same
    dro = plan(recipe_of(tmp_path, world, *CASES["diffusion_dro"]))
    assert dro.flops["rollout"] == 3 * dro.flops["reference"] and not dro.judged_per_record
    labels = dict(inpo.rows()).keys()
    assert "compute: inversion" in labels and "compute: rollout" not in labels
    mapo = plan(recipe_of(tmp_path, world, *CASES["mapo"]))
    assert mapo.flops["reference"] == 0
    assert [k for k, _ in mapo.rows() if k.startswith("compute")] == ["compute"]


def test_lists_are_as_long_as_the_data_say(tmp_path: Path, world: dict[str, Any]) -> None:
    """Three pictures a list; KTO takes both pictures of a row as records of their own."""
    found = plan(recipe_of(tmp_path, world, *CASES["lipo"]))
    assert (found.items_per_forward, found.num_records) == (6, 6)
    state = 2 * (4 * 8 * 8) * 2  # mean and std of a latent, float16
    text = 77 * 32 * 2 + (16 + 6) * 2
    assert found.cache_bytes == 6 * (3 * state + text)
    kto = plan(recipe_of(tmp_path, world, *CASES["kto"]))
    assert (kto.items_per_forward, kto.num_records) == (2, 16)
    assert kto.passes == 4 * 2 / 16


def test_an_inversion_takes_the_steps_below_the_drawn_level() -> None:
    """Uniform levels and n steps: (n + 1) / 2 in the mean, each predicted twice with ReNoise."""
    flow = Rectified(1000.0, 1.0)
    mean = inversion_calls(Inversion(num_steps=10), DrawSpec(), flow)
    assert mean == pytest.approx(5.5, abs=0.1)
    twice = inversion_calls(Inversion(num_steps=10, renoise=True), DrawSpec(), flow)
    assert twice == pytest.approx(2 * mean)
    high = DrawSpec(min_level=0.95, max_level=1.0)
    assert inversion_calls(Inversion(num_steps=10), high, flow) == 10
    tau = torch.tensor([50.0, 150.0, 1000.0], dtype=torch.float64)
    assert exact_path(flow, tau, 10).num_steps.tolist() == [1, 2, 10]


@pytest.mark.parametrize(
    ("trained", "inner", "forwards", "judged", "pairs"),
    [
        # 1, then 3 of every step's candidates; the last are judged as they are
        ([True, True, True], 0, 1 + 3 + 3, 9, 3),
        # a step that is only sampled costs one, and so does the next one's first prediction
        ([False, True, True], 0, 2 + 3, 6, 2),
        # candidates run on: one judgement for two transitions, two predictions of each
        ([True, True, True, True], 1, 1 + 6 + 3, 6, 4),
        ([False, False], 0, 2, 0, 0),
    ],
)
def test_what_a_resampled_prompt_takes(
    trained: list[bool], inner: int, forwards: int, judged: int, pairs: int
) -> None:
    """Three candidates, by hand."""
    found = resampled(trained, 3, inner)
    assert (found.forwards, found.judged, found.pairs) == (forwards, judged, pairs)


def test_whole_trajectories_and_prices() -> None:
    found = whole([False, True, True], 2)
    assert (found.forwards, found.judged, found.pairs) == (6, 2, 2)
    calls = Calls(2.0, 2.0, detached=1.0, inverted=3.0, inverter="reference", sampled=4.0)
    parts = calls.flops(step=30.0, forward=10.0, reference=7.0)
    assert parts == {"policy": 70, "reference": 14, "inversion": 21, "rollout": 40}
