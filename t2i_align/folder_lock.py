"""One process at a time in an output folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2i_align.errors import OutputError, StorageError

LOCK_FILE = ".lock"
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as accelerate reads


@contextmanager
def occupied(folder: Path, marker: str) -> Iterator[None]:
    """Keep other processes from working in ``folder`` meanwhile; the first rank does it for all.

    Args:
        folder: an ``output_dir``; made if missing. One that holds something else is left alone.
        marker: the file by which a run is known.

    Raises:
        OutputError: another process works there.
        StorageError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    first = all(os.environ.get(name, "0") == "0" for name in RANKS)
    if not first or (folder.exists() and not folder.is_dir()) or is_foreign(folder, marker):
        yield
        return
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"output_dir: another process is training in {folder}",
            "wait until it is done or stop it, or choose another output_dir",
        ) from error
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def is_foreign(folder: Path, marker: str) -> bool:
    """Whether a folder holds something that is no run.

    Args:
        folder: an ``output_dir``.
        marker: the file by which a run is known; written as ``.<marker>.tmp`` first.
    """
    if not folder.is_dir() or (folder / marker).is_file():
        return False
    own = (LOCK_FILE, f".{marker}.tmp")
    return any(path.name not in own for path in folder.iterdir())


def unwritable(folder: Path, error: OSError) -> StorageError:
    """What is said of a folder that cannot be written."""
    return StorageError(f"output_dir: cannot write to {folder}: {error}", "check space and rights")
