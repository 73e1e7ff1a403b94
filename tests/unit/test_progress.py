"""The progress bar counts the pace of the call that shows it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from t2i_align.progress import progress


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(total: int | None, done: int, steps: list[tuple[float, int]], wait: float = 0.0) -> str:
    """What a bar says after steps of (seconds, number done) and a wait."""
    text, clock = io.StringIO(), Clock()
    with progress(Console(file=text, width=100), "cats", total, done, clock=clock) as bar:
        for seconds, num in steps:
            clock.now += seconds
            bar.advance(num, "[b]")
        clock.now += wait
    return " ".join(text.getvalue().split())


def test_work_of_an_earlier_call_does_not_count() -> None:
    """6 of 10 were done before; 2 in 8 seconds are 0.25 a second, and 2 more take 8 seconds."""
    assert shown(10, 6, [(5.0, 1), (3.0, 1)]).endswith("8/10 0:00:08 0.250/s 0:00:08 [b]")
    assert shown(10, 6, [(5.0, 1), (3.0, 1)], wait=3.0).endswith("0:00:11 0.250/s 0:00:05 [b]")
    assert shown(10, 6, []).endswith("6/10 0:00:00 -:--:--")


def test_a_finished_bar_stops_its_clock() -> None:
    assert shown(300, 0, [(10.0, 300)], wait=5.0).endswith("300/300 0:00:10 30.0/s 0:00:00 [b]")


def test_without_a_total_there_is_a_rate_and_no_rest() -> None:
    assert shown(None, 0, [(2.0, 5)]).endswith("5/? 0:00:02 2.5/s -:--:-- [b]")


def test_a_narrow_terminal_cuts_the_note_and_nothing_else() -> None:
    text, clock = io.StringIO(), Clock()
    with progress(Console(file=text, width=80), "training", 10, clock=clock) as bar:
        clock.now += 5
        bar.advance(5, "loss 0.25  " * 9)
    (line,) = text.getvalue().strip().splitlines()
    assert "5/10 0:00:05 1.0/s 0:00:05 loss 0.25" in line and line.endswith("…")


def test_no_console_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "cats", 3) as bar:
        bar.reach(3)
    assert capsys.readouterr() == ("", "")
