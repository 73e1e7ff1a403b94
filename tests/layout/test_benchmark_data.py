"""The ``benchmarks_dir`` fixture: data or an honest count, and never a silent skip under CI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from source_tree import ROOT

PARITY = "def test_a(benchmarks_dir):\n    print('folder', benchmarks_dir)\n\ntest_b = test_a\n"


def run(tmp_path: Path, **env: str) -> tuple[int, str]:
    """Two parity tests beside a copy of the suite's conftest, far from any data."""
    tests = tmp_path / "a" / "tests"
    tests.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    (tests / "test_parity.py").write_text(PARITY)
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "T2I_ALIGN_BENCHMARKS")}
    clean = {k: v for k, v in clean.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        command, cwd=tests, env=clean | env, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_without_data_it_skips_and_counts(tmp_path: Path) -> None:
    code, out = run(tmp_path)
    assert code == 0
    assert "2 skipped" in out
    assert "2 parity tests skipped: benchmark data not found: set T2I_ALIGN_BENCHMARKS" in out


def test_under_ci_it_fails(tmp_path: Path) -> None:
    code, out = run(tmp_path, CI="true")
    assert code == 1
    assert "2 errors" in out and "benchmark data not found" in out


def test_the_variable_wins_and_a_neighbour_is_found(tmp_path: Path) -> None:
    neighbour, named = tmp_path / "shared" / "benchmarks", tmp_path / "named"
    neighbour.mkdir(parents=True)
    named.mkdir()
    assert f"folder {named}" in run(tmp_path / "x", T2I_ALIGN_BENCHMARKS=str(named), CI="true")[1]
    assert f"folder {neighbour}" in run(tmp_path, CI="true")[1]
