r"""The order of the data: an endless stream of (record, draw), a function of seed and position.

Progress is a count of records, so a resumed run asks for the positions after that count and nothing
else is stored.

Without a curriculum pass e is a permutation of all records, and e is the draw. With one (the data
side of Curriculum-DPO, Croitoru et al. 2024, arXiv:2405.13637), g_i the difference of the judge's
values of pair i, pairs with |g_i| < min_gap left out, and N the number of the rest:

    (1)  rank pairs by |g_i|, largest first; chunk c of K holds ranks (c-1) N/K to c N/K
    (2)  pass j is a permutation of the first min(j // passes_per_chunk + 1, K) chunks

so hard pairs join as training goes on and easy ones stay. j is the draw, so that a pair never meets
the same noise twice. The paper ranks by the difference of the ranks of a prompt's samples, its code
by |g_i|, as here. The code counts steps instead of passes (500 a chunk), and only its LCM script
ever moves on to the next chunk.

With aspect buckets a micro-batch of b records holds one bucket. The stream without buckets is
walked; each record joins the queue of its bucket, and a queue that reaches b becomes the next
micro-batch. So a bucket's leftovers are not dropped but go first in the next pass, and one bucket
alone gives the stream itself. With n_k the records of bucket k and T(e) the micro-batches of passes
0 to e - 1,

    (3)  T(e) = sum_k floor(e n_k / b)
    (4)  bucket k enters pass e with e n_k mod b records waiting

so micro-batch m is found from m alone. After every whole pass e each record was seen e times, but
the up to b - 1 waiting in each bucket, which were seen once less. In a bucket of fewer than b
records that is up to ceil((b - 1) / n_k) times less, and its micro-batches repeat a record, with
another draw each time.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from t2i_align.data.options import CurriculumOptions
from t2i_align.errors import DataError
from t2i_align.process.seeds import derive, generator

Picks = list[tuple[int, int]]


def data_order(num_records: int, seed: int, epoch: int) -> Tensor:
    """Permutation ``(num_records,)`` int64 of one epoch."""
    return torch.randperm(num_records, generator=generator(derive(seed, "", epoch, "data_order")))


_recent_order = lru_cache(maxsize=2)(data_order)


def picks(start: int, count: int, num_records: int, seed: int) -> Picks:
    """``count`` picks from position ``start``: (record index, epoch), the epoch being the draw."""
    found = []
    for position in range(start, start + count):
        epoch, place = divmod(position, num_records)
        found.append((int(_recent_order(num_records, seed, epoch)[place]), epoch))
    return found


def value_gaps(table: Any) -> Tensor:
    """|difference of the values| of every pair of a manifest, ``(N,)`` float64.

    Args:
        table: of the manifest, layout pairs.

    Raises:
        DataError: a pair without values; names the first.
    """
    column = table["values"].combine_chunks()
    values = torch.tensor(
        [float("nan") if v is None else v for v in column.flatten().to_pylist()],
        dtype=torch.float64,
    )
    gaps = (values[0::2] - values[1::2]).abs()
    unknown = gaps.isnan().nonzero().flatten().tolist()
    if unknown:
        raise DataError(
            f"data.curriculum orders pairs by their values, and {len(unknown)} of {len(gaps)} "
            f"have none, e.g. record '{table['id'][unknown[0]].as_py()}'",
            "let judges give them (data.label_by), or use a source with values (score_chosen and "
            "score_rejected of type trl)",
        )
    return gaps


class BucketOrder:
    """Eq. (3) and (4): micro-batches of one bucket each.

    Which records make a micro-batch depends on its size, not on the number of processes: every
    process takes the next one, whatever its bucket.

    Args:
        sizes: ``(N, 2)`` int64, the bucket of every record.
        batch: b, records of a micro-batch.
        seed: of the run.
    """

    def __init__(self, sizes: Tensor, batch: int, seed: int) -> None:
        """Number the buckets and count their records."""
        self.batch, self.seed = batch, seed
        self.buckets, self.of = torch.unique(sizes, dim=0, return_inverse=True)
        self.counts = torch.bincount(self.of, minlength=len(self.buckets))
        self._pass = lru_cache(maxsize=4)(self._walk)

    def identity(self) -> str:
        """What the order is a function of, besides seed and records."""
        return f"buckets-of-{self.batch}"

    def waiting(self) -> int:
        """Records in buckets too small to fill a micro-batch within one pass."""
        return int(self.counts[self.counts < self.batch].sum())

    def __call__(self, start: int, count: int) -> Picks:
        """The micro-batch at position ``start``, a multiple of ``count``, which is b."""
        if count != self.batch or start % count:
            raise ValueError(f"micro-batches of {self.batch} records: got {count} from {start}")
        number = start // count
        epoch = self._epoch(number)
        bucket, last = self._pass(epoch)[0][number - self._before(epoch)].tolist()
        return [self._pick(bucket, place) for place in range(last - count + 1, last + 1)]

    def _before(self, epoch: int) -> int:
        """Eq. (3)."""
        return int((epoch * self.counts // self.batch).sum())

    def _epoch(self, number: int) -> int:
        """The pass during which a micro-batch is completed."""
        epoch = number * self.batch // len(self.of)  # T(e) <= e N / b: never after it
        while self._before(epoch + 1) <= number:
            epoch += 1
        return epoch

    def _walk(self, epoch: int) -> tuple[Tensor, list[Tensor]]:
        """One pass.

        Returns:
            ``(M, 2)`` the bucket of each micro-batch completed in it and the place of its last
            record in the bucket's own stream; and each bucket's records in the order of the pass.
        """
        order = data_order(len(self.of), self.seed, epoch)
        bucket = self.of[order]
        sorted_by_bucket = bucket.argsort(stable=True)
        starts = self.counts.cumsum(0) - self.counts
        place = torch.empty_like(bucket)
        place[sorted_by_bucket] = torch.arange(len(bucket)) - starts[bucket[sorted_by_bucket]]
        place += epoch * self.counts[bucket]
        full = (place + 1) % self.batch == 0
        own = order[sorted_by_bucket].split(self.counts.tolist())
        return torch.stack([bucket[full], place[full]], 1), list(own)

    def _pick(self, bucket: int, place: int) -> tuple[int, int]:
        epoch, at = divmod(place, int(self.counts[bucket]))
        return int(self._pass(epoch)[1][bucket][at]), epoch


class Curriculum:
    """Eq. (1) and (2): pairs from easy to hard.

    Args:
        gaps: ``(N,)`` of all pairs, see :func:`value_gaps`.
        options: the recipe's.
        seed: of the run.

    Raises:
        DataError: fewer pairs than chunks are left.
    """

    def __init__(self, gaps: Tensor, options: CurriculumOptions, seed: int) -> None:
        """Rank the pairs; equal gaps stay in the order of the data."""
        self.seed = seed
        order = gaps.argsort(descending=True, stable=True)
        self.ranked = order[gaps[order] >= options.min_gap]
        num, chunks = len(self.ranked), options.chunks
        if num < chunks:
            raise DataError(
                f"data.curriculum: {num} of {len(gaps)} pairs differ by min_gap "
                f"{options.min_gap:g} or more, too few for {chunks} chunks",
                "lower min_gap or chunks",
            )
        growing = [-(-c * num // chunks) for c in range(1, chunks + 1)]
        self.sizes = [size for size in growing for _ in range(options.passes_per_chunk)]
        self.starts = [0, *itertools.accumulate(self.sizes)]  # of each pass; the last goes on

    def identity(self) -> str:
        """Hash of which pairs come when."""
        ranked = hashlib.sha256(self.ranked.numpy().tobytes()).hexdigest()
        return f"{ranked}-{self.starts}"

    def __call__(self, start: int, count: int) -> Picks:
        """``count`` picks from position ``start``: (record index, pass), the pass is the draw."""
        return [self._pick(position) for position in range(start, start + count)]

    def _pick(self, position: int) -> tuple[int, int]:
        number = min(bisect.bisect_right(self.starts, position), len(self.sizes)) - 1
        size = self.sizes[number]
        more, place = divmod(position - self.starts[number], size)
        number += more  # beyond the last chunk, passes over everything
        return int(self.ranked[_recent_order(size, self.seed, number)[place]]), number
