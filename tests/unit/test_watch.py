"""The doctor of a run: every alarm by a real short run that has the fault, none by a healthy one.

The runs are on a flow over the plane fitted to a standard normal, whose pairs are won by the larger
first coordinate (``tests/runs.py``), and on a tiny codec language model.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align.contract import Score, ScoredBatch
from t2i_align.errors import TrainingError
from t2i_align.generators import views
from t2i_align.generators.voxel_flow import VoxelFlow
from t2i_align.objectives.dpo import DPO, DPOOptions
from t2i_align.objectives.sft import SFT, SFTOptions
from t2i_align.protocols import LocalStats
from t2i_align.train.alarms import ALARMS, KEPT, Facts, History, sureness
from t2i_align.train.watch import Watch, measure
from tests import runs
from tests.tiny import llama_folder

CALM = ("objective.sft_weight=2", "train.max_grad_norm=20")  # what a healthy run of this toy has
FACTS = Facts(1000, 10, 32, True, True, 5.0, 0.0, 1.0, 3.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow fitted to N(0, I)."""
    folder = tmp_path_factory.mktemp("plane")
    model = runs.point_model(folder / "init")
    data = runs.point_pairs(folder / "sft.jsonl", 1000, seed=1, shuffled=True)
    options = {"learning_rate": 2e-3, "train_batch_size": 64, "max_train_steps": 150}
    sections = runs.voxel_sections(model, data, folder / "cache", **options)
    sections["objective"] = {"type": "sft"}
    summary = runs.train(folder, "sft", sections)
    assert summary["doctor"] == []
    return folder / "sft"


def sections(
    base: Path, folder: Path, steps: int, *, shuffled: bool = False, **train: Any
) -> dict[str, Any]:
    data = folder / f"pairs-{shuffled}.jsonl"
    if not data.exists():
        runs.point_pairs(data, 1000, seed=2, shuffled=shuffled)
    options = {"learning_rate": 3e-4, "train_batch_size": 32, "max_train_steps": steps} | train
    return runs.voxel_sections(base, data, folder / "cache", **options)


def told(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Alarms of a run by name, each told once."""
    rows = {row["alarm"]: row for row in summary["doctor"]}
    assert len(rows) == len(summary["doctor"])
    return rows


def test_a_healthy_run_is_told_nothing(base: Path, tmp_path: Path) -> None:
    summary = runs.train(tmp_path, "run", sections(base, tmp_path, 200), *CALM)
    assert summary["doctor"] == []
    assert not (tmp_path / "run" / "doctor.json").exists()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert not any(name.startswith("watch/") for name in row)


def test_another_base_as_reference(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = VoxelFlow.load_module

    def other_base(self: VoxelFlow, seed: int, **how: Any) -> None:
        load(self, seed, **how)
        assert self.views.reference is not None
        torch.manual_seed(0)
        for p in self.views.reference.parameters():
            p.data += 0.01 * torch.randn_like(p)

    monkeypatch.setattr(VoxelFlow, "load_module", other_base)
    copied = "cache.reference=never"  # else the copy is made once it is known to be needed
    summary = runs.train(tmp_path, "run", sections(base, tmp_path, 3), *CALM, copied)
    alarm = told(summary)["start_margin"]
    assert alarm["step"] == 1 and 1e-3 < alarm["value"] < 1
    assert "another base" in alarm["advice"] and "adapters not really off" in alarm["advice"]


def codes(folder: Path, steps: int) -> dict[str, Any]:
    """DPO with LoRA on a tiny language model."""
    draws = torch.Generator().manual_seed(0)
    pick = lambda: torch.randint(0, 32, (6,), generator=draws).tolist()  # noqa: E731
    rows = [{"id": str(i), "prompt": "p", "chosen": pick(), "rejected": pick()} for i in range(32)]
    return {
        "model": {
            "type": "token_lm",
            "name_or_path": str(llama_folder(folder / "llama")),
            "num_codes": 32,
            "lora": {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"},
        },
        "objective": {"type": "dpo", "beta": 0.5},
        "data": {
            "type": "trl",
            "path": str(runs.write_jsonl(folder / "codes.jsonl", rows)),
            "media": "codes",
        },
        "cache": {"dir": str(folder / "cache")},
        "train": {
            "report_to": "none",
            "lr_scheduler": "constant",
            "learning_rate": 1e-3,
            "train_batch_size": 4,
            "max_train_steps": steps,
        },
    }


def test_adapters_that_are_not_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is the policy itself: margins stay 0 while weights move."""
    recipe = codes(tmp_path, 25)
    summary = runs.train(tmp_path, "good", recipe)
    assert "stuck" not in told(summary) and "start_margin" not in told(summary)
    monkeypatch.setattr(views, "toggle_adapters", lambda module, *, enabled: None)
    alarm = told(runs.train(tmp_path, "bad", recipe))["stuck"]
    assert alarm["step"] == 21 and alarm["value"] == 0
    assert "the reference moves with the policy" in alarm["advice"]


def test_winners_that_are_unlearned(base: Path, tmp_path: Path) -> None:
    """DPO without an anchor, run too long: both errors rise while the margin grows."""
    summary = runs.train(tmp_path, "run", sections(base, tmp_path, 120), "train.max_grad_norm=20")
    alarm = told(summary)["winner_error"]
    gaps = runs.losses(tmp_path / "run", "error_gap/chosen")
    assert min(gaps) < 0 < gaps[-1]
    window = gaps[alarm["step"] - 50 : alarm["step"]]
    assert alarm["value"] == pytest.approx(sum(window) / 50, rel=1e-5)
    assert "sft_weight" in alarm["advice"]


def test_beta_too_large(base: Path, tmp_path: Path) -> None:
    summary = runs.train(tmp_path, "run", sections(base, tmp_path, 25), "objective.beta=500")
    alarm = told(summary)["saturated"]
    share = runs.losses(tmp_path / "run", "logits/saturated")
    assert alarm["step"] == 20 and alarm["value"] == pytest.approx(sum(share[:20]) / 20)
    assert alarm["value"] > 0.5 and "lower" not in alarm["advice"]
    spread = runs.losses(tmp_path / "run", "logits/std")[19]
    assert f"try objective.beta about {1 / spread:.2g} times, {500 / spread:.3g}" in alarm["advice"]


def test_beta_too_small(base: Path, tmp_path: Path) -> None:
    summary = runs.train(tmp_path, "run", sections(base, tmp_path, 55), "objective.beta=0.02")
    alarm = told(summary)["dead_logit"]
    assert alarm["step"] == 50 and 0 < alarm["value"] < 0.05
    pull = runs.losses(tmp_path / "run", "gradient_factor/chosen")[49]
    assert f"(now {pull:.3g} times sft's gradient)" in alarm["advice"]
    assert pull == pytest.approx(0.005, rel=0.05)  # beta / 4
    assert f"raise objective.beta about {1 / alarm['value']:.2g} times" in alarm["advice"]


def test_labels_that_say_nothing(base: Path, tmp_path: Path) -> None:
    recipe = sections(base, tmp_path, 75, shuffled=True, train_batch_size=100)
    alarm = told(runs.train(tmp_path, "run", recipe, *CALM))["chance_accuracy"]
    assert 70 <= alarm["step"] <= 75 and alarm["value"] == pytest.approx(0.5, abs=0.03)
    recipe = sections(base, tmp_path, 75, train_batch_size=100)
    assert runs.train(tmp_path, "true", recipe, *CALM)["doctor"] == []


@pytest.mark.parametrize(("limit", "name"), [(0.1, "clipped_always"), (2e3, "clipped_never")])
def test_clipping_always_and_never(base: Path, tmp_path: Path, limit: float, name: str) -> None:
    recipe = sections(base, tmp_path, 102)
    summary = runs.train(
        tmp_path, "run", recipe, "objective.sft_weight=2", f"train.max_grad_norm={limit}"
    )
    assert list(told(summary)) == [name]
    norms = runs.losses(tmp_path / "run", "grad_norm")[:100]
    value = sum(norms) / 100 if name == "clipped_always" else max(norms)
    alarm = told(summary)[name]
    assert alarm["step"] == 100 and alarm["value"] == pytest.approx(value / limit, rel=1e-6)


UNBOUNDED = {
    "no reference": {"type": "dso_dro"},
    "reference": {"type": "dpo", "beta": 5.0, "link": {"type": "rdpo", "label_smoothing": 0.3}},
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_loss_without_a_bound_is_stopped(base: Path, tmp_path: Path, name: str) -> None:
    """The losers' error runs away; the run stops, says why, and keeps its checkpoints."""
    recipe = sections(base, tmp_path, 150, learning_rate=1e-3, checkpointing_steps=10)
    recipe["objective"] = UNBOUNDED[name]
    with pytest.raises(TrainingError, match=r"stopped at step \d+: the losers' loss is") as caught:
        runs.train(tmp_path, "run", recipe)
    assert caught.value.exit_code == 5 and "no lower bound" in str(caught.value)
    run = tmp_path / "run"
    assert not (run / "summary.json").exists()
    (alarm,) = (
        row
        for row in json.loads((run / "doctor.json").read_text())["doctor"]
        if row["alarm"] == "diverged"
    )
    errors = runs.losses(run, "error/rejected")
    assert alarm["step"] == len(errors) + 1 < 150  # the step itself is not logged any more
    assert 3 < alarm["value"] < 30
    assert list((run / "checkpoints").iterdir())
    assert max(errors) < 40 * errors[0]


def test_the_guard_can_be_switched_off_and_leaves_bounded_losses_alone(
    base: Path, tmp_path: Path
) -> None:
    recipe = sections(base, tmp_path, 60, learning_rate=1e-3)
    runs.train(tmp_path, "dpo", recipe)
    assert runs.losses(tmp_path / "dpo", "error/rejected")[-1] > 10
    recipe["objective"] = UNBOUNDED["no reference"]
    summary = runs.train(tmp_path, "free", recipe, "train.divergence_limit=null")
    assert summary["steps"] == 60 and "diverged" not in told(summary)
    assert runs.losses(tmp_path / "free", "error/rejected")[-1] > 10


def test_a_continued_run_is_told_the_same(base: Path, tmp_path: Path) -> None:
    """Killed at step 60 of 90 and continued: the same alarms at the same steps, each once."""
    recipe = sections(base, tmp_path, 90, checkpointing_steps=30)
    expected = runs.train(tmp_path, "whole", recipe)["doctor"]
    runs.train(tmp_path, "cut", recipe)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000090")
    again = runs.train(tmp_path, "cut", recipe, "train.resume_from_checkpoint=latest")
    assert again["doctor"] == expected
    assert {row["alarm"] for row in expected} >= {"saturated", "winner_error"}
    assert any(row["step"] <= 60 for row in expected) and any(row["step"] > 60 for row in expected)


# -- what it measures


def elbo(errors: Tensor) -> Score:
    """A score of given errors ``(B, S)``."""
    mask = torch.ones_like(errors, dtype=torch.bool)
    return Score("elbo", -0.5 * errors, mask, mask.long(), "mean", error=errors)


def token(logp: Tensor, mask: Tensor) -> Score:
    """A score of given log-probabilities ``(B, T)``."""
    return Score("token", logp, mask, mask.long(), "sum")


def pairs(policy: Score, reference: Score) -> ScoredBatch:
    """Winners first, losers second."""
    num = len(policy.mask) // 2
    index = torch.arange(num)
    scores = {"policy": policy, "reference": reference}
    return ScoredBatch(scores, index, index + num, torch.ones(num))


def pull(batch: ScoredBatch, objective: Any) -> dict[str, float]:
    """Gradient factors of an objective."""
    out = objective(batch, {}, LocalStats())
    found = measure(batch, out.loss)
    out.loss.backward()  # the graph is still whole
    return {k.rpartition("/")[2]: v.mean().item() for k, v in found.items() if "factor" in k}


def test_the_factor_of_dpo_is_half_beta_times_the_sigmoid() -> None:
    """V1.a twice: u = .3 and u = -.3, so the mean of (beta/2) sigmoid(-u) is beta/4."""
    m = torch.tensor([[0.1000], [0.1203], [0.1200], [0.1200]], requires_grad=True)
    r = torch.tensor([[0.1004], [0.1200], [0.1201], [0.1200]])
    batch = pairs(elbo(m), elbo(r))
    factor = pull(batch, DPO(DPOOptions(beta=2000)))
    u = -1000 * ((m[:2] - m[2:]) - (r[:2] - r[2:])).detach()
    assert u.flatten().tolist() == pytest.approx([0.3, -0.3], abs=1e-3)
    expected = (1000 * torch.sigmoid(-u)).mean().item()
    assert factor["chosen"] == pytest.approx(expected, rel=1e-5)
    assert factor["rejected"] == pytest.approx(-expected, rel=1e-5)
    assert expected == pytest.approx(500, rel=1e-3)


def test_sft_is_the_unit_on_errors_and_on_tokens() -> None:
    """Whatever the number of draws, tokens and items; and an anchor adds its weight."""
    errors = torch.rand(4, 3, requires_grad=True)
    none = torch.arange(0)
    batch = ScoredBatch({"policy": elbo(errors)}, none, none, torch.ones(0))
    assert pull(batch, SFT(SFTOptions()))["chosen"] == pytest.approx(1, abs=1e-6)
    logp = (-torch.rand(4, 5)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]) > 0
    batch = ScoredBatch({"policy": token(logp, mask)}, none, none, torch.ones(0))
    assert pull(batch, SFT(SFTOptions()))["chosen"] == pytest.approx(1, abs=1e-6)
    both = pairs(token(logp, mask), token(logp.detach(), mask))
    plain = pull(both, DPO(DPOOptions(beta=0.1)))
    assert plain["chosen"] == pytest.approx(0.05 * (3 + 5) / 2, rel=1e-5)  # beta/2 a token
    assert plain["rejected"] == pytest.approx(-0.05 * (1 + 2) / 2, rel=1e-5)
    anchored = pull(both, DPO(DPOOptions(beta=0.1, sft_weight=0.7)))
    assert anchored["chosen"] == pytest.approx(plain["chosen"] + 0.7, rel=1e-5)


def test_a_loss_that_does_not_come_through_errors_has_no_factor() -> None:
    batch = pairs(elbo(torch.rand(2, 1, requires_grad=True)), elbo(torch.rand(2, 1)))
    other = torch.rand((), requires_grad=True)
    assert not any("factor" in name for name in measure(batch, other * 2))
    assert not any("factor" in name for name in measure(batch, other.detach()))


def test_losers_are_found_in_every_layout() -> None:
    """Pairs, labels, ranks; without any, all items."""
    score = elbo(torch.tensor([[1.0], [2.0], [3.0]]))
    none = torch.arange(0)
    bare = ScoredBatch({"policy": score}, none, none, torch.ones(0))

    def losers(batch: ScoredBatch) -> list[float]:
        return measure(batch, torch.zeros(()))["watch/loser"].tolist()

    assert losers(bare) == [1, 2, 3]
    assert losers(replace(bare, labels=torch.tensor([1, -1, -1]))) == [2, 3]
    assert losers(replace(bare, ranks=torch.tensor([1, 0, 2]))) == [1, 3]
    index = (torch.tensor([2]), torch.tensor([0]))
    assert losers(replace(bare, chosen=index[0], rejected=index[1])) == [1]


# -- windows


def test_alarms_wait_for_their_window_and_are_told_once() -> None:
    watch = Watch(FACTS)
    for step in range(1, 60):
        new = watch.step(step, {"logits/saturated": 0.9, "watch/apart": 0.0})
        assert [str(x).split(":")[0] for x in new] == (["doctor/saturated"] if step == 20 else [])
    assert watch.told[0]["value"] == pytest.approx(0.9)


def test_a_refresh_starts_the_windows_anew() -> None:
    """Right after a refresh margins are small for a good reason."""
    values = {"logits/std": 0.01}
    facts = replace(FACTS, total=100, warmup=0)
    moving, still = Watch(facts), Watch(facts)
    for step in range(1, 100):
        assert moving.step(step, dict(values)) == []
        if step % 40 == 0:
            moving.refreshed()
        assert [x.alarm for x in still.step(step, dict(values))] == ["dead_logit"] * (step == 50)


def test_a_series_is_bounded_and_survives_json() -> None:
    watch = Watch(FACTS)
    for step in range(1, 2 * KEPT):
        watch.step(step, {"grad_norm": math.pi * step, "watch/loser": 1.0})
    state = json.loads(json.dumps(watch.state()))
    assert len(state["series"]["grad_norm"]) == KEPT and len(state["start"]) == 10
    other = Watch(FACTS)
    other.restore(state)
    assert other.state() == watch.state() and other.history.since == 2 * KEPT - 1


def test_sureness_is_the_distance_from_zero_in_standard_errors() -> None:
    """1, 3, 1, 3: mean 2, deviation sqrt(4/3), standard error sqrt(4/3)/2."""
    assert sureness([1.0, 3.0, 1.0, 3.0]) == pytest.approx(2 / (math.sqrt(4 / 3) / 2))
    assert sureness([2.0, 2.0]) == math.inf and sureness([-2.0, -2.0]) == -math.inf
    assert sureness([0.0, 0.0]) == 0.0


def test_divergence_needs_ten_steps_and_an_unbounded_loss() -> None:
    """Against the reference of the same events, or against the first ten steps."""
    for bounded, reference, last in ((False, True, 3.5), (False, False, 3.5), (True, True, 3.5)):
        history = History(replace(FACTS, bounded=bounded, reference=reference))
        seen = []
        for step in range(1, 31):
            values = {"watch/loser": 1.0 if step <= 20 else last}
            if reference:
                values["watch/loser_reference"] = 1.0
            history.add(step, values)
            seen.append(ALARMS["diverged"].holds(history))
        assert seen[:28] == [None] * 28
        assert seen[-1] == (None if bounded else pytest.approx(last))
