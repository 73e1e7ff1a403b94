"""What a cache folder holds, whether it is whole, and what of it nothing needs any more.

    <cache.dir>/v1/{media,text,reference}-<hash>/    spaces: stores of one model's numbers
    <cache.dir>/v1/manifests/                        records of a source, small
    <cache.dir>/v1/uses/<hash>.json                  which recipe used which spaces

Names of spaces are hashes, so every run notes what it used under ``uses``; they are for people and
decide nothing. Shards carry a hash of their contents (``data/cache.py``). Pruning compares names of
spaces with those that given recipes would use. A manifest goes with the first of its spaces, a note
with the last; a manifest of an earlier version, which names no spaces, when no space is left.
Judges' numbers (``labels/``) stay: they may have cost more than anything else here.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t2i_align.data.cache import NO_HASH, STALE_SECONDS, atomic, make_folder, problem_of
from t2i_align.data.manifest import digest, spaces_in
from t2i_align.data.prepare import VERSION
from t2i_align.data.reference_cache import PREFIX, facts_in
from t2i_align.errors import DataError
from t2i_align.plain_json import loads

KINDS = ("media", "text", "reference")
BROKEN = "*.corrupt"


@dataclass
class Space:
    """One store.

    Args:
        name: of its folder.
        kind: media, text or reference.
        entries: stored items; for references items and draws.
        num_shards: files.
        num_bytes: of all files, set-aside ones too.
        num_corrupt: files that were set aside.
        models: whose numbers, by the notes of runs.
        runs: output folders of runs that used it.
    """

    name: str
    kind: str
    entries: int = 0
    num_shards: int = 0
    num_bytes: int = 0
    num_corrupt: int = 0
    models: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def root_of(folder: str | Path) -> Path:
    """The versioned folder of a cache.

    Raises:
        DataError: there is none.
    """
    root = Path(folder).expanduser() / VERSION
    if not root.is_dir():
        raise DataError(
            f"no cache in {folder}: it has no folder {VERSION}",
            "give the recipe's cache.dir; t2i-align cache build RECIPE makes one",
        )
    return root


def spaces(root: Path) -> list[Path]:
    """Folders of stores."""
    found = (path for kind in KINDS for path in root.glob(f"{kind}-*") if path.is_dir())
    return sorted(found)


def shards(space: Path) -> list[Path]:
    """Whole files of a store."""
    return sorted(space.glob("*.safetensors"))


def note_use(root: Path, output_dir: str, model: str, names: Collection[str]) -> None:
    """Write down that a run uses spaces, for people who look at the cache later.

    Raises:
        StorageError: the disk is full or not writable.
    """
    facts = {"output_dir": output_dir, "model": model, "spaces": sorted(names)}
    path = root / "uses" / f"{digest(facts)}.json"
    make_folder(path.parent)
    if not path.is_file():
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")


def uses(root: Path) -> dict[Path, dict[str, Any]]:
    """All notes that can be read, by file."""
    found = {}
    for path in sorted((root / "uses").glob("*.json")):
        try:
            note = loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(note, dict) and isinstance(note.get("spaces"), list):
            found[path] = note
    return found


def inspect(root: Path) -> list[Space]:
    """All spaces, from the headers of their shards."""
    notes = list(uses(root).values())
    return [_inspected(path, notes) for path in spaces(root)]


def _inspected(path: Path, notes: list[dict[str, Any]]) -> Space:
    kind = path.name.partition("-")[0]
    own = [note for note in notes if path.name in note["spaces"]]
    files = [file for file in path.iterdir() if file.is_file()]
    return Space(
        path.name,
        kind,
        entries=len(set().union(*(_entries(shard, kind) for shard in shards(path)))),
        num_shards=len(shards(path)),
        num_bytes=sum(file.stat().st_size for file in files),
        num_corrupt=len(list(path.glob(BROKEN))),
        models=sorted({str(note.get("model")) for note in own}),
        runs=sorted({str(note.get("output_dir")) for note in own}),
    )


def _entries(shard: Path, kind: str) -> set[Any]:
    """Keys of a shard; none where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as file:
            if kind == "reference":
                return set(map(tuple, file.get_tensor("keys").tolist()))
            return {name.partition("/")[0] for name in file.keys()}
    except (SafetensorError, OSError):
        return set()


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found of one shard.

    Args:
        path: the file.
        problem: empty when it is what was written.
    """

    path: Path
    problem: str

    @property
    def unknown(self) -> bool:
        """Whether it was written by a version without hashes, and can be read."""
        return self.problem == NO_HASH

    @property
    def broken(self) -> bool:
        """Whether it is not what was written."""
        return bool(self.problem) and not self.unknown


def verify(root: Path) -> Iterator[Verdict]:
    """Read every shard whole and compare it with its hash."""
    for space in spaces(root):
        for shard in shards(space):
            yield Verdict(shard, problem_of(shard))


def set_aside(verdict: Verdict) -> Path:
    """Rename a broken shard, so that runs rebuild what it held."""
    aside = verdict.path.with_name(verdict.path.name + ".corrupt")
    verdict.path.rename(aside)
    return aside


def needless(root: Path, names: Collection[str], wanted: Callable[[Path], bool]) -> list[Path]:
    """What no recipe needs: spaces, and files that were set aside in those that stay.

    Args:
        root: of the cache.
        names: spaces of media and text that are needed.
        wanted: whether a space of reference errors is.
    """
    found: list[Path] = []
    for space in spaces(root):
        keep = wanted(space) if space.name.startswith(PREFIX) else space.name in names
        found += space.glob(BROKEN) if keep else [space]
    return found


def leftovers(root: Path, gone: Collection[Path]) -> list[Path]:
    """Manifests and notes that are of no use once some spaces are gone, and old torn ones."""
    left = {space.name for space in spaces(root) if space not in gone}
    found: list[Path] = []
    for report in sorted((root / "manifests").glob("*.json")):
        names = spaces_in(report)
        if not left.issuperset(names) or not (names or left):
            found += [path for path in (report, report.with_suffix(".arrow")) if path.is_file()]
    found += [path for path, note in uses(root).items() if left.isdisjoint(note["spaces"])]
    torn = [path for kind in ("manifests", "uses") for path in (root / kind).glob(".*.tmp")]
    return found + [p for p in torn if time.time() - p.stat().st_mtime > STALE_SECONDS]


def rests_on(space: Path, names: Collection[str]) -> bool:
    """Whether reference errors are of media and text that are all in ``names``."""
    facts = facts_in(space)
    return facts.get("media") in names and facts.get("text") in names


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def remove(path: Path) -> None:
    """Delete a file or a folder of the cache; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
