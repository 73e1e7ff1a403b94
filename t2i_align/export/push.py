"""Upload an export to the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from t2i_align.errors import ModelError, StorageError, UserError
from t2i_align.export.card import CARD


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of everything that would be uploaded; hidden files stay.

    Raises:
        ModelError: no folder, or one without a card.
    """
    if not folder.is_dir():
        raise ModelError(f"no folder at '{folder}'", "give the --out folder of t2i-align export")
    if not (folder / CARD).is_file():
        raise ModelError(
            f"'{folder}' has no card ({CARD}), so nobody could tell what it is",
            "push a folder that t2i-align export wrote",
        )
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    shown = [n for n in names if not any(part.startswith(".") for part in n.parts)]
    return [(n.as_posix(), (folder / n).stat().st_size) for n in shown]


def push(folder: Path, repo_id: str, *, private: bool, revision: str | None) -> str:
    """Create the repository where it is missing and upload the folder as one commit.

    Args:
        folder: an export.
        repo_id: ``owner/name``.
        private: of a repository that is created.
        revision: branch, created where it is missing; None for main.

    Returns:
        The commit's address.

    Raises:
        ModelError: the folder has no card.
        UserError: a bad id, no token, or the hub refuses.
        StorageError: the hub cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError

    names = [name for name, _ in files_of(folder)]
    check_asked(repo_id)
    # the base of all errors of the hub's HTTP client, whichever client this version uses
    transport: Any = HfHubHTTPError.__mro__[1]
    try:
        return _upload(folder, names, repo_id, private, revision)
    except HfHubHTTPError as error:
        said = str(error).strip().splitlines()
        raise UserError(
            f"the hub refused {repo_id}: {said[-1] if said else error}",
            "check that the token may write to this repository, and its name",
        ) from error
    except (transport, OSError) as error:
        raise StorageError(
            f"the hub cannot be reached ({error}); nothing is lost, '{folder}' is as it was",
            "check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), then push again",
        ) from error


def check_asked(repo_id: str) -> None:
    """What can be told before anything is sent.

    Raises:
        UserError: a bad id, or no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"'{repo_id}' is no repository id: {error}", "owner/name") from error
    if get_token() is None:
        raise UserError(
            "no token of the hub on this machine",
            "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
        )


def _upload(
    folder: Path, names: list[str], repo_id: str, private: bool, revision: str | None
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        allow_patterns=names,
        commit_message="Upload an export of t2i-align",
    )
    return str(commit.commit_url)
