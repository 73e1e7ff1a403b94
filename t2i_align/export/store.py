"""Where the result of adapter arithmetic goes."""

from __future__ import annotations

from pathlib import Path

from t2i_align.errors import OutputError
from t2i_align.export.adapter import PEFT_FILE, Adapter, write_adapter
from t2i_align.export.arithmetic import truncate


def store(adapter: Adapter, out: Path, rank: int | None = None) -> str:
    """Cut an adapter to a rank if asked, write it, and say what was written.

    Args:
        adapter: the result.
        out: a ``.safetensors`` file, or a folder for one.
        rank: the largest; None keeps the exact sum.

    Raises:
        OutputError: the file exists, or a folder is needed.
    """
    out = out.expanduser()
    named = out.suffix == ".safetensors"
    if named and adapter.file == PEFT_FILE:
        raise OutputError(f"--out: {out} is a file; this adapter is a folder", "give a folder")
    file = out if named else out / adapter.file
    if file.exists():
        raise OutputError(f"--out: {file} exists", "choose another name; it was not touched")
    lost = ""
    if rank is not None:
        cut = truncate(adapter, rank)
        adapter = cut.adapter
        lost = f"; cut to rank {rank}: relative error {cut.error:.3g} of the update"
        lost += f", worst {cut.worst_error:.3g} in {cut.worst}"
    write_adapter(adapter, file)
    ranks = sorted({x.rank for x in adapter.layers.values()})
    return (
        f"wrote {len(adapter.layers)} layers of rank {', '.join(map(str, ranks))} to {file}{lost}"
    )
