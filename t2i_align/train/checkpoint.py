"""Checkpoints: a folder of safetensors and JSON with a manifest of hashes, written atomically.

    checkpoints/step-00000500/
        weights.safetensors      the trained parameters by name
        optimizer.safetensors    with optimizer.json, its skeleton (train/tree.py)
        ema.safetensors          when averaging
        objective.safetensors    the objective's own state, when it has any
        trainer.json             step, samples seen, schedule, scaler
        manifest.json            format version, size and SHA-256 of every file

A folder is built under a temporary name, synced and renamed, so a checkpoint exists wholly or not
at all. One of the same step is set aside as ``old-step-...`` until the new one stands. Loading
verifies every hash; a torn or edited checkpoint is passed over, with a line that says so. What a
killed save left is removed once a later save is done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_align.errors import StorageError, TrainingError
from t2i_align.plain_json import load_object, loads
from t2i_align.train.tree import pack, unpack

VERSION = 1
NAME = re.compile(r"step-(\d{8})")
ASIDE = "old-"  # prefix of what is being replaced
LEFT = re.compile(rf"\.step-\d{{8}}\.\d+\.tmp|{ASIDE}step-\d{{8}}")  # by a save that was killed
MANIFEST = "manifest.json"
REQUIRED = {"weights.safetensors", "optimizer.safetensors", "optimizer.json", "trainer.json"}
FILES = REQUIRED | {"ema.safetensors", "objective.safetensors"}


@dataclass
class TrainState:
    """Everything needed to continue a run exactly.

    Args:
        step: optimizer steps done.
        samples_seen: records consumed; decides which come next.
        weights: trained parameters by name.
        optimizer: optimizer.state_dict().
        trainer: JSON-able rest (schedule, scaler, recipe fingerprint).
        ema: averaged weights.
        objective: the objective's state.
    """

    step: int
    samples_seen: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    ema: dict[str, Tensor] = field(default_factory=dict)
    objective: dict[str, Tensor] = field(default_factory=dict)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` that becomes ``target`` when the block ends well.

    Raises:
        StorageError: the disk is full or refuses; the temporary folder is removed, nothing else is
            touched.
    """
    aside = target.with_name(f"{ASIDE}{target.name}")
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
        temporary.rename(target)
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists() and not target.exists():
            aside.rename(target)
        if is_storage_failure(error):
            raise StorageError(
                f"could not save {target}: {error}; earlier checkpoints are intact",
                "free disk space (or lower train.checkpoints_total_limit), then run again with "
                "train.resume_from_checkpoint=latest",
            ) from error
        raise


def is_storage_failure(error: BaseException) -> bool:
    """Whether an exception means that the disk is full, over quota, read-only or failing.

    safetensors reports I/O errors as its own exception with the system's text.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
    texts = ("No space left", "Disk quota", "Read-only file system", "Input/output error")
    return type(error).__name__ == "SafetensorError" and any(t in str(error) for t in texts)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``<output_dir>/checkpoints``.
        total_limit: keep this many; None keeps all.
    """

    def __init__(self, folder: Path, total_limit: int | None) -> None:
        """Create nothing yet."""
        self.folder = folder
        self.total_limit = total_limit
        self.warnings: list[str] = []

    def all(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir())

    def save(self, state: TrainState) -> Path:
        """Write one checkpoint, then apply the limit.

        Raises:
            StorageError: see :func:`atomic_folder`.
        """
        target = self.folder / f"step-{state.step:08d}"
        skeleton, tensors = pack(state.optimizer)
        meta = state.trainer | {"step": state.step, "samples_seen": state.samples_seen}
        with atomic_folder(target) as folder:
            save_file(contiguous(state.weights), folder / "weights.safetensors")
            save_file(tensors, folder / "optimizer.safetensors")
            (folder / "optimizer.json").write_text(json.dumps(skeleton))
            if state.ema:
                save_file(contiguous(state.ema), folder / "ema.safetensors")
            if state.objective:
                save_file(contiguous(state.objective), folder / "objective.safetensors")
            (folder / "trainer.json").write_text(json.dumps(meta, indent=1))
            files = {
                p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)}
                for p in sorted(folder.iterdir())
            }
            manifest = {"version": VERSION, "files": files}
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        self._sweep()
        self._retain(target)
        return target

    def _sweep(self) -> None:
        """Remove what killed saves left; only the run that holds the folder saves into it."""
        for path in self.folder.iterdir():
            if LEFT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _candidates(self) -> list[Path]:
        """Where a run may continue, best first: a kill may leave a step only as set aside."""
        aside = self.folder.glob(f"{ASIDE}step-*") if self.folder.is_dir() else ()
        left = [p for p in aside if LEFT.fullmatch(p.name) and p.is_dir()]
        key = {p: (p.name.removeprefix(ASIDE), p.name[0] == "s") for p in (*self.all(), *left)}
        return sorted(key, key=key.__getitem__, reverse=True)

    def _retain(self, written: Path) -> None:
        """Delete the oldest beyond the limit, never the one just written, which is good."""
        if self.total_limit is None:
            return
        others = [p for p in self.all() if p != written]
        for old in others[: max(0, len(others) + 1 - self.total_limit)]:
            shutil.rmtree(old, ignore_errors=True)

    def retire_after(self, step: int) -> None:
        """Rename checkpoints newer than the one a run continues from: another branch's."""
        for folder in self.all():
            if int(folder.name.removeprefix("step-")) > step:
                target = folder.with_name(f"stale-{folder.name}")
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)

    def load(self, which: str) -> TrainState | None:
        """The checkpoint to continue from.

        Args:
            which: ``latest`` or a folder.

        Returns:
            None when ``latest`` is asked for and there is no good checkpoint.

        Raises:
            TrainingError: a named folder is missing or damaged.
        """
        if which != "latest":
            folder = Path(which).expanduser()
            problem = verify(folder)
            if problem:
                raise TrainingError(
                    f"train.resume_from_checkpoint: {folder}: {problem}",
                    "use 'latest' to continue from the newest good one",
                )
            return read(folder)
        for folder in self._candidates():
            try:
                problem = verify(folder)
                if not problem:
                    return read(folder)
            except TrainingError as error:
                problem = error.message
            except OSError as error:  # a file that cannot be read
                problem = f"{error.filename}: {error.strerror}"
            self.warnings.append(f"checkpoint {folder.name} passed over: {problem}")
        return None


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies that share no memory, as safetensors wants them."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint folder, or an empty string."""
    try:
        manifest = load_object((folder / MANIFEST).read_bytes(), MANIFEST, TrainingError)
    except OSError:
        return "no manifest.json" if folder.is_dir() else "no such folder"
    except TrainingError as error:
        return error.message
    if manifest.get("version") != VERSION:
        return f"format version {manifest.get('version')}, this program reads {VERSION}"
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not all(isinstance(f, dict) for f in listed.values()):
        return "manifest.json lists no files"
    for name, facts in listed.items():
        file = folder / name
        if file.parent != folder or file.is_symlink():
            return f"manifest.json lists {name[:80]!r}, which is no file of the checkpoint"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts.get("bytes") or sha256(file) != facts.get("sha256"):
            return f"{name} does not match its hash (torn or edited)"
    unlisted = sorted(n for n in FILES if n not in listed and (folder / n).exists())
    if unlisted or not listed.keys() >= REQUIRED:
        names = unlisted or sorted(REQUIRED - listed.keys())
        return f"manifest.json does not list {', '.join(names)}"
    return ""


def read(folder: Path) -> TrainState:
    """Read a verified checkpoint.

    Raises:
        TrainingError: its files are whole, yet not what this program writes.
    """
    try:
        return _read(folder)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as e:
        raise TrainingError(
            f"{folder} is no checkpoint of this program: {e}", "use another checkpoint"
        ) from e


def _read(folder: Path) -> TrainState:
    optional = {}
    for name in ("ema", "objective"):
        file = folder / f"{name}.safetensors"
        optional[name] = load_file(file) if file.exists() else {}
    meta = loads((folder / "trainer.json").read_bytes())
    skeleton = loads((folder / "optimizer.json").read_bytes())
    return TrainState(
        step=_count(meta, "step"),
        samples_seen=_count(meta, "samples_seen"),
        weights=load_file(folder / "weights.safetensors"),
        optimizer=unpack(skeleton, load_file(folder / "optimizer.safetensors")),
        trainer=meta,
        ema=optional["ema"],
        objective=optional["objective"],
    )


def _count(meta: dict[str, Any], name: str) -> int:
    value = meta.pop(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value
