"""The order of the data: an endless stream of (record, epoch), a function of seed and position.

Progress is a count of records, so a resumed run asks for the positions after that count and nothing
else is stored.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from t2i_align.process.seeds import derive, generator


def data_order(num_records: int, seed: int, epoch: int) -> Tensor:
    """Permutation ``(num_records,)`` int64 of one epoch."""
    return torch.randperm(num_records, generator=generator(derive(seed, "", epoch, "data_order")))


_recent_order = lru_cache(maxsize=2)(data_order)


def picks(start: int, count: int, num_records: int, seed: int) -> list[tuple[int, int]]:
    """``count`` picks from position ``start``: (record index, epoch), the epoch being the draw."""
    found = []
    for position in range(start, start + count):
        epoch, place = divmod(position, num_records)
        found.append((int(_recent_order(num_records, seed, epoch)[place]), epoch))
    return found
