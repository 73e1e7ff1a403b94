"""Where a benchmark's prompt file lies, and whether it is the published one.

Prompt files are not part of the package. A card says where one is published and what its bytes hash
to (``details.prompts: {file, url, sha256}``); ``t2i-align eval fetch NAME`` brings it once. It is
looked for under ``$T2I_ALIGN_BENCHMARKS/<name>/<file>``, by default
``~/.cache/t2i-align/benchmarks/<name>/<file>`` (the card may name another ``folder``). Another file
is allowed, and is called ``custom`` in every result.

Cards of several files list them under ``details.files``; ``details.skills`` is one more. Where not
the bytes but the texts in a file are pinned, the entry has ``texts_sha256``. Each file is put in
its place when it is whole and checked, so a fetch that was cut off goes on with those that lack.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.errors import DataError, UserError
from t2i_align.registry import nearest

VARIABLE = "T2I_ALIGN_BENCHMARKS"
OFFICIAL, CUSTOM = "official", "custom"
MAX_BYTES = 256 << 20
TIMEOUT = 60


@dataclass(frozen=True)
class PromptFile:
    """A prompt file that was found.

    Args:
        path: where.
        sha256: of its bytes.
        kind: ``official`` if that is the card's hash, else ``custom``.
    """

    path: Path
    sha256: str
    kind: str

    def text(self) -> str:
        """Its content.

        Raises:
            DataError: it is not UTF-8 text.
        """
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DataError(f"prompts: cannot read {self.path}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"prompts": self.kind, "prompts_sha256": self.sha256}


def home() -> Path:
    """``$T2I_ALIGN_BENCHMARKS``, by default ``~/.cache/t2i-align/benchmarks``."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache/t2i-align/benchmarks"


def _details(name: str) -> dict[str, Any]:
    """The details of a benchmark's card.

    Raises:
        UserError: there is no such card.
    """
    from t2i_align.catalog import cards

    known = {card.name: card.details for card in cards("eval")}
    if name not in known:
        hint = nearest(name, list(known)) or f"known: {', '.join(known)}"
        raise UserError(f"no benchmark '{name}'", hint)
    return known[name]


def published(name: str) -> dict[str, str]:
    """``{file, url, sha256}`` of a benchmark's prompt file.

    Raises:
        UserError: there is no such card, or it names no file that can be fetched.
    """
    found = _details(name).get("prompts")
    if not isinstance(found, dict) or not {"file", "sha256"} <= set(found):
        raise UserError(f"benchmark '{name}' has no prompt file to fetch", "see its card")
    return found


def files_of(name: str) -> list[dict[str, str]]:
    """Every file of a benchmark's card that has an address, those of ``prompts`` first.

    Raises:
        UserError: there is no such card, or no such file; says what to bring instead.
    """
    details = _details(name)
    told = [details.get("prompts"), details.get("skills")]
    told += details["files"] if isinstance(details.get("files"), list) else []
    found = [entry for entry in told if isinstance(entry, dict) and "file" in entry]
    if found:
        return found
    supplied = details.get("questions")
    fix = "it needs none, or see its card"
    if isinstance(supplied, dict):
        fix = f"bring {supplied['from']} to {place(name, supplied)}"
    raise UserError(f"benchmark '{name}' has no prompt file to fetch", fix)


def place(name: str, facts: dict[str, str], folder: Path | None = None) -> Path:
    """Where a card's file lies, or would lie."""
    return (folder or home()) / facts.get("folder", name) / facts["file"]


def find(name: str, given: str | None) -> PromptFile:
    """The prompt file of a benchmark.

    Args:
        name: of its card.
        given: a path, or None for the published file.

    Raises:
        DataError: it is not there, or the file under the published name has other bytes.
    """
    facts = published(name)
    path = Path(given).expanduser() if given else place(name, facts)
    if not path.is_file():
        fix = f"run `t2i-align eval fetch {name}`, or give a file with --set prompts=PATH"
        raise DataError(f"the prompts of '{name}' are not at {path}", fix)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if given is None and sha256 != facts["sha256"]:
        raise DataError(
            f"{path} is not the published file: sha256 {sha256}, the card says {facts['sha256']}",
            f"run `t2i-align eval fetch {name}`, or give it with --set prompts={path} to use it "
            "under the name 'custom'",
        )
    return PromptFile(path, sha256, OFFICIAL if sha256 == facts["sha256"] else CUSTOM)


def fetch(name: str, folder: Path | None = None) -> list[PromptFile]:
    """Download the published files of a benchmark, those that are not there.

    Args:
        name: of the card.
        folder: instead of :func:`home`.

    Raises:
        UserError: the card names no address.
        DataError: one cannot be fetched, or has other bytes; it is not kept, the earlier ones are.
    """
    return [_fetched(facts, place(name, facts, folder), name) for facts in files_of(name)]


def _fetched(facts: dict[str, str], target: Path, name: str) -> PromptFile:
    """One file, downloaded unless the right one is there."""
    content = target.read_bytes() if target.is_file() else None
    if content is None or _odd(content, facts):
        if not facts.get("url"):
            raise UserError(
                f"{facts['file']} of '{name}' is not published at an address", f"put it at {target}"
            )
        content = _download(facts["url"])
        odd = _odd(content, facts)
        if odd:
            raise DataError(
                f"{facts['url']} gave {odd}",
                "the file was changed at its source; nothing of it was kept",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(target)
    return PromptFile(target, _sha256(content), OFFICIAL)


def _odd(content: bytes, facts: dict[str, str]) -> str:
    """What a file's hash is and should be; empty where they are one."""
    if "sha256" in facts:
        found, wanted, of = _sha256(content), facts["sha256"], "sha256"
    else:
        found, wanted, of = _texts_of(content), facts["texts_sha256"], "texts of sha256"
    return "" if found == wanted else f"{of} {found}, the card says {wanted}"


def _texts_of(content: bytes) -> str:
    """The hash of a JSON list of texts; what else it is, in words."""
    try:
        texts = json.loads(content)
    except ValueError:
        return "(no JSON)"
    plain = isinstance(texts, list) and all(isinstance(t, str) for t in texts)
    return texts_sha256(texts) if plain else "(no list of texts)"


def texts_sha256(texts: Sequence[str]) -> str:
    """SHA-256 of a list of texts as compact ASCII JSON, whatever their file looks like."""
    return _sha256(json.dumps(list(texts), separators=(",", ":")).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(url: str) -> bytes:
    """The bytes at an http(s) address.

    Raises:
        DataError: no answer, or too many bytes.
    """
    from urllib.error import URLError
    from urllib.request import urlopen

    if not url.startswith(("https://", "http://")):
        raise DataError(f"prompts are fetched over http, got {url!r}")
    try:
        with urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read(MAX_BYTES + 1)
    except (URLError, OSError, ValueError) as error:
        raise DataError(f"cannot fetch {url}: {error}", "bring the file by hand") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{url} holds more than {MAX_BYTES >> 20} MiB")
    return content
