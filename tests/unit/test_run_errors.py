"""What a run says when something is wrong.

Each message names the thing and the fix, and nothing saved is lost.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.errors import (
    DataError,
    ModelError,
    OutputError,
    RecipeError,
    StorageError,
    TrainingError,
    UserError,
)
from t2i_align.folder_lock import LOCK_FILE, occupied
from t2i_align.train import checkpoint
from t2i_align.train.output import RUN_FILE
from tests import runs
from tests.tiny import pipeline_folder, voxel_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.point_model(tmp_path_factory.mktemp("model"))


def sections(model: Path, folder: Path, **train: Any) -> dict[str, Any]:
    data = folder / "pairs.jsonl"
    if not data.exists():
        runs.point_pairs(data, 32, seed=0)
    options: dict[str, Any] = {
        "train_batch_size": 4,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
    }
    return runs.voxel_sections(model, data, folder / "cache", **options | train)


def test_non_finite_loss_names_step_and_records(model: Path, tmp_path: Path) -> None:
    """A rate that blows up after the first checkpoint.

    Stop, name step and records, keep the checkpoint.
    """
    recipe = sections(
        model,
        tmp_path,
        learning_rate=1e38,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=2,
        max_train_steps=9,
        checkpointing_steps=1,
    )
    with pytest.raises(TrainingError) as caught:
        runs.train(tmp_path, "run", recipe)
    text = str(caught.value)
    assert "non-finite" in text and "at step" in text and "records: " in text
    assert "resume_from_checkpoint=latest" in text and caught.value.exit_code == 5
    named = text.split("records: ")[1].split(";")[0].split(", ")
    assert 1 <= len(named) <= 8 and all(0 <= int(n) < 32 for n in named)
    kept = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", None).load("latest")
    assert kept is not None
    assert all(bool(w.isfinite().all()) for w in kept.weights.values())


def test_non_finite_gradient_touches_no_weight(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss with a broken backward: the last checkpoint is good, and it continues."""
    from t2i_align.train.engine import Engine

    recipe = sections(model, tmp_path, checkpointing_steps=1, checkpoints_total_limit=1)
    backward = Engine.backward

    def broken(self: Engine, loss: torch.Tensor) -> None:
        backward(self, loss)
        if self.step_count == 2:
            next(iter(self.trained.values())).grad.fill_(float("nan"))  # type: ignore[union-attr]

    monkeypatch.setattr(Engine, "backward", broken)
    with pytest.raises(TrainingError, match=r"non-finite gradient .* at step 3; records: \d+"):
        runs.train(tmp_path, "run", recipe)
    assert all(bool(w.isfinite().all()) for w in runs.weights(tmp_path / "run", 2).values())
    monkeypatch.setattr(Engine, "backward", backward)
    runs.train(tmp_path, "run", recipe, "train.resume_from_checkpoint=latest")
    runs.train(tmp_path, "clean", recipe)
    assert runs.losses(tmp_path / "run") == runs.losses(tmp_path / "clean")


def test_a_run_that_never_started_does_not_own_its_folder(model: Path, tmp_path: Path) -> None:
    recipe = sections(model, tmp_path)
    good = recipe["data"]["path"]
    bad = [{"id": "0", "prompt": "p", "chosen": [[[[1.0]]]], "rejected": [[[[1.0]]]]}]
    recipe["data"]["path"] = str(runs.write_jsonl(tmp_path / "bad.jsonl", bad))
    with pytest.raises(DataError):
        runs.train(tmp_path, "run", recipe)
    recipe["data"]["path"] = good
    assert runs.train(tmp_path, "run", recipe)["steps"] == 4


def test_other_data_or_other_adapters_are_not_resumed(model: Path, tmp_path: Path) -> None:
    recipe = sections(model, tmp_path)
    runs.train(tmp_path, "run", recipe)
    runs.point_pairs(Path(recipe["data"]["path"]), 31, seed=0)
    with pytest.raises(TrainingError, match="the data changed since the checkpoint"):
        runs.train(tmp_path, "run", recipe, "train.resume_from_checkpoint=latest")
    runs.point_pairs(Path(recipe["data"]["path"]), 32, seed=0)
    other = tmp_path / "run" / "checkpoints" / "step-00000004"
    for name, changes, text in (
        ("lora", {"model": recipe["model"] | {"lora": {"r": 2}}}, "trains other parameters"),
        ("ema", {"train": recipe["train"] | {"ema_decay": 0.9}}, "holds no averaged weights"),
    ):
        with pytest.raises(TrainingError, match=text):
            runs.train(tmp_path, name, recipe | changes, f"train.resume_from_checkpoint={other}")


def test_output_folder_of_another_run_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = sections(model, tmp_path)
    runs.train(tmp_path, "run", recipe)
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(OutputError, match=r"already holds a run\n.*resume_from_checkpoint=latest"):
        runs.train(tmp_path, "run", recipe)
    with pytest.raises(
        OutputError, match=r"another recipe: objective\.beta: 5\.0 -> 7\.0"
    ) as caught:
        runs.train(
            tmp_path, "run", recipe, "objective.beta=7", "train.resume_from_checkpoint=latest"
        )
    assert caught.value.exit_code == 7
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before


def test_a_run_begun_before_an_option_came_goes_on(model: Path, tmp_path: Path) -> None:
    recipe = sections(model, tmp_path)
    runs.train(tmp_path, "run", recipe, "train.max_train_steps=2")
    marker = tmp_path / "run" / "run.json"
    noted = json.loads(marker.read_text())
    before = noted["recipe"]
    del before["model"]["lora"], before["draw"]["num_draws"], before["train"]["mixed_precision"]
    del before["train"]["distributed"]
    before["cache"]["gone_since"] = 1  # what does not matter here may even be unreadable
    marker.write_text(json.dumps(noted))
    later = ["train.resume_from_checkpoint=latest", "objective.beta=7"]
    with pytest.raises(OutputError, match=r"another recipe: objective\.beta: 5\.0 -> 7\.0\n") as e:
        runs.train(tmp_path, "run", recipe, *later)
    assert "None ->" not in str(e.value)
    assert runs.train(tmp_path, "run", recipe, later[0])["steps"] == 4
    before["model"]["gone_since"] = 1  # of a version this one cannot read: told as it stands
    marker.write_text(json.dumps(noted))
    with pytest.raises(OutputError, match=r"model\.gone_since: 1 -> None"):
        runs.train(tmp_path, "run", recipe, later[0])


def test_two_processes_do_not_train_into_one_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sections(model, tmp_path)
    with occupied(tmp_path / "run", RUN_FILE):
        with pytest.raises(OutputError, match=r"another process is training in .*run\n.*stop it"):
            runs.train(tmp_path, "run", recipe)
        assert not (tmp_path / "run" / "run.json").exists()
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
        with occupied(tmp_path / "run", RUN_FILE):
            """A further rank of the same training."""
        monkeypatch.delenv("OMPI_COMM_WORLD_RANK")
    (tmp_path / "run" / f".{RUN_FILE}.tmp").touch()  # of a kill while it was written
    assert {f.name for f in (tmp_path / "run").iterdir()} <= {LOCK_FILE, f".{RUN_FILE}.tmp"}
    assert runs.train(tmp_path, "run", recipe)["steps"] == 4


def test_output_folder_with_other_files_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="holds no run of t2i-align"):
        runs.train(tmp_path, "run", sections(model, tmp_path))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


def test_resume_of_a_finished_run_can_be_longer(model: Path, tmp_path: Path) -> None:
    recipe = sections(model, tmp_path)
    runs.train(tmp_path, "run", recipe)
    summary = runs.train(
        tmp_path, "run", recipe, "train.max_train_steps=6", "train.resume_from_checkpoint=latest"
    )
    assert summary["steps"] == 6 and len(runs.losses(tmp_path / "run")) == 6


def test_disk_full_while_saving_keeps_the_old_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoint.save_file, []

    def failing(tensors: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) > 2:  # the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", failing)
    with pytest.raises(
        StorageError, match=r"No space left.*earlier checkpoints are intact"
    ) as caught:
        runs.train(tmp_path, "run", sections(model, tmp_path))
    assert caught.value.exit_code == 6
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    resumed = sections(model, tmp_path)
    runs.train(tmp_path, "run", resumed, "train.resume_from_checkpoint=latest")
    runs.train(tmp_path, "clean", resumed)
    assert runs.losses(tmp_path / "run") == runs.losses(tmp_path / "clean")


def test_a_damaged_newest_checkpoint_is_passed_over(model: Path, tmp_path: Path) -> None:
    recipe = sections(model, tmp_path)
    runs.train(tmp_path, "run", recipe)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    again = runs.train(tmp_path, "run", recipe, "train.resume_from_checkpoint=latest")
    assert again["steps"] == 4
    runs.train(tmp_path, "clean", recipe)
    assert runs.losses(tmp_path / "run") == runs.losses(tmp_path / "clean")


def test_all_ties_and_no_usable_pair(model: Path, tmp_path: Path) -> None:
    sdxl = pipeline_folder("sdxl", tmp_path / "sdxl")
    for name, kinds in {"ties": {"ties": range(6)}, "broken": {"broken": range(6)}}.items():
        data = runs.pickapic(tmp_path / f"{name}.parquet", 6, **kinds)
        recipe = {
            "model": {"name_or_path": str(sdxl), "resolution": 64, "lora": {"r": 2}},
            "objective": {"type": "dpo"},
            "data": {"type": "pickapic", "path": str(data)},
            "cache": {"dir": str(tmp_path / "cache")},
        }
        with pytest.raises(DataError) as caught:
            runs.train(tmp_path, name, recipe)
        assert caught.value.exit_code == 3
        assert ("6 ties" in str(caught.value)) is (name == "ties"), str(caught.value)


def test_missing_model_wrong_column_unreadable_parquet(model: Path, tmp_path: Path) -> None:
    """Found before anything is created, through the same recipe checks ``validate`` runs."""
    good = sections(model, tmp_path)
    cases: list[tuple[dict[str, Any], str]] = []
    missing = json.loads(json.dumps(good))
    missing["model"] = {"type": "diffusers", "name_or_path": str(tmp_path / "nowhere")}
    cases.append((missing, "model.name_or_path"))
    column = json.loads(json.dumps(good))
    path = runs.write_jsonl(tmp_path / "c.jsonl", [{"prompt": "p", "chosn": [1], "rejected": [2]}])
    column["data"]["path"] = str(path)
    cases.append((column, "chosen"))
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1 not really")
    parquet = json.loads(json.dumps(good))
    parquet["data"]["path"] = str(torn)
    cases.append((parquet, "torn.parquet"))
    for number, (recipe, named) in enumerate(cases):
        with pytest.raises(UserError) as caught:
            runs.train(tmp_path, f"bad{number}", recipe)
        assert isinstance(caught.value, (RecipeError, ModelError, DataError))
        assert named in str(caught.value)
        assert not (tmp_path / f"bad{number}").exists()


def test_frozen_weights_stay_bit_equal_and_adapters_move(tmp_path: Path) -> None:
    """One DPO step changes only what should train, for full and LoRA runs of the voxel flow."""
    from safetensors.torch import load_file

    model = voxel_folder(tmp_path / "voxel")
    torch.manual_seed(0)
    rows = [
        {"id": str(i), "prompt": "p"}
        | {k: torch.randn(8, 16, 16, 16).tolist() for k in ("chosen", "rejected")}
        for i in range(4)
    ]
    data = runs.write_jsonl(tmp_path / "v.jsonl", rows)
    base = load_file(model / "diffusion_pytorch_model.safetensors")
    recipe = runs.voxel_sections(
        model, data, tmp_path / "cache", learning_rate=1e-3, train_batch_size=2, max_train_steps=2
    )
    runs.train(tmp_path, "full", recipe)
    full = load_file(tmp_path / "full" / "diffusion_pytorch_model.safetensors")
    assert sum(not torch.equal(base[k], full[k]) for k in base) > len(base) // 2
    recipe["model"]["lora"] = {"r": 2, "lora_alpha": 2}
    runs.train(tmp_path, "lora", recipe)
    trained = runs.weights(tmp_path / "lora", 2)
    assert all("lora_" in k for k in trained)
    assert any(v.abs().max() > 0 for k, v in trained.items() if "lora_B" in k)
    assert load_file(model / "diffusion_pytorch_model.safetensors").keys() == base.keys()
