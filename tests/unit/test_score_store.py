"""Scores on disk: a call stopped anywhere and continued writes the bytes of one that was not."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from t2i_align.contract import Media
from t2i_align.errors import DataError, InterruptedRun
from t2i_align.evaluate import scoring
from t2i_align.evaluate.score_source import Entry
from t2i_align.evaluate.score_store import Identity, JudgeFacts, ScoredRow, ScoreStore
from t2i_align.judges.base import Scores

FACTS = (JudgeFacts("a", 2, "ab" * 32, {"x": 1}), JudgeFacts("b", 1, None, {}))
IDENTITY = Identity({"files": "f"}, FACTS, {"normalized": False})


class Counting:
    """Says how many of a batch are before a picture, so numbers depend on where batches start."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        self.asked += len(media)
        values = torch.arange(len(media), dtype=torch.float32) / 7
        reasons = ["no" if prompt.endswith("3") else None for prompt in prompts]
        failed = torch.tensor([r is not None for r in reasons])
        return Scores(values.masked_fill(failed, torch.nan), tuple(reasons))


def members(judge: Any) -> list[scoring.Member]:
    return [scoring.Member(facts, judge, None) for facts in FACTS]


def entries(
    num: int, stop: int | None = None, error: BaseException | None = None
) -> Iterator[Entry]:
    for k in range(num):
        if k == stop:
            raise error or RuntimeError("stop")
        yield Entry(f"f{k}", Media("image", b""), f"prompt {k}")


def files_of(store: ScoreStore, folder: Path) -> list[bytes]:
    outputs = {kind: folder / f"o.{kind}" for kind in ("csv", "jsonl", "parquet")}
    folder.mkdir(exist_ok=True)
    scoring.write(store, outputs)
    return [path.read_bytes() for path in outputs.values()]


@pytest.mark.parametrize("stops", [(1,), (64,), (65, 200), (300, 301, 333)])
def test_stopped_and_continued_gives_the_same_bytes(tmp_path: Path, stops: tuple[int, ...]) -> None:
    whole = ScoreStore(tmp_path / "whole", IDENTITY)
    scoring.score_into(whole, entries(333), members(Counting()), total=333)
    for stop in stops:
        store = ScoreStore(tmp_path / "parts", IDENTITY, flush_rows=64)
        if stop < 333:
            with pytest.raises(RuntimeError):
                scoring.score_into(store, entries(333, stop), members(Counting()))
    judge = Counting()
    store = ScoreStore(tmp_path / "parts", IDENTITY, flush_rows=128)
    kept = max(s for s in (*stops, 0) if s < 333) // 64 * 64
    assert len(store) == kept
    scoring.score_into(store, entries(333), members(judge), total=333)
    assert judge.asked == 2 * (333 - kept)
    assert files_of(store, tmp_path / "x") == files_of(whole, tmp_path / "y")
    store = ScoreStore(tmp_path / "parts", IDENTITY)
    scoring.score_into(store, entries(333), members(judge), total=333)
    assert judge.asked == 2 * (333 - kept), "a finished store asks nobody"


def test_interrupted_by_hand(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path, IDENTITY)
    with pytest.raises(InterruptedRun, match="stopped after 64 pictures\n  fix: run the same"):
        scoring.score_into(store, entries(333, 100, KeyboardInterrupt()), members(Counting()))
    assert len(ScoreStore(tmp_path, IDENTITY)) == 64


PROGRAM = """
import sys, time
from pathlib import Path
from typing import Any
sys.path[:0] = ["tests", "tests/unit"]
from test_score_store import IDENTITY, Counting, entries, members
from t2i_align.evaluate import scoring
from t2i_align.evaluate.score_store import ScoreStore

class Slow(Counting):
    def score(self, media, prompts):
        time.sleep(0.02)
        return super().score(media, prompts)

store = ScoreStore(Path(sys.argv[1]), IDENTITY, flush_rows=64)
scoring.score_into(store, entries(64 * 400), members(Slow()))
"""


def test_killed_without_warning(tmp_path: Path) -> None:
    """SIGKILL while parts are being written: what is there is whole, the rest follows."""
    folder, root = tmp_path / "parts", Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], cwd=root)
    until = time.monotonic() + 120
    while len(list(folder.glob("part-*"))) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    store = ScoreStore(folder, IDENTITY)
    kept = len(store)
    assert kept >= 5 * 64 and kept % 64 == 0
    num = kept + 100
    scoring.score_into(store, entries(num), members(Counting()))
    whole = ScoreStore(tmp_path / "whole", IDENTITY)
    scoring.score_into(whole, entries(num), members(Counting()))
    assert files_of(store, tmp_path / "x") == files_of(whole, tmp_path / "y")


def test_rows_say_what_they_come_from(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path / "s", IDENTITY)
    store.add(
        [
            ScoredRow("f", "p", (1.5, None), (None, "too dark")),
            ScoredRow("g", "q", (None, None), ("x", "x")),
        ]
    )
    facts = {
        "a.version": 2,
        "b.version": 1,
        "a.weights_sha256": "ab" * 32,
        "b.weights_sha256": None,
    }
    assert list(store.rows()) == [
        {"file": "f", "prompt": "p", "a": 1.5, "b": None, "reason": "b: too dark"} | facts,
        {"file": "g", "prompt": "q", "a": None, "b": None, "reason": "x"} | facts,
    ]  # fmt: skip
    files_of(store, tmp_path)
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.to_pylist() == list(store.rows())
    assert json.loads(table.schema.metadata[b"t2i_align.scores"]) == IDENTITY.to_dict()
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(store.rows())
    with (tmp_path / "o.csv").open() as file:
        assert [r["a"] for r in csv.DictReader(file)] == ["1.5", ""]
    assert store.reasons("b") == {"too dark": 1, "x": 1}
    assert np.isnan(store.numbers("b")).all() and store.numbers("a")[0] == 1.5
    found = scoring.totals(store)
    assert found["a"] == {"mean": 1.5, "scored": 1, "failed": 1}
    assert found["b"] == {"mean": None, "scored": 0, "failed": 2}


def test_parts_of_something_else_are_not_mixed(tmp_path: Path) -> None:
    ScoreStore(tmp_path, IDENTITY)
    others = [
        replace(IDENTITY, source={"files": "g"}),
        replace(IDENTITY, judges=FACTS[:1]),
        replace(IDENTITY, judges=(replace(FACTS[0], version=3), FACTS[1])),
        replace(IDENTITY, judges=(replace(FACTS[0], weights_sha256="cd" * 32), FACTS[1])),
        replace(IDENTITY, settings={"normalized": True}),
    ]
    assert len({other.digest() for other in (IDENTITY, *others)}) == 6
    for other in others:
        with pytest.raises(DataError, match="holds scores of something else"):
            ScoreStore(tmp_path, other)


def test_working_parts_stay_until_the_end(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with pytest.raises(RuntimeError), scoring.working_store(IDENTITY, [out]) as store:
        scoring.score_into(store, entries(200, 130), members(Counting()))
    with scoring.working_store(IDENTITY, [out]) as store:
        assert len(store) == 128
    assert list(tmp_path.iterdir()) == []
