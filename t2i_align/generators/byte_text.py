"""Text as UTF-8 bytes: a tokenizer that needs no file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_BYTES = 256


def byte_ids(text: str) -> Tensor:
    """``(n,)`` int64 in [0, 256)."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)


def pad_rows(rows: Sequence[Tensor], value: int = 0) -> tuple[Tensor, Tensor]:
    """Right-pad 1-D tensors: ``(B, max n)`` and lengths ``(B,)``; at least one column."""
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.int64)
    out = torch.full((len(rows), max(1, int(lengths.max()))), value, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, lengths
