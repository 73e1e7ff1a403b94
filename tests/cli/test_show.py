"""Tables in a pipe or a log: a line a row, unless COLUMNS says how wide."""

from __future__ import annotations

import pytest

from t2i_align.cli.show import print_rows

CELLS = {f"column{j}": "a value of some length" for j in range(8)}
ROWS = [{"name": f"run-{i}", **CELLS} for i in (0, 1)]


def test_a_pipe_gets_a_line_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_rows("runs", ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["runs", "name", "run-0", "run-1"]
    assert lines[-1].count("a value of some length") == 8

    monkeypatch.setenv("COLUMNS", "60")
    print_rows("runs", ROWS)
    folded = capsys.readouterr().out.splitlines()
    assert len(folded) > 4 and max(map(len, folded)) <= 60
