"""Fixtures of the whole suite.

Parity tests read the official files of benchmarks, which are not part of the repository. Where they
are missing a test skips and the summary counts it; under CI (``CI=true``) it fails, so that a green
run means they were compared.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NO_DATA = "benchmark data not found: set T2I_ALIGN_BENCHMARKS to the folder that holds it"


@pytest.fixture(scope="session")
def benchmarks_dir() -> Path:
    """The folder of benchmark data: ``T2I_ALIGN_BENCHMARKS``, else a neighbouring checkout's."""
    named = os.environ.get("T2I_ALIGN_BENCHMARKS")
    neighbour = Path(__file__).resolve().parents[2] / "shared" / "benchmarks"
    folder = Path(named) if named else neighbour
    if folder.is_dir():
        return folder
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(NO_DATA)
    pytest.skip(NO_DATA)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many parity tests had nothing to compare with."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NO_DATA in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} parity tests skipped: {NO_DATA}", yellow=True)
