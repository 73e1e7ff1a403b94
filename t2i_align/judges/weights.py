"""Where a judge's published weights lie.

Looked for in this order: ``name_or_path`` as a path; ``$T2I_ALIGN_WEIGHTS/<judge>/`` or, for
weights that judges share, ``$T2I_ALIGN_WEIGHTS/<last part of the hub id>/``; the hub (its cache
first). A missing file is an error that says which one to bring, from where, and where to put it.

How they are read, and why a pickle needs a hash, is in weight_files.py; its functions are part of
this module's surface.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field

from t2i_align.errors import ModelError
from t2i_align.judges.weight_files import (
    PICKLES,
    check_hash,
    combined,
    load_strict,
    load_tensors,
    sha256_of,
)
from t2i_align.options import Options

__all__ = [
    "VARIABLE",
    "WeightsOptions",
    "check_hash",
    "combined",
    "hub_id",
    "load_strict",
    "load_tensors",
    "locate",
    "sha256_of",
    "weights_home",
]
VARIABLE = "T2I_ALIGN_WEIGHTS"
CONVERTED = "model.safetensors"  # what `judges convert` writes
SAFE = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # of a whole repository


class WeightsOptions(Options):
    """Mix-in of every judge that brings published weights."""

    name_or_path: str | None = Field(
        None, description="file or folder (also relative to the card's folder), or a hub id"
    )
    revision: str | None = Field(None, description="commit of a hub id")
    filename: str | None = Field(None, description="the file in the folder or repository")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="of that file; a pickle is refused without it"
    )


def weights_home() -> Path:
    """``$T2I_ALIGN_WEIGHTS``, by default ``~/.cache/t2i-align/weights``."""
    given = os.environ.get(VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache/t2i-align/weights"


def locate(options: Any, folder: Path, judge: str, filename: str | None = None) -> Path:
    """The file of a judge's weights, or its folder when no file name is known.

    Args:
        options: a WeightsOptions, or any options with its fields.
        folder: the card's folder.
        judge: its name, or that of shared weights.
        filename: the published file when the options name none.

    Raises:
        ModelError: it is nowhere; says what to bring, from where, and where to put it.
    """
    wanted = options.filename or filename
    name = options.name_or_path
    if name is not None:
        path = folder / Path(name).expanduser()
        if path.is_file() or (path.is_dir() and wanted is None):
            return path
        if path.is_dir():
            return _in_folder(path, str(wanted), judge)
        if _only_a_path(name):
            raise ModelError(
                f"weights of '{judge}': nothing at {path}", _bring(options, folder, judge, wanted)
            )
    for place in _places(name, judge):
        found = place if wanted is None else _either(place, wanted, place.name == judge)
        if place.is_dir() and found is not None:
            return found
    if name is None:
        fix = _bring(options, folder, judge, wanted)
        raise ModelError(f"the weights of '{judge}' are missing", fix)
    return _from_hub(options, folder, judge, wanted)


def hub_id(options: Any, folder: Path) -> str | None:
    """``name_or_path`` if it is a hub id, None if it is a path or not given.

    Args:
        options: a WeightsOptions, or any options with its fields.
        folder: the card's folder.
    """
    name = options.name_or_path
    if name is None or _only_a_path(name) or (folder / Path(name).expanduser()).exists():
        return None
    return name


def _only_a_path(name: str) -> bool:
    """Whether a name cannot be a hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name


def _places(name: str | None, judge: str) -> list[Path]:
    """Folders under the weights' home."""
    names = [judge] if name is None else [judge, name.rpartition("/")[2]]
    return [weights_home() / part for part in dict.fromkeys(names)]


def _either(folder: Path, wanted: str, own: bool = True) -> Path | None:
    """The wanted file, or what ``judges convert`` wrote, which is taken before a pickle.

    Only in a judge's own folder: in one that judges share (HPSv2 and v2.1) it may be another's.
    """
    names = (wanted, CONVERTED) if wanted.endswith(".safetensors") else (CONVERTED, wanted)
    names = names if own else (wanted,)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _in_folder(folder: Path, wanted: str, judge: str) -> Path:
    found = _either(folder, wanted)
    if found is None:
        raise ModelError(
            f"weights of '{judge}': neither {wanted} nor {CONVERTED} in {folder}",
            "put the file there, or name another with filename",
        )
    return found


def _bring(options: Any, folder: Path, judge: str, wanted: str | None) -> str:
    """What to bring, from where, and where to put it."""
    from t2i_align.catalog import read_card

    what = wanted or "the model's folder (config.json, weights, tokenizer)"
    known = hub_id(options, folder)
    if known is not None:
        what += f" of {known} (revision {options.revision or 'main'})"
    elif (folder / "card.yaml").is_file():
        what += f" of {read_card(folder / 'card.yaml').sources[0].id}"
    if wanted is not None and not wanted.endswith(".safetensors"):
        return f"bring {what} and run `t2i-align judges convert {judge} FILE` once"
    return f"bring {what} and put it in {weights_home() / judge}/"


def _from_hub(options: Any, folder: Path, judge: str, wanted: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, revision = options.name_or_path, options.revision
    if wanted is not None and wanted.endswith(PICKLES) and options.sha256 is None:
        raise ModelError(
            f"weights of '{judge}': {wanted} of '{repo}' is a pickle, which may run code, and no "
            "sha256 is known for it, so it is not downloaded",
            f"download it yourself, compare its sha256 with the publisher's, then run `t2i-align "
            f"judges convert {judge} {wanted} {weights_home() / judge} --sha256 HASH`",
        )
    try:
        if wanted is None:
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(SAFE)))
        return Path(hf_hub_download(repo, wanted, revision=revision))
    except Exception as error:  # network, permission or repository: many types, one remedy
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"weights of '{judge}': {wanted or 'the model'} of '{repo}' is not on this machine and "
            f"could not be fetched: {reason}",
            _bring(options, folder, judge, wanted),
        ) from error
