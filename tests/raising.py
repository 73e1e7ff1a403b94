"""``t2i-align train`` whose process 1 fails in its second step, started as the verb starts it.

    python -m tests.raising KIND train RECIPE --num-processes 2

KIND is ``user`` (an error in our words) or ``bug`` (any other exception).
"""

from __future__ import annotations

import os
import sys
from typing import Any


def fail_at_step_two(kind: str) -> None:
    """Let this process's engine raise."""
    from t2i_align.errors import DataError
    from t2i_align.train.engine import Engine

    real = Engine.step

    def step(self: Engine, records: int) -> float:
        if self.step_count == 2:
            raise (
                DataError("row 7 of this process is broken", "mend it")
                if kind == "user"
                else (ValueError("a defect of this process"))
            )
        return real(self, records)

    Engine.step = step


def start_ourselves(kind: str) -> None:
    """Let the verb start this module in place of the package."""
    from t2i_align.train import distributed

    real = distributed._start

    def start(worker: list[str], *rest: Any) -> Any:
        return real(["-m", "tests.raising", kind, *worker[2:]], *rest)

    distributed._start = start


def main() -> None:
    """One process's part, or the launch."""
    from t2i_align.cli import main as run

    kind = sys.argv.pop(1)
    if os.environ.get("RANK") == "1":
        fail_at_step_two(kind)
    if "RANK" not in os.environ:
        start_ourselves(kind)
    run()


if __name__ == "__main__":
    main()
