r"""Question files that a user brings: the published one is told by its git blob, or is not known.

Not every file of questions may be passed on, so a card can name one without an address that this
package fetches from (``details.questions: {file, from[, git_blob]}``). It lies where prompt files
lie (prompt_files.py) or is named by an option. With ``git_blob`` (SHA-1 of ``blob <length>\0`` and
the bytes, what git calls the file) the published file is recognised; without, every file is
``custom``, and its sha256 tells two of them apart.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from t2i_align.catalog import find_root, read_card
from t2i_align.errors import DataError
from t2i_align.evaluate.prompt_files import CUSTOM, OFFICIAL, PromptFile, place


def git_blob(content: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def find_supplied(name: str, given: str | None, key: str = "questions") -> PromptFile:
    """A question file.

    Args:
        name: of the benchmark's card.
        given: a path, or None for the usual place.
        key: of the card's details.

    Raises:
        DataError: it is not there; says what to bring from where.
    """
    card = read_card(find_root() / "eval" / name / "card.yaml")
    facts: dict[str, Any] = card.details[key]
    path = Path(given).expanduser() if given else place(name, facts)
    if not path.is_file():
        raise DataError(
            f"'{name}' needs {facts['file']}, which is not at {path}",
            f"bring it from {facts['from']}, put it there or name it with --set prompts=PATH",
        )
    content = path.read_bytes()
    published = facts.get("git_blob")
    kind = OFFICIAL if published and git_blob(content) == published else CUSTOM
    return PromptFile(path, hashlib.sha256(content).hexdigest(), kind)


def folder_name(item_id: str, where: str) -> str:
    """An item's id, which is also the name of its folder of pictures.

    Raises:
        DataError: it would lead elsewhere.
    """
    if not item_id or item_id.startswith(".") or any(c in item_id for c in ("/", "\\", "\0")):
        raise DataError(f"{where}: the id {item_id!r} cannot be the name of a folder")
    return item_id
