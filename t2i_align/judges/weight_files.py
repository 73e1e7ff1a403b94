"""Reading published weights without trusting them.

A pickle can run code when it is read, so it is read with ``weights_only=True``, and only if its
sha256 is the one the card or the user gave. ``t2i-align judges convert`` turns one into safetensors
once and for all; the converted file remembers the hash of what it was made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.errors import ModelError

SOURCE = "source_sha256"  # in a converted file's metadata: the hash of the published one
PICKLES = (".pt", ".pth", ".bin", ".tar", ".ckpt", ".pkl")


def load_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file, on the CPU, in the file's own types.

    Args:
        path: ``.safetensors``, or a pickle of tensors (perhaps under ``state_dict``).
        sha256: the hash it must have; for a converted file, the hash of what it was made from.

    Raises:
        ModelError: missing, another hash, a pickle without a hash or with more than tensors.
    """
    if not path.is_file():
        raise ModelError(f"no weights file at {path}", "give the file itself")
    if path.suffix == ".safetensors":
        return _safetensors(path, sha256)
    if path.suffix not in PICKLES:
        known = ", ".join((".safetensors", *PICKLES))
        raise ModelError(f"{path.name} is no kind of weights file known here", f"known: {known}")
    _check_pickle(path, sha256)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        raise ModelError(
            f"{path.name} holds more than tensors and is not read: {str(error).splitlines()[0]}",
            "use the publisher's safetensors, or the compressed file where there is one",
        ) from error
    return _only_tensors(found, path)


def _safetensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if sha256 is not None:
                check_hash(path, sha256)
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ModelError(f"{path} is no safetensors file: {error}", "bring it again") from error


def _check_pickle(path: Path, sha256: str | None) -> None:
    found = sha256_of(path)
    if sha256 is None:
        raise ModelError(
            f"{path.name} is a pickle, which may run code, and no sha256 is known for it",
            f"compare {found} with the publisher's, then run `t2i-align judges convert NAME "
            f"{path.name} OUT --sha256 {found}`; or bring safetensors",
        )
    if found != sha256:
        raise _other_hash(path, sha256, found)


def check_hash(path: Path, wanted: str) -> None:
    """Refuse a file that is neither the one that was meant nor what `judges convert` made of it.

    Raises:
        ModelError: missing, or another hash.
    """
    from safetensors import SafetensorError, safe_open

    made_from = None
    try:
        if path.suffix == ".safetensors" and path.is_file():
            with safe_open(path, "pt") as file:
                made_from = (file.metadata() or {}).get(SOURCE)
    except SafetensorError as error:
        raise ModelError(f"{path} is no safetensors file: {error}", "bring it again") from error
    if wanted not in (made_from, sha256_of(path)):
        raise _other_hash(path, wanted, sha256_of(path))


def _other_hash(path: Path, wanted: str, found: str) -> ModelError:
    return ModelError(
        f"{path.name} has sha256 {found}, not {wanted}",
        "it is another file, or damaged; bring it again, or give its own hash if you trust it",
    )


def _only_tensors(found: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ModelError(
            f"{path.name} holds a {type(found).__name__}, not names and tensors",
            "it needs a dict of tensors, perhaps under 'state_dict'",
        )
    return {str(key): value for key, value in found.items()}


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Put tensors into a module: every key used, every key there, every shape right.

    Floats are cast to float32 first; a module on the meta device takes the tensors themselves.

    Args:
        module: built for exactly these tensors.
        tensors: by the module's own names.
        what: the subject of the error's sentence.

    Raises:
        ModelError: names the first few keys of each kind.
    """
    own = module.state_dict()
    same = own.keys() & tensors.keys()
    wrong = [
        f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}"
        for k in sorted(same)
        if own[k].shape != tensors[k].shape
    ]
    kinds = {
        "missing": sorted(own.keys() - same),
        "unexpected": sorted(tensors.keys() - same),
        "of another shape": wrong,
    }
    if any(kinds.values()):
        told = "; ".join(f"{_few(names)} {kind}" for kind, names in kinds.items() if names)
        raise ModelError(f"the weights do not fit {what}: {told}", "is it the right file?")
    # copies, since the file behind a memory-mapped tensor may vanish
    ready = {
        k: v.to(torch.float32 if v.is_floating_point() else v.dtype, copy=True)
        for k, v in tensors.items()
    }
    module.load_state_dict(ready, assign=True)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def sha256_of(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and contents of all its files.

    Raises:
        ModelError: nothing there.
    """
    if not path.exists():
        raise ModelError(f"nothing at {path} to take the sha256 of")
    if path.is_file():
        return _file_hash(path, path.stat().st_mtime_ns, path.stat().st_size)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    named = (f"{p.relative_to(path).as_posix()}\0{sha256_of(p)}" for p in files)
    return combined(named)


@lru_cache(maxsize=256)
def _file_hash(path: Path, _changed: int, _size: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def combined(hashes: Iterable[str]) -> str:
    """One hash of several, in their order."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
