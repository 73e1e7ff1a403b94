"""Checkpoints exist wholly or not at all, and a damaged one is passed over."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.errors import StorageError, TrainingError
from t2i_align.train import checkpoint
from t2i_align.train.checkpoint import Checkpoints, TrainState
from t2i_align.train.tree import pack, unpack


def state(step: int) -> TrainState:
    shared = torch.arange(4.0)
    return TrainState(
        step=step,
        samples_seen=8 * step,
        weights={"a": torch.full((2, 3), float(step)), "view": shared[:2]},
        optimizer={
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": shared[2:], "count": 7}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "params": [0], "foreach": None}],
        },
        trainer={"scaler": None},
        ema={"a": torch.full((2, 3), step / 2)},
        objective={"mean": torch.tensor(0.25)},
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.shape == b.shape and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_round_trip_is_exact(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, None)
    kept.save(state(3))
    back = kept.load("latest")
    assert back is not None
    assert same(vars(back), vars(state(3)))


def test_pack_refuses_what_would_need_pickle() -> None:
    tree = {"x": [torch.zeros(()), {1: None}], "y": (True, "s", 1.5)}
    assert same(unpack(*pack(tree)), tree)
    with pytest.raises(TypeError, match="without pickle"):
        pack({"x": object()})


@pytest.mark.parametrize("damage", ["edit", "truncate", "delete", "manifest"])
def test_damaged_checkpoint_is_passed_over_with_a_line(tmp_path: Path, damage: str) -> None:
    kept = Checkpoints(tmp_path, None)
    kept.save(state(1))
    newest = kept.save(state(2))
    file = newest / "weights.safetensors"
    raw = bytearray(file.read_bytes())
    if damage == "edit":
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif damage == "truncate":
        file.write_bytes(raw[:-5])
    elif damage == "delete":
        file.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    found = kept.load("latest")
    assert found is not None and found.step == 1
    assert len(kept.warnings) == 1 and "step-00000002 passed over" in kept.warnings[0]
    with pytest.raises(TrainingError, match="use 'latest'"):
        kept.load(str(newest))


def test_nothing_good_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", None).load("latest") is None
    with pytest.raises(TrainingError, match="no such folder"):
        Checkpoints(tmp_path, None).load(str(tmp_path / "x"))


def test_limit_keeps_the_newest(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, 2)
    for step in (1, 2, 3):
        kept.save(state(step))
    assert [p.name for p in kept.all()] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("kind", ["oserror", "safetensors", "interrupt"])
def test_a_failed_save_leaves_earlier_ones_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Disk full in the middle of a save, as the system or safetensors reports it, or a kill."""
    from safetensors import SafetensorError

    kept = Checkpoints(tmp_path, 1)
    kept.save(state(1))
    failures: dict[str, BaseException] = {
        "oserror": OSError(errno.ENOSPC, "No space left on device"),
        "safetensors": SafetensorError("Error while serializing: No space left on device"),
        "interrupt": KeyboardInterrupt(),
    }
    real, calls = checkpoint.save_file, []

    def failing(tensors: Any, path: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise failures[kind]
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", failing)
    expected = KeyboardInterrupt if kind == "interrupt" else StorageError
    with pytest.raises(expected) as caught:
        kept.save(state(2))
    if kind != "interrupt":
        assert "earlier checkpoints are intact" in str(caught.value)
        assert "resume_from_checkpoint=latest" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    found = kept.load("latest")
    assert found is not None and found.step == 1


def test_format_version_is_checked(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, None)
    manifest = kept.save(state(1)) / "manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"version": 99}))
    assert kept.load("latest") is None and "format version 99" in kept.warnings[0]


def test_the_checkpoint_just_written_is_never_deleted(tmp_path: Path) -> None:
    """A damaged newer one, or another branch's, must not outrank it."""
    kept = Checkpoints(tmp_path, 1)
    kept.save(state(9))
    (tmp_path / "step-00000009" / "weights.safetensors").unlink()
    kept.save(state(5))
    found = kept.load("latest")
    assert [p.name for p in kept.all()] == ["step-00000005"]
    assert found is not None and found.step == 5


def test_newer_checkpoints_of_another_branch_are_set_aside(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, None)
    for step in (2, 4, 6):
        kept.save(state(step))
    kept.retire_after(4)
    found = kept.load("latest")
    assert found is not None and found.step == 4
    assert (tmp_path / "stale-step-00000006").is_dir()
