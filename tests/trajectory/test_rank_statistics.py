"""What an objective asks of all items of a step is asked over all processes.

Every objective, link and weight that asks it, as a run of one process with 8 records a step and as
one of two with 4 each, on gloo in float32.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import t2i_align.objectives
from tests import ranks, runs

DPO = {"type": "dpo", "beta": 5.0}
# the module that asks, and a recipe whose loss depends on the answer
ASKING: dict[str, tuple[str, dict[str, Any]]] = {
    "kto": ("kto", {"type": "kto", "beta": 5.0}),
    "bco": ("bco", {"type": "bco", "beta": 5.0}),
    "dspo": ("dspo", {"type": "dspo", "form": "sdxl", "beta": 5.0}),
    "llm_dro": ("llm_dro", {"type": "llm_dro", "tau": 5.0, "num_slots": 4}),
    "rwl": ("rwl", {"type": "rwl"}),
    "smpo": ("smpo", {"type": "smpo", "beta": 5.0, "inversion_steps": 2, "values": "from_data"}),
    "beta_dpo": ("links_batch", DPO | {"link": "beta_dpo"}),
    "beta_dpo_weigh": ("links_batch", DPO | {"link": {"type": "beta_dpo", "selection": "weigh"}}),
    "alpha_dpo": ("links_batch", DPO | {"link": {"type": "alpha_dpo", "alpha": 0.7}}),
    "noise_em": ("label_noise", DPO | {"weight": "noise_em"}),
    "smpo_weight": ("margin_weights", DPO | {"weight": "smpo"}),
}
STEPS = 5


def pairs(path: Path, num: int) -> Path:
    """Pairs of points whose values are not equally far apart."""
    import json

    made = runs.point_pairs(path, num, seed=0)
    rows = [json.loads(line) for line in made.read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"score_chosen": 0.3 + 0.1 * (i % 4), "score_rejected": 0.25 - 0.05 * (i % 3)}
    return runs.write_jsonl(path, rows)


def sections(folder: Path, batch: int, objective: dict[str, Any]) -> dict[str, Any]:
    train = {
        "train_batch_size": batch,
        "learning_rate": 1e-2,
        "max_train_steps": STEPS,
        "checkpointing_steps": STEPS,
        "adam_epsilon": 1e-4,
        "divergence_limit": None,
    }
    files = folder / "model", folder / "pairs.jsonl", folder / "cache"
    return runs.voxel_sections(*files, **train) | {"objective": objective}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    runs.point_model(folder / "model")
    pairs(folder / "pairs.jsonl", 11)
    two = []
    for name, (_, objective) in ASKING.items():
        runs.train(folder, f"{name}-1", sections(folder, 8, objective))
        two.append(runs.write_recipe(folder, f"{name}-2", sections(folder, 4, objective)))
    for code, said in ranks.start(folder, two):
        assert code == 0, said[-3000:]
    return folder


@pytest.mark.parametrize("name", ASKING)
def test_two_processes_are_one(both: Path, name: str) -> None:
    one, two = (runs.losses(both / f"{name}-{n}") for n in (1, 2))
    assert len(set(one)) >= 4, "the run moves"
    assert two == pytest.approx(one, abs=1e-5)
    norms = [runs.losses(both / f"{name}-{n}", "grad_norm") for n in (1, 2)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3, abs=1e-5)
    first, second = (runs.weights(both / f"{name}-{n}", STEPS) for n in (1, 2))
    assert all((first[k] - second[k]).abs().max() < 1e-5 for k in first)


@pytest.mark.parametrize("name", ["bco", "llm_dro", "smpo", "beta_dpo", "noise_em", "smpo_weight"])
def test_what_they_remember_is_that_of_one(both: Path, name: str) -> None:
    from safetensors.torch import load_file

    file = f"checkpoints/step-{STEPS:08d}/objective.safetensors"
    one, two = (load_file(both / f"{name}-{n}" / file) for n in (1, 2))
    assert one.keys() == two.keys() and any(bool((x != 0).any()) for x in one.values())
    for k in one:
        assert (one[k] - two[k]).abs().max() < 1e-5 * (1 + one[k].abs().max()), k


def test_local_statistics_would_be_noticed(both: Path, tmp_path: Path) -> None:
    """With each process's own mean for the mean of all, one of these curves is another."""
    from t2i_align.protocols import LocalStats
    from t2i_align.train import loop

    half = sections(both, 4, ASKING["kto"][1]) | {"seed": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "RankStats", lambda _: LocalStats())
        runs.train(tmp_path, "half", half)
    # the first process's share of every step is the first half of what one process has
    whole = runs.losses(both / "kto-1", "kto/kl")
    assert runs.losses(tmp_path / "half", "kto/kl")[1:] != pytest.approx(whole[1:], abs=1e-5)


def test_none_that_asks_is_left_out() -> None:
    """By the sources; ``aot`` sorts and ``capo`` compares within a process, and ask nothing."""
    folder = Path(t2i_align.objectives.__file__).parent
    asks = re.compile(r"\bstats\.(mean|gather)\(")
    found = {f.stem for f in folder.glob("*.py") if asks.search(f.read_text(encoding="utf-8"))}
    assert found == {module for module, _ in ASKING.values()}
