"""WebDataset shards: tar files whose members share a sample's name up to the first dot.

Members of a sample follow each other; its pictures are those with a picture's suffix, its prompt is
in .txt, or in .json under ``prompt``, ``text`` or ``caption``. The standard library reads them: the
webdataset package reads every member whole before anyone can refuse its size, and takes ``pipe:``
addresses for shell commands.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.errors import DataError
from t2i_align.plain_json import loads

MAX_TEXT = 2**20


@dataclass(frozen=True)
class Sample:
    """What a shard holds under one name.

    Args:
        key: the name, folder included.
        pictures: suffix -> bytes, or why they were not read.
        prompt: None where there is none.
    """

    key: str
    pictures: dict[str, bytes | str]
    prompt: str | None


def samples(
    path: Path, suffixes: tuple[str, ...], prompt_keys: tuple[str, ...], *, bare: bool
) -> Iterator[Sample]:
    """Samples of a shard in its order, one in memory at a time.

    Args:
        path: the tar file.
        suffixes: of pictures, with the dot.
        prompt_keys: of .json members; the first that holds something counts.
        bare: leave pictures empty.

    Raises:
        DataError: not a tar file, a torn one, or a text in it that is none.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            for key, group in itertools.groupby(_members(tar), lambda m: _split(m.name)[0]):
                yield _sample(tar, key, list(group), suffixes, prompt_keys, bare)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: not a readable tar file ({error})", "download or write it again"
        ) from error


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: the first dot behind the last folder parts them."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, f".{suffix}"


def _members(tar: Any) -> Iterator[tarfile.TarInfo]:
    """Files with a key and a suffix."""
    for member in tar:
        name = member.name.rpartition("/")[2]
        if member.isfile() and "." in name and not name.startswith((".", "__")):
            yield member
        tar.members = []  # else every header stays in memory


def _sample(
    tar: tarfile.TarFile,
    key: str,
    members: list[tarfile.TarInfo],
    suffixes: tuple[str, ...],
    prompt_keys: tuple[str, ...],
    bare: bool,
) -> Sample:
    pictures: dict[str, bytes | str] = {}
    prompt = None
    for member in members:
        suffix = _split(member.name)[1]
        last = Path(suffix).suffix.lower() or suffix.lower()
        if last in suffixes:
            pictures[suffix] = b"" if bare else _bounded(tar, member)
        elif last in (".txt", ".json") and prompt is None:
            prompt = _prompt(tar, member, prompt_keys)
    return Sample(key, pictures, prompt)


def _bounded(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | str:
    from t2i_align.data.images import MAX_BYTES

    if member.size > MAX_BYTES:
        return f"{member.size / 2**20:.0f} MiB; the limit is {MAX_BYTES >> 20} MiB"
    return _content(tar, member)


def _prompt(tar: tarfile.TarFile, member: tarfile.TarInfo, keys: tuple[str, ...]) -> str | None:
    """The text of a .txt member, or the prompt of a .json one; None where there is none."""
    if member.size > MAX_TEXT:
        raise DataError(f"{tar.name}: {member.name} of {member.size >> 20} MiB is no prompt")
    try:
        text = _content(tar, member).decode("utf-8")
        if member.name.lower().endswith(".txt"):
            return text.strip() or None
        found: Any = loads(text)
        return next((found[k] for k in keys if found.get(k)), None)
    except (ValueError, AttributeError) as error:
        raise DataError(f"{tar.name}: {member.name} cannot be read ({error})") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, member.name  # a regular file
    return file.read()
