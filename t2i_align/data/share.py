"""One process's part of a source, for builds that several processes share.

Records go to processes by the prompt of their first item, so that pictures and texts that records
of a prompt have in common are encoded once. Each process writes whole shards into the same stores;
a pass over the whole source afterwards finds them and encodes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, ClassVar

from t2i_align.data.records import Record
from t2i_align.data.source import Source, Stats
from t2i_align.options import Options


def owner(prompt: str, num: int) -> int:
    """Which of ``num`` processes has the records of a prompt."""
    raw = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big") % num


class Share:
    """The records of one process.

    Args:
        source: of all records.
        index: of the process.
        num: processes.
    """

    Options: ClassVar[type[Options]] = Options

    def __init__(self, source: Source, index: int, num: int) -> None:
        """Nothing is read yet."""
        self.source, self.index, self.num = source, index, num
        self.stats: Stats = source.stats  # of the whole source, which every process reads

    def __iter__(self) -> Iterator[Record]:
        """Stream this process's records."""
        for record in self.source:
            self.stats = self.source.stats
            if owner(record.items[0].prompt, self.num) == self.index:
                yield record
        self.stats = self.source.stats

    def fingerprint(self) -> dict[str, Any]:
        """The whole source's, and which part."""
        return {"source": self.source.fingerprint(), "share": [self.index, self.num]}

    def count(self) -> int | None:
        """Rows of the whole source."""
        return self.source.count()
