"""What a killed save leaves behind: found when it is all there is, removed when it is not."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from t2i_align.train import checkpoint
from t2i_align.train.checkpoint import Checkpoints, verify
from tests.unit.test_checkpoint import same, state


def killed_at(folder: Path, step: int, rename: int) -> None:
    """Save in a forked process that is killed in front of its n-th rename."""
    pid = os.fork()
    if pid == 0:
        real, count = Path.rename, [0]

        def counting(self: Path, target: Any) -> Path:
            count[0] += 1
            if count[0] == rename:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, target)

        Path.rename = counting
        try:
            Checkpoints(folder, 1).save(state(step))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("rename", [1, 2])
def test_replacing_the_only_checkpoint_is_safe_at_every_moment(tmp_path: Path, rename: int) -> None:
    """The same step saved twice, with a limit of one.

    Killed in front of the rename that sets the old one aside (1), and of the one that puts the new
    one in its place (2): the old one is found.
    """
    kept = Checkpoints(tmp_path, 1)
    kept.save(state(4))
    killed_at(tmp_path, 4, rename)
    found = kept.load("latest")
    assert found is not None and same(vars(found), vars(state(4)))
    names = {p.name for p in tmp_path.iterdir()}
    assert ("old-step-00000004" in names) is (rename == 2)
    assert any(n.startswith(".step-00000004.") for n in names)
    kept.save(state(5))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_a_replaced_checkpoint_ranks_by_its_step(tmp_path: Path) -> None:
    """Newer steps first, of one step the one in place first; a damaged one gives way."""
    kept = Checkpoints(tmp_path, None)
    for step in (2, 4):
        kept.save(state(step))
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "old-step-00000004")
    (tmp_path / "step-00000004" / "weights.safetensors").unlink()
    found = kept.load("latest")
    assert found is not None and found.step == 4
    assert kept.warnings == ["checkpoint step-00000004 passed over: weights.safetensors is missing"]
    (tmp_path / "old-step-00000004" / "trainer.json").write_text("{}")
    found = kept.load("latest")
    assert found is not None and found.step == 2


def test_a_failing_rename_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path, None)
    kept.save(state(3))
    real = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise PermissionError("no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError):
        kept.save(state(3))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    assert verify(tmp_path / "step-00000003") == ""


def test_only_what_a_save_leaves_is_removed(tmp_path: Path) -> None:
    others = ["old-notes", ".step-1.tmp", "stale-step-00000001", "step-x"]
    left = [".step-00000001.77.tmp", "old-step-00000001"]
    for name in (*others, *left):
        (tmp_path / name).mkdir()
    Checkpoints(tmp_path, None).save(state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "step-00000002"])


def test_a_file_that_cannot_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O error is the disk's way of saying that a checkpoint is torn."""
    kept = Checkpoints(tmp_path, None)
    for step in (1, 2):
        kept.save(state(step))
    real = checkpoint.sha256

    def failing(path: Path) -> str:
        if path.parent.name == "step-00000002":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256", failing)
    found = kept.load("latest")
    assert found is not None and found.step == 1
    assert "Input/output error" in kept.warnings[0]
