"""Two processes are one: the same draws, losses, statistics and weights; and none waits for ever.

On gloo, float32. Two processes of 4 records a step against one of 8; the records are 11, so passes
end in the middle of a step and of a process's share.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from t2i_align.checks_distributed import alone, unfit
from t2i_align.errors import RecipeError, TrainingError
from t2i_align.recipe import load_recipe
from t2i_align.train.distributed import Launch, explained, torchrun
from tests import ranks, runs

OBJECTIVES: dict[str, dict[str, Any]] = {
    "kto": {"type": "kto", "beta": 5.0},  # z of Eq. (2) is a mean over ranks
    "beta": {"type": "dpo", "beta": 5.0, "link": {"type": "beta_dpo"}},  # M and S are EMAs of one
}
FSDP2 = {"distributed": {"backend": "fsdp2"}}


def sections(folder: Path, batch: int, **changes: Any) -> dict[str, Any]:
    train = {
        "train_batch_size": batch,
        "learning_rate": 1e-2,
        "max_train_steps": 5,
        "checkpointing_steps": 3,
        "ema_decay": 0.9,
        "adam_epsilon": 1e-4,  # one voxel: attention's gradient is rounding, not to be scaled up
    }
    files = folder / "model", folder / "pairs.jsonl", folder / "cache"
    recipe = runs.voxel_sections(*files, **train | changes.pop("train", {}))
    return recipe | changes


class Both:
    """Every recipe by one process and by two.

    Args:
        folder: for files and runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        runs.point_model(folder / "model")
        runs.point_pairs(folder / "pairs.jsonl", 11, seed=0)
        recipes = []
        for name, objective in ({"dpo": {"type": "dpo", "beta": 5.0}} | OBJECTIVES).items():
            runs.train(folder, f"{name}-1", sections(folder, 8, objective=objective))
            two = sections(folder, 4, objective=objective)
            recipes.append(runs.write_recipe(folder, f"{name}-2", two))
        half = sections(
            folder, 2, train=FSDP2 | {"gradient_accumulation_steps": 2, "max_train_steps": 5}
        )
        recipes.append(runs.write_recipe(folder, "fsdp2", half))
        self.ended = ranks.start(folder, recipes)

    def drawn(self, name: str) -> list[list[Any]]:
        facts = [json.loads((self.folder / f"{name}.rank-{r}.json").read_text()) for r in (0, 1)]
        return [f["drawn"] for f in facts]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    made = Both(tmp_path_factory.mktemp("both"))
    for code, said in made.ended:
        assert code == 0, said[-3000:]
    return made


def assert_close(folder: Path, a: str, b: str, step: int = 5) -> None:
    assert runs.losses(folder / a) == pytest.approx(runs.losses(folder / b), abs=1e-5)
    one, two = (runs.weights(folder / name, step) for name in (a, b))
    assert one.keys() == two.keys()
    for k in one:
        assert (one[k] - two[k]).abs().max() < 1e-5, k


@pytest.mark.parametrize("name", ["dpo", "kto", "beta"])
def test_losses_and_weights_are_those_of_one_process(both: Both, name: str) -> None:
    assert len(set(runs.losses(both.folder / f"{name}-1"))) >= 4, "the run moves"
    assert_close(both.folder, f"{name}-2", f"{name}-1")
    if name == "kto":
        curves = [runs.losses(both.folder / f"kto-{n}", "kto/kl") for n in (1, 2)]
        assert curves[1] == pytest.approx(curves[0], abs=1e-5)


def test_running_statistics_are_global(both: Both) -> None:
    """beta-DPO's M and S, as the checkpoint has them."""
    from safetensors.torch import load_file

    file = "checkpoints/step-00000005/objective.safetensors"
    one, two = (load_file(both.folder / f"beta-{n}" / file) for n in (1, 2))
    assert one.keys() == two.keys() and all(float(x) != 0 for x in one.values())
    for k in one:
        assert float(two[k]) == pytest.approx(float(one[k]), rel=1e-4, abs=1e-6)


def test_processes_share_out_the_records_of_one(both: Both) -> None:
    """Records of each pass once each, whatever process has them; no draw is met twice."""
    first, second = both.drawn("dpo-2")
    ids = [i for a, b in zip(first, second, strict=True) for part in (a, b) for i in part[0]]
    assert sorted(ids[:11]) == sorted(ids[11:22]) == sorted(str(i) for i in range(11))
    noises = [part[1] for part in (*first, *second)]
    assert len(set(noises)) == len(noises) and all(noises)


def test_draws_do_not_depend_on_how_a_step_is_split(both: Both) -> None:
    """The same 8 records a step as 2 x 4 and as 2 x 2 x 2: sums of their noise agree."""
    for step in range(5):
        fours = [rank[step] for rank in both.drawn("dpo-2")]
        twos = [p for rank in both.drawn("fsdp2") for p in rank[2 * step : 2 * step + 2]]
        assert sorted(i for p in fours for i in p[0]) == sorted(i for p in twos for i in p[0])
        assert sum(p[1] for p in fours) == pytest.approx(sum(p[1] for p in twos), abs=1e-4)


def test_fsdp2_shards_and_changes_nothing(both: Both) -> None:
    """Every parameter a DTensor; the curve, checkpoint and export of one whole process."""
    from safetensors.torch import load_file

    for rank in (0, 1):
        facts = json.loads((both.folder / f"fsdp2.rank-{rank}.json").read_text())
        assert facts["kinds"] == ["DTensor"]
    assert_close(both.folder, "fsdp2", "dpo-1")
    export = "diffusion_pytorch_model.safetensors"
    mine, theirs = (load_file(both.folder / name / export) for name in ("fsdp2", "dpo-1"))
    assert mine.keys() == theirs.keys()
    assert all((mine[k] - theirs[k]).abs().max() < 1e-5 for k in theirs)


def test_resumed_by_another_number_of_processes(both: Both, tmp_path: Path) -> None:
    """Two sharded processes make step 3, one process goes on: the curve of one throughout."""
    start = both.folder / "fsdp2" / "checkpoints" / "step-00000003"
    assert start.is_dir()
    again = sections(both.folder, 8, train={"resume_from_checkpoint": str(start)})
    runs.train(tmp_path, "one", again)
    whole = runs.losses(both.folder / "dpo-1")
    assert runs.losses(tmp_path / "one") == pytest.approx(whole[3:], abs=1e-5)


def test_statistics_over_ragged_and_empty_ranks(both: Both) -> None:
    for rank in (0, 1):
        found = json.loads((both.folder / f"exchanges-{rank}.json").read_text())
        assert found["mean"] == 11.0 and found["gather"] == [10.0, 11.0, 12.0]
        assert found["rows"] == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
        assert found["metrics"] == {"loss": [1.0, 2.0], "only": [10.0, 11.0, 12.0]}


# -- lost processes
# --------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(x) for x in text.split()]


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")


class Started:
    """A run of two processes by the verb, two checkpoints in.

    Args:
        folder: of the run and its files.
        train: further options.
    """

    def __init__(self, folder: Path, **train: Any) -> None:
        runs.point_model(folder / "model")
        runs.point_pairs(folder / "pairs.jsonl", 11, seed=0)
        long = {"max_train_steps": 100000, "checkpointing_steps": 1, "checkpoints_total_limit": 3}
        recipe = runs.write_recipe(folder, "run", sections(folder, 2, train=long | train))
        self.checkpoints = folder / "run" / "checkpoints"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "t2i_align", "train", str(recipe), "--num-processes", "2"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        end = time.monotonic() + 240
        while not (self.checkpoints / "step-00000002").is_dir() and time.monotonic() < end:
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.05)

    def second(self) -> int:
        """Process id of rank 1."""
        return children(self.process.pid)[1]

    def said(self) -> str:
        """All it says, once it has ended; the newest checkpoint is good."""
        from t2i_align.train.checkpoint import Checkpoints

        try:
            said = self.process.communicate(timeout=120)[1]
        finally:
            self.process.kill()
        found = Checkpoints(self.checkpoints, None).load("latest")
        assert found is not None and found.step >= 2
        assert "train.resume_from_checkpoint=latest" in said and "Traceback" not in said, said
        return said


@needs_proc
def test_a_dying_process_ends_the_run_with_a_message(tmp_path: Path) -> None:
    """One is killed: no hang, its rank and the signal named."""
    run = Started(tmp_path)
    os.kill(run.second(), signal.SIGKILL)
    assert "process 1 of 2 was killed (SIGKILL" in run.said()
    assert run.process.returncode == TrainingError.exit_code


@needs_proc
@pytest.mark.slow
def test_a_silent_process_is_waited_for_only_so_long(tmp_path: Path) -> None:
    """One is stopped and never answers: the other gives up after the recipe's half minute."""
    run = Started(tmp_path, distributed={"timeout_minutes": 0.5})
    second = run.second()
    os.kill(second, signal.SIGSTOP)
    begun = time.monotonic()
    assert "process 0 of 2: another process is gone or did not answer in time" in run.said()
    assert 20 < time.monotonic() - begun < 100
    assert run.process.returncode == TrainingError.exit_code
    assert not Path(f"/proc/{second}").exists()


@needs_proc
@pytest.mark.slow
def test_ctrl_c_reaches_every_process(tmp_path: Path) -> None:
    """Asked once, both stop after the same step, with a checkpoint and the exit code of that."""
    run = Started(tmp_path)
    run.process.send_signal(signal.SIGINT)
    assert "a checkpoint was written" in run.said()
    assert run.process.returncode == 130


def test_a_failed_exchange_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"process 0 of 2.*gone.*closed by peer") as caught:
        with explained():
            raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    assert "timeout_minutes" in caught.value.fix
    with pytest.raises(RuntimeError, match="shapes differ"), explained():
        raise RuntimeError("shapes differ")


def test_what_cannot_be_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Launch(num_processes=4).problems(0) == [] == Launch(num_processes=4).problems(4)
    for how, key, text in (
        (Launch(num_processes=4), "--num-processes", "2 CUDA devices"),
        (Launch(3, 2, 0, "10.0.0.1", 29500), "--num-processes", "multiple of 2 machines"),
        (Launch(4, 2, 2, "10.0.0.1", 29500), "--machine-rank", "got 2; 0 to 1"),
        (Launch(4, 2), "--main-process-ip", "address of machine 0"),
    ):
        (problem,) = how.problems(2)
        assert problem.key == key and text in problem.message
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "another launcher" in Launch(2).problems(0)[0].message


def test_several_machines_are_torchruns() -> None:
    """Parsed by torchrun's own parser."""
    from torch.distributed.run import parse_args

    command = torchrun(Launch(8, 2, 1, "10.0.0.1", 29500))
    args = parse_args([*command[3:], "-m", "t2i_align"])
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "4")
    assert (args.master_addr, args.master_port) == ("10.0.0.1", 29500)


def test_sharding_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    runs.point_model(tmp_path / "model")
    runs.point_pairs(tmp_path / "pairs.jsonl", 4, seed=0)
    plain = sections(tmp_path, 2, train=FSDP2)
    path = runs.write_recipe(tmp_path, "run", plain)
    loaded = load_recipe(path)
    assert alone(loaded, 2) == [] == list(unfit(loaded))
    with pytest.raises(RecipeError, match="one process has nothing to share with"):
        runs.train(tmp_path, "run", plain)
    for override, key in (
        ("train.optimizer=adafactor", "train.optimizer"),
        ("train.mixed_precision=fp16", "train.mixed_precision"),
        ("reference.refresh=hard", "reference.refresh"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, [override])
        assert [p.key for p in caught.value.problems] == [key]
