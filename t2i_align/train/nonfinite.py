"""Losses and gradients that are no numbers: named, and skipped where the recipe allows it.

A skipped step takes no update and changes nothing that an objective remembers, yet it counts: its
records are seen, the schedule moves on, and so the next step is the one it would have been. How
many were skipped is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from t2i_align.contract import ScoredBatch

SHOWN = 8  # records in a message


class NonFinite(FloatingPointError):
    """A step that cannot be taken.

    Args:
        what: in words, e.g. ``non-finite loss``.
        where: further facts.
        records: those behind it, where known.
    """

    def __init__(self, what: str, where: str, records: Iterable[str]) -> None:
        """Keep the parts."""
        super().__init__(what)
        self.what, self.where, self.records = what, where, list(records)

    def told(self, step: int) -> str:
        """One line."""
        named = ", ".join(self.records[:SHOWN]) or "unknown"
        parts = f"{self.what} at step {step}", self.where, f"records: {named}"
        return "; ".join(part for part in parts if part)


def bad_records(per_example: Tensor, batch: ScoredBatch, ids: tuple[str, ...]) -> list[list[Any]]:
    """The record and the noise levels behind each example that is no number, of all processes."""
    bad = (~per_example.detach().isfinite()).nonzero().flatten().tolist()
    items = batch.chosen if len(batch.chosen) == len(per_example) else None
    found = []
    for i in bad:
        item = i if items is None else int(items[i])
        known = batch.lam is not None and item < len(batch.lam)
        levels = [round(float(x), 4) for x in batch.lam[item]] if known else []  # type: ignore[index]
        record = i if batch.records is None else int(batch.records[item])
        found.append([ids[record] if record < len(ids) else f"example {i}", levels])
    if torch.distributed.is_initialized():
        return list(gather_object(found))
    return found


@contextmanager
def first_bad(net: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is no number, in the order they are called."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            parts = out if isinstance(out, (tuple, list)) else (out,)
            if any(isinstance(x, Tensor) and not bool(x.isfinite().all()) for x in parts):
                found.append(name)

        return hook

    handles = [m.register_forward_hook(look(n)) for n, m in net.named_modules() if n]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def culprit(net: nn.Module, again: Callable[[], Any]) -> str:
    """Where the numbers end: the first module of a forward that is run again, or after them all.

    Args:
        net: the trained network.
        again: scores the event once more.
    """
    with torch.no_grad(), first_bad(net) as found:
        again()
    if torch.distributed.is_initialized():
        found = list(gather_object(found[:1]))
    return f"first in module {found[0]}" if found else "every module is finite: in the objective"


def loss_error(bad: list[list[Any]], module: str) -> NonFinite:
    """The error of a loss that is no number.

    Args:
        bad: from :func:`bad_records`.
        module: from :func:`culprit`.
    """
    levels = ", ".join(f"{x:g}" for _, row in bad[:SHOWN] for x in row) or "unknown"
    return NonFinite(
        "non-finite loss", f"{module}; noise levels: {levels}", (name for name, _ in bad)
    )
