"""A progress bar: what, how much of it, time taken, rate, time left, and a note.

Rate and time left are those of this call: what an earlier call had done already says nothing of the
pace of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text


class Rest(ProgressColumn):
    """Time left at the rate of the last step, counted down until the next."""

    def render(self, task: Task) -> Text:
        """``h:mm:ss``, dashes while nothing is known."""
        ends = task.fields["ends"]
        if ends is None:
            return Text("-:--:--", style="progress.remaining")
        left = max(0, round(ends - (task.elapsed or 0.0)))
        return Text(str(timedelta(seconds=left)), style="progress.remaining")


class Note(ProgressColumn):
    """The note, the only part that is cut where the terminal is narrow."""

    def __init__(self) -> None:
        """A column that gives way."""
        super().__init__(Column(no_wrap=False))

    def render(self, task: Task) -> Text:
        """One line, never wrapped."""
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Line:
    """A bar that is being shown."""

    def __init__(
        self, bar: Progress, description: str, total: int | None, done: int, unit: str
    ) -> None:
        """Start its clock."""
        fields = {"rate": "", "ends": None, "note": ""}
        self._task = bar.add_task(description, total=total, completed=done, **fields)
        self._bar, self._total, self._first, self._done = bar, total, done, done
        self._unit = f" {unit}/s" if unit else "/s"

    def advance(self, num: int = 1, note: str = "") -> None:
        """``num`` more are done."""
        self.reach(self._done + num, note)

    def reach(self, done: int, note: str = "") -> None:
        """``done`` are done, those of earlier calls included."""
        self._done = done
        seconds = self._bar.tasks[0].elapsed
        fields: dict[str, Any] = {"note": note}
        if seconds and done > self._first:
            rate = (done - self._first) / seconds
            fields["rate"] = (f"{rate:.1f}" if rate >= 1 else f"{rate:.3f}") + self._unit
            if self._total is not None:
                fields["ends"] = seconds + (self._total - done) / rate
        self._bar.update(self._task, completed=done, **fields)


@contextmanager
def progress(
    console: Console | None,
    description: str,
    total: int | None,
    done: int = 0,
    unit: str = "",
    clock: Callable[[], float] | None = None,
) -> Iterator[Line]:
    """Show a bar while the block runs; where the console is no terminal, only how it ended.

    Args:
        console: None shows nothing.
        description: what is counted.
        total: None when unknown.
        done: how many an earlier call has done.
        unit: of the rate, where the description does not say it.
        clock: seconds; the console's when None.
    """
    columns = (
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        Rest(),
        Note(),
    )
    with Progress(*columns, console=console, get_time=clock, disable=console is None) as bar:
        yield Line(bar, description, total, done, unit)
