"""TensorStore: tensors on disk by content key, in safetensors shards that are never rewritten.

A store is a folder of ``shard-<uuid>.safetensors``. A tensor is named ``{key}/{name}``; the JSON
facts of an entry are in the shard's header under its key. There is no index file to tear: the
headers are the index. A shard is written to a temporary file, synced and renamed, so a kill at any
moment leaves whole shards and at most one stray temporary file. Reading is memory-mapped: what
:meth:`TensorStore.get` returns is a view of the file. The header also holds a hash of all tensors,
which :func:`problem_of` compares; shards of earlier versions have none and are read all the same.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_align.contract import TensorDict
from t2i_align.errors import ModelError, StorageError

log = logging.getLogger(__name__)

FLUSH_BYTES = 256 * 2**20
FLUSH_SECONDS = 300.0
STALE_SECONDS = 3600.0
HASH = "sha256"  # in a header's metadata; no key of an entry, which are content hashes
NO_HASH = "has no hash: an earlier version wrote it"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FULL = {errno.ENOSPC, errno.EDQUOT}


def storage_error(error: Exception, what: str) -> StorageError:
    """A failed write as a message; knows a full disk when it sees one."""
    number = getattr(error, "errno", None)
    found = re.search(r"os error (\d+)", str(error))  # safetensors hands errno on as text
    if number is None and found:
        number = int(found.group(1))
    if number in FULL:
        fix = "free space or set cache.dir to a larger disk, then run again: it continues from here"
        return StorageError(
            f"disk full while writing {what}; what was cached before is intact", fix
        )
    fix = "is cache.dir writable? what was cached before is intact"
    return StorageError(f"cannot write {what}: {error}", fix)


def make_folder(folder: Path) -> None:
    """Create a folder of the cache.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, str(folder)) from error


@contextlib.contextmanager
def saving(target: Path) -> Iterator[None]:
    """Turn a failed write inside the block into a message about ``target``.

    Raises:
        StorageError: the disk is full or not writable.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise storage_error(error, str(target)) from error


def temporary_name(target: Path) -> Path:
    """A hidden name beside ``target``, unique to this write."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")


def commit(temporary: Path, target: Path) -> None:
    """Sync ``temporary`` and rename it to ``target``, which is whole or as it was."""
    _sync(temporary)
    os.replace(temporary, target)
    _sync(target.parent)


@contextlib.contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """A temporary path that becomes ``target`` when the block, which only writes, ends well.

    Raises:
        StorageError: the disk is full or not writable; the temporary file is gone and ``target`` as
            it was.
    """
    temporary = temporary_name(target)
    try:
        with saving(target):
            yield temporary
            commit(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """One hash over names, types, shapes and contents."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        _hash_into(hasher, name, tensors[name])
    return hasher.hexdigest()


def _hash_into(hasher: Any, name: str, tensor: Tensor) -> None:
    hasher.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    hasher.update(plain.view(torch.uint8).numpy())


def problem_of(path: Path) -> str:
    """What is wrong with a shard: empty, :data:`NO_HASH`, or why it is not what was written."""
    from safetensors import SafetensorError, safe_open

    hasher = hashlib.sha256()
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get(HASH)
            for name in sorted(file.keys()) if written else ():
                _hash_into(hasher, name, file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        return f"cannot be read: {error}"
    if written is None:
        return NO_HASH
    return "" if hasher.hexdigest() == written else "its contents are not what was written"


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype, who: str, fix: str) -> TensorDict:
    """Tensors as the cache keeps them: floating ones in ``dtype``, all compact on the CPU.

    Raises:
        ModelError: an encoder gave a non-finite number, or one that ``dtype`` cannot hold.
    """
    kept = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point():
            if not torch.isfinite(tensor).all():
                raise ModelError(f"{who}: non-finite {name} from the frozen encoder", fix)
            largest = tensor.abs().max().item() if tensor.numel() else 0.0
            if largest > torch.finfo(dtype).max:
                short, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
                raise ModelError(
                    f"{who}: {name} reaches {largest:.4g}, {short} ends at {limit:.4g}",
                    "set cache.dtype: float32 (or bfloat16)",
                )
            tensor = tensor.to(dtype)
        kept[name] = tensor.clone(memory_format=torch.contiguous_format)
    return kept


class _Shard:
    """One file, opened when first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        self._facts: dict[str, str] | None = None

    @property
    def handle(self) -> Any:
        if self._handle is None:
            from safetensors import safe_open

            self._handle = safe_open(self.path, framework="pt")
        return self._handle

    def facts(self, key: str) -> dict[str, Any]:
        if self._facts is None:
            self._facts = dict(self.handle.metadata() or {})
        return json.loads(self._facts.get(key, "{}"))


class TensorStore:
    """A persistent mapping from content keys to dicts of tensors.

    Args:
        folder: where the shards are; created if missing.
        flush_bytes: a shard is written when this much waits.
        flush_seconds: and when the last was this long ago, so that a kill costs minutes at most.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        flush_bytes: int = FLUSH_BYTES,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        """Read the headers of the shards that are there."""
        self.folder = Path(folder)
        self.flush_bytes = flush_bytes
        self.flush_seconds = flush_seconds
        make_folder(self.folder)
        self._index: dict[str, tuple[_Shard, tuple[str, ...]]] = {}
        self._pending: dict[str, tuple[TensorDict, Mapping[str, Any]]] = {}
        self._pending_bytes = 0
        self._flushed = time.monotonic()
        self._open()

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open

        for stray in self.folder.glob(".shard-*.tmp"):
            with contextlib.suppress(OSError):  # another process may be writing, or cleaning up
                if time.time() - stray.stat().st_mtime > STALE_SECONDS:
                    stray.unlink()
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self._add(path, list(file.keys()))
            except SafetensorError as error:
                aside = path.with_name(path.name + ".corrupt")
                path.rename(aside)
                log.warning(
                    "cache shard set aside as %s (%s); its entries are rebuilt", aside, error
                )

    def _add(self, path: Path, names: list[str]) -> None:
        shard = _Shard(path)
        entries: dict[str, list[str]] = {}
        for name in names:
            key, _, tensor = name.partition("/")
            entries.setdefault(key, []).append(tensor)
        for key, tensors in entries.items():
            self._index[key] = (shard, tuple(tensors))

    def __contains__(self, key: str) -> bool:
        """Whether an entry is stored or waits to be."""
        return key in self._index or key in self._pending

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._index.keys() | self._pending.keys())

    def keys(self) -> set[str]:
        """Keys of all entries."""
        return set(self._index) | set(self._pending)

    def get(self, key: str) -> TensorDict:
        """Tensors of an entry, memory-mapped; do not write into them. KeyError without it."""
        if key in self._pending:
            return dict(self._pending[key][0])
        shard, names = self._index[key]
        return {name: shard.handle.get_tensor(f"{key}/{name}") for name in names}

    def meta(self, key: str) -> dict[str, Any]:
        """JSON facts of an entry."""
        if key in self._pending:
            return json.loads(json.dumps(self._pending[key][1]))
        return self._index[key][0].facts(key)

    def put(
        self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None
    ) -> None:
        """Add an entry; an existing key is left as it is, since a key names its content.

        Raises:
            StorageError: a shard was due and could not be written.
        """
        assert "/" not in key and tensors, key
        if key in self:
            return
        self._pending[key] = (dict(tensors), dict(meta or {}))
        self._pending_bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        due = time.monotonic() - self._flushed > self.flush_seconds
        if due or self._pending_bytes >= self.flush_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one shard.

        Raises:
            StorageError: the disk is full or not writable; earlier shards are intact, what waited
                is kept in memory.
        """
        from safetensors.torch import save_file

        self._flushed = time.monotonic()
        if not self._pending:
            return
        tensors = {
            f"{key}/{name}": tensor
            for key, (entry, _) in self._pending.items()
            for name, tensor in entry.items()
        }
        facts = {key: json.dumps(meta) for key, (_, meta) in self._pending.items() if meta}
        facts[HASH] = tensors_sha256(tensors)
        path = self.folder / f"shard-{uuid.uuid4().hex}.safetensors"
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata=facts)
        self._add(path, list(tensors))
        self._pending, self._pending_bytes = {}, 0
