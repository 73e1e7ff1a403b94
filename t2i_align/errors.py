"""Errors meant for users: what is wrong, where, and what to do next.

Every one carries the exit code the command line returns, so scripts can tell a typo from a full
disk. Programming mistakes are plain ``assert`` / ``TypeError`` and keep their traceback.
"""

from __future__ import annotations

from dataclasses import dataclass


class UserError(Exception):
    """Base class: a message for a person, an optional fix, an exit code."""

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        """Keep the parts apart so that the command line can lay them out."""
        super().__init__(f"{message}\n  fix: {fix}" if fix else message)
        self.message = message
        self.fix = fix


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe.

    Args:
        key: dotted key path, e.g. ``train.learning_rate``.
        message: what was got and what is allowed.
        where: ``file:line`` or ``command line``.
        fix: nearest match or next action, may be empty.
    """

    key: str
    message: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        """One line, two with a fix."""
        head = f"{self.where}: " if self.where else ""
        tail = f"\n    {self.fix}" if self.fix else ""
        return f"{head}{self.key}: {self.message}{tail}"


class RecipeError(UserError):
    """All problems of one recipe, reported together."""

    exit_code = 2

    def __init__(self, problems: list[Problem], name: str = "recipe") -> None:
        """List every problem; the order is that of the file."""
        self.problems = problems
        count = f"{len(problems)} problem" + ("" if len(problems) == 1 else "s")
        super().__init__(f"{name}: {count}\n" + "\n".join(f"  {p}" for p in problems))


class DataError(UserError):
    """A data source cannot be read or holds nothing usable."""

    exit_code = 3


class ModelError(UserError):
    """A model folder or hub id is missing, incomplete or of an unsupported kind."""

    exit_code = 4


class TrainingError(UserError):
    """Training cannot go on: a non-finite loss, a reference that moved, and the like."""

    exit_code = 5


class StorageError(UserError):
    """Something could not be saved; what was saved before is intact."""

    exit_code = 6


class OutputError(UserError):
    """The output folder belongs to another run."""

    exit_code = 7


class MissingDependencyError(UserError):
    """An optional package is needed; the message holds the pip line."""

    exit_code = 8


class InterruptedRun(UserError):
    """Stopped on request (Ctrl-C, SIGTERM) after a clean checkpoint."""

    exit_code = 130


EXIT_CODES = {
    0: "success",
    1: "other error",
    2: "recipe or command line is wrong",
    3: "data cannot be read or holds nothing usable",
    4: "model is missing or unsupported",
    5: "training stopped (non-finite loss, moved reference)",
    6: "could not save; earlier files are intact",
    7: "output folder belongs to another run",
    8: "an optional package is missing",
    130: "interrupted; a checkpoint was written",
}
