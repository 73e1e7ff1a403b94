"""The bench of objectives: order of runs, commands, what is left for another call, the table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from rich.console import Console

from t2i_align.errors import DataError, RecipeError, UserError
from t2i_align.scenes import bench as module
from t2i_align.scenes.bench import (
    Entry,
    Settings,
    base_folder,
    bench,
    entries,
    evaluation,
    lines,
    markdown,
    read,
    trained,
)
from t2i_align.scenes.quickstart import JUDGES, Ledger, Phase, perform, phases
from tests.unit.test_compare import evaluation as finished_evaluation


def silent() -> Console:
    """A console nobody sees."""
    return Console(file=io.StringIO())


def test_every_objective_is_seen_before_any_second_seed() -> None:
    names = [e.name for e in entries(["a", "b.yaml"], [0, 3], controls=True)]
    assert names == ["a-s0", "b-s0", "a-s0-shuffled", "b-s0-shuffled", "a-s3", "b-s3"]
    assert [e.name for e in entries(["a"], [2], controls=False)] == ["a-s2"]


def test_commands_say_what_a_person_would_type(tmp_path: Path) -> None:
    settings = Settings(tmp_path, 7, 5, ("train.max_train_steps=40",))
    entry = Entry("scenes_dpo", 3, shuffled=True)
    train, evaluate, judge = trained(tmp_path / entry.name, entry, settings, read(entry, settings))
    assert train.command[:2] == ("train", "scenes_dpo")
    assert train.command[3:] == (
        "train.max_train_steps=40",
        "seed=3",
        "data.shuffle_labels=true",
    )
    assert evaluate.command[:4] == ("eval", "scenes", "--model", "bundled/scenes_sdxl")
    assert evaluate.command[evaluate.command.index("--denoiser") + 1].endswith("policy/unet")
    assert all(name in judge.command for name in JUDGES)
    recipe = read(entry, settings)
    assert recipe.seed == 3 and recipe.data.shuffle_labels


def test_the_flow_model_is_measured_where_its_gate_was(tmp_path: Path) -> None:
    settings = Settings(tmp_path, 7, 5)
    overrides = ("model.name_or_path=bundled/scenes_sd3", "model.max_sequence_length=16")
    recipe = read(Entry("scenes_dpo", 0), Settings(tmp_path, 7, 5, overrides))
    which = evaluation(settings, recipe)
    assert which[which.index("--guidance-scale") + 1] == "4.5"
    assert which[which.index("--max-sequence-length") + 1] == "16"
    assert base_folder(settings, recipe).name == "base-scenes_sd3"


FINISHED = {"steps": 4, "last": {"loss": 1.0}, "seconds": {"prepare": 1.0, "train": 2.0}}


def pretend(phase: Phase, ledger: Ledger, console: Console) -> None:
    """Leave what a phase would leave: half of the base's pictures right, three of four later."""
    ledger.add(phase.name, 6.0)
    folder = phase.product.parent
    if phase.name == "train":
        folder.mkdir(parents=True, exist_ok=True)
        phase.product.write_text(json.dumps(FINISHED))
    elif phase.name == "evaluate" and not phase.product.exists():
        base = "base-" in str(folder)
        finished_evaluation(folder, [1, 0, 1, 0] if base else [1, 1, 1, 0])
        phase.product.write_text("{}")
    elif phase.name == "judge":
        rows = [{"prompt": f"p{i}", **dict.fromkeys(JUDGES, 0.5)} for i in range(4)]
        phase.product.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_the_table_grows_with_every_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "perform", pretend)
    settings, planned = (
        Settings(tmp_path / "out", 2, 0),
        entries(["scenes_dpo"], [0, 1], controls=False),
    )
    assert bench(planned, settings, silent(), minutes=0) == []
    assert not (settings.out / "bench.json").exists(), "nothing was started after the limit"
    rows = bench(planned, settings, silent())
    assert [r["run"] for r in rows] == ["scenes_dpo-s0", "scenes_dpo-s1"]
    assert [r["difference"]["mean"] for r in rows] == [0.25, 0.25]
    assert (rows[0]["win"], rows[0]["lose"], rows[0]["minutes"]) == (1, 0, 0.1)
    kept = json.loads((settings.out / "bench.json").read_text())
    assert kept["rows"] == rows
    table = (settings.out / "table.md").read_text()
    assert table == markdown(lines(rows)) and table.count("\n") == 4
    assert "| scenes_dpo-s1 | scenes_sdxl | 4 | 0.500 | 0.750 | +0.250 [" in table
    again = bench(planned, settings, silent(), minutes=0)
    assert [r["run"] for r in again] == [r["run"] for r in rows], "finished runs are only read"
    settings.out.rename(tmp_path / "moved")
    moved = bench(planned, Settings(tmp_path / "moved", 2, 0), silent(), minutes=0)
    assert [r["run"] for r in moved] == [r["run"] for r in rows], "also where it was moved"


def test_minutes_of_a_run_whose_bench_was_killed_are_those_the_run_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "perform", pretend)
    planned, settings = entries(["scenes_dpo"], [0], controls=False), Settings(tmp_path, 2, 0)
    assert bench(planned, settings, silent())[0]["minutes"] == 0.1, "6 s of the whole phase"
    phases = tmp_path / "scenes_dpo-s0" / "phases.json"
    kept = json.loads(phases.read_text())
    del kept["seconds"]["train"]
    phases.write_text(json.dumps(kept))
    policy = tmp_path / "scenes_dpo-s0" / "policy" / "summary.json"
    policy.write_text(json.dumps(FINISHED | {"seconds": {"prepare": 30.0, "train": 90.0}}))
    monkeypatch.setattr(module, "perform", lambda *given: None)  # as every product is there
    assert bench(planned, settings, silent())[0]["minutes"] == 2.0


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints", None])
def test_a_run_killed_before_its_first_checkpoint_is_continued_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str | None
) -> None:
    """``train`` refuses a folder in which a run took a step, unless told to continue it."""
    entry, settings = Entry("scenes_dpo", 0), Settings(tmp_path, 2, 0)
    train = trained(tmp_path / entry.name, entry, settings, read(entry, settings))[0]
    quick = phases(tmp_path / "quick", "scenes_dpo", 2, 0)[1]
    assert train.name == quick.name == "train"
    for phase in (train, quick):
        run, called = phase.product.parent, []
        ledger = Ledger(run.parent, "x")
        run.mkdir()
        (run / "run.json").write_text("{}")
        if left is not None:
            (run / left).touch()

        def finish(
            command: list[str], run: Path = run, called: list[str] = called, **options: Any
        ) -> CompletedProcess[str]:
            called.extend(command)
            (run / "summary.json").write_text("{}")
            return CompletedProcess(command, 0)

        monkeypatch.setattr("subprocess.run", finish)
        perform(phase, ledger, silent())
        assert ("train.resume_from_checkpoint=latest" in called) == (left is not None)


def test_other_settings_in_the_same_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "perform", pretend)
    planned = entries(["scenes_dpo"], [0], controls=False)
    bench(planned, Settings(tmp_path / "out", 2, 0), silent())
    with pytest.raises(DataError, match="another version, recipe or setting"):
        bench(planned, Settings(tmp_path / "out", 3, 0), silent())


def test_trajectories_have_no_control_and_rounds_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "perform", pretend)
    planned, settings = entries(["scenes_spo"], [0], controls=True), Settings(tmp_path / "o", 2, 0)
    assert [r["run"] for r in bench(planned, settings, silent())] == ["scenes_spo-s0"]
    planned = entries(["scenes_rounds"], [0], controls=False)
    with pytest.raises(UserError, match="scenes_rounds has rounds"):
        bench(planned, Settings(tmp_path / "p", 2, 0), silent())


def test_a_wrong_recipe_stops_the_bench_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("a phase was run")

    monkeypatch.setattr(module, "perform", never)
    planned = entries(["scenes_dpo", "scenes_dpu"], [0], controls=False)
    with pytest.raises(RecipeError, match="did you mean 'scenes_dpo'"):
        bench(planned, Settings(tmp_path / "out", 2, 0), silent())
    assert not (tmp_path / "out").exists()
