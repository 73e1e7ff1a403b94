"""Ctrl-C and SIGTERM ask a run to stop.

The step in flight ends, a checkpoint is written, then it leaves.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether someone asked to stop; a second request interrupts at once."""

    def __init__(self) -> None:
        """Nobody has."""
        self.asked = False

    def __bool__(self) -> bool:
        """True once asked."""
        return self.asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {n: signal.signal(n, self._handle) for n in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
