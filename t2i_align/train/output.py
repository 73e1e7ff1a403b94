"""The output folder of a run: who it belongs to, and what may not change when a run continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from t2i_align.errors import OutputError
from t2i_align.folder_lock import is_foreign, unwritable
from t2i_align.plain_json import load_object
from t2i_align.recipe import written_out

RUN_FILE = "run.json"
VERSION = 1
FIXED = ("seed", "model", "objective", "data", "reference", "draw", "rollout")
FIXED_TRAIN = (
    "optimizer",
    "mixed_precision",
    "ema_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
)


def claim(folder: Path, recipe: dict[str, Any], *, resume: bool, version: str) -> None:
    """Make ``folder`` this run's, or refuse.

    Args:
        folder: the recipe's ``output_dir``.
        recipe: the resolved recipe.
        resume: whether the run continues what is there.
        version: of the suite, noted in ``run.json``.

    Raises:
        OutputError: it holds another run, or files that are no run; nothing is changed.
        StorageError: it cannot be created.
    """
    marker = folder / RUN_FILE
    if marker.is_file() and started(folder):
        if not resume:
            raise OutputError(
                f"output_dir: {folder} already holds a run",
                "continue it with train.resume_from_checkpoint=latest, or choose another "
                "output_dir",
            )
        compare(folder, written_out(recipe_in(marker), str(marker)), recipe)
    elif folder.exists() and not folder.is_dir():
        raise OutputError(f"output_dir: {folder} is a file", "choose another output_dir")
    elif is_foreign(folder, RUN_FILE):
        raise OutputError(
            f"output_dir: {folder} is not empty and holds no run of t2i-align",
            "choose another output_dir; nothing in it was touched",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"format": VERSION, "t2i_align": version, "recipe": recipe}
        temporary = folder / f".{RUN_FILE}.tmp"
        temporary.write_text(json.dumps(facts, indent=1))
        temporary.rename(marker)
    except OSError as error:
        raise unwritable(folder, error) from error


def recipe_in(marker: Path) -> dict[str, Any]:
    """The resolved recipe a run has noted.

    Raises:
        OutputError: the file is not as a run writes it.
    """
    try:
        found = load_object(marker.read_bytes(), str(marker), OutputError).get("recipe")
    except OSError as error:
        raise OutputError(f"cannot read {marker}: {error.strerror}") from error
    if not isinstance(found, dict) or not isinstance(found.get("train", {}), dict):
        raise OutputError(f"{marker} holds no recipe", "choose another output_dir")
    return found


def started(folder: Path) -> bool:
    """Whether a run in this folder has taken a step; one that failed before may be replaced."""
    return (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()


def compare(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue a run under a recipe that would change what it is."""
    changed = [(k, before.get(k), now.get(k)) for k in FIXED if before.get(k) != now.get(k)]
    trains = before.get("train", {}), now["train"]
    for key in FIXED_TRAIN:
        if trains[0].get(key) != trains[1].get(key):
            changed.append((f"train.{key}", trains[0].get(key), trains[1].get(key)))
    if not changed:
        return
    lines = "; ".join(difference(*c) for c in changed)
    raise OutputError(
        f"output_dir: {folder} holds a run of another recipe: {lines}",
        "restore those values to continue, or choose another output_dir",
    )


def difference(key: str, before: Any, now: Any) -> str:
    """The first inner key that differs, as ``key: before -> now``."""
    if isinstance(before, dict) and isinstance(now, dict):
        for k in [*before, *(k for k in now if k not in before)]:
            if before.get(k) != now.get(k):
                return difference(f"{key}.{k}", before.get(k), now.get(k))
    return f"{key}: {before!r} -> {now!r}"
