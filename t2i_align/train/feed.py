"""What a training loop is fed: events with their labels, from stored records or a live policy.

Three feeds share one loop (:mod:`t2i_align.train.loop`): stored records (``offline``), trajectories
of the current policy (``online``), and demonstrations against a replay of the policy's own samples
(``replay``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from t2i_align.contract import Event, ScoredBatch, TensorDict
from t2i_align.train.engine import Engine


@dataclass(frozen=True)
class Drawn:
    """A micro-batch before scoring, on the training device.

    Args:
        event: what every view scores.
        batch: index lists and labels, without scores.
        record_ids: to name in errors.
        guidance: classifier-free guidance inside the score, 1 = off.
        negative: the unconditional branch's conditioning when guidance is on.
        keys: what a reference cache knows the items by; None where events come but once.
    """

    event: Event
    batch: ScoredBatch
    record_ids: tuple[str, ...]
    guidance: float = 1.0
    negative: TensorDict | None = field(default=None)
    keys: list[tuple[int, int]] | None = None


class Feed(Protocol):
    """Where micro-batches come from."""

    def next(self) -> Drawn:
        """The next micro-batch of this process."""
        ...

    def ready(self, engine: Engine) -> None:
        """Once the network is loaded: the engine, in whose precision policies sample and draw."""
        ...

    def identity(self) -> str:
        """Hash of the data; a run continues only on the same."""
        ...

    def state(self) -> TensorDict:
        """What a checkpoint must hold besides the count of records; empty for stored records."""
        ...

    def start(self, samples_seen: int, state: TensorDict) -> None:
        """Go to a position: 0 and an empty state at the beginning, a checkpoint's otherwise."""
        ...

    def summary(self) -> Mapping[str, Any]:
        """What the run's summary says of the data."""
        ...

    def close(self) -> None:
        """Free threads."""
        ...
