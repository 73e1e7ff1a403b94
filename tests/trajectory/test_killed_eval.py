"""An evaluation that is killed goes on to the files of one nobody touched, byte for byte.

Killed by SIGKILL: while it draws, while it is asked about pictures, while it writes results
(``tests/killed.py`` counts its file events), and with processes of its own, which go with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.killed import ROOT, Runs

NUM, BATCH = 36, 10  # pictures; 32 are answered at once, so that there are two pieces


@pytest.fixture(scope="module")
def forks() -> Iterator[Runs]:
    server = Runs()
    yield server
    server.close()


def words(out: Path, *more: str) -> list[str]:
    size = ["--per-task", "6", "--num-inference-steps", "2", "--batch-size", str(BATCH)]
    return ["eval", "scenes", "--model", "bundled/scenes_sdxl", "--out", str(out), *size, *more]


def contents(out: Path) -> dict[str, bytes]:
    files = (p for p in out.rglob("*") if p.is_file())
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def moments(events: list[str]) -> dict[str, int]:
    """The event to be killed at, counted from 1, by what is going on."""
    saves = [k for k, e in enumerate(events, 1) if e.startswith("os.rename") and "samples/" in e]
    notes = [k for k, e in enumerate(events, 1) if e.endswith("00023/metadata.jsonl")]
    read = [k for k, e in enumerate(events, 1) if e.endswith("00034/samples/0000.png")]
    rows = [k for k, e in enumerate(events, 1) if "results.jsonl" in e]
    summary = [k for k, e in enumerate(events, 1) if "summary.json" in e]
    assert len(saves) == NUM and len(notes) == 1
    return {
        "before the third picture has its name": saves[2],
        "in the second batch": saves[14] - 1,
        "a prompt is being written": notes[0],
        "the second piece is asked": read[-1],
        "before the rows have their name": rows[-1],
        "before the summary is begun": summary[0],
    }


@pytest.mark.slow
def test_killed_at_every_stage_it_ends_as_if_untouched(forks: Runs, tmp_path: Path) -> None:
    """Six stages, a folder each, then one folder three times; whole batches are kept."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert forks.verb(words(whole), whole, tmp_path / "listed.txt") == 0
    events = (tmp_path / "listed.events").read_text().splitlines()
    note = tmp_path / "note.txt"
    for stage, moment in moments(events).items():
        fresh = tmp_path / stage.replace(" ", "_")
        assert forks.verb(words(fresh), fresh, note, kill_at=moment) == -9, stage
        assert not (fresh / "summary.json").exists()
        drawn = {p: p.stat().st_mtime_ns for p in fresh.rglob("*.png")}
        assert forks.verb(words(fresh), fresh, tmp_path / "again.txt") == 0, stage
        assert contents(fresh) == contents(whole), stage
        kept = [p for p, t in drawn.items() if p.stat().st_mtime_ns == t]
        whole_pieces = NUM if len(drawn) == NUM else len(drawn) // BATCH * BATCH
        assert len(kept) == whole_pieces, stage
    told = note.read_text().splitlines()
    assert len(told) == 6 and sum("samples/" in e for e in told) == 3, told
    for moment in (40, 90, 60):  # one folder, again and again
        assert forks.verb(words(out), out, note, kill_at=moment) == -9
    assert forks.verb(words(out), out, note) == 0
    assert contents(out) == contents(whole)


def test_a_torn_prompt_file_is_written_anew(tmp_path: Path) -> None:
    """What a kill between opening and writing leaves; readers of the folder would trip over it."""
    from PIL import Image

    from t2i_align.evaluate.benchmark import Item
    from t2i_align.evaluate.pictures import check_prompts, metadata_line, plan, save

    pictures = plan([Item("00000", "a red car", "colors")], 2, tmp_path)
    for torn in ("", '{"tag": "col'):
        for picture in pictures:
            (picture.file.parents[1]).mkdir(parents=True, exist_ok=True)
            (picture.file.parents[1] / "metadata.jsonl").write_text(torn)
            save(Image.new("RGB", (8, 8)), picture)
            found = (picture.file.parents[1] / "metadata.jsonl").read_text()
            assert found == metadata_line(picture.item)
    check_prompts(pictures)


@pytest.mark.slow
def test_killed_with_its_processes_it_leaves_none_and_goes_on(tmp_path: Path) -> None:
    """`--num-processes 2`: no process outlives the killed one; the same files in the end."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    verb = [sys.executable, "-m", "t2i_align"]
    two = ["--num-processes", "2", "--num-threads", "1"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    alone = words(whole, "--num-threads", "1")
    subprocess.run([*verb, *alone], cwd=ROOT, env=env, check=True, capture_output=True)
    command = [*verb, *words(out, *two)]
    running = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 300
    while not list(out.rglob("*.png")) and time.monotonic() < until:
        time.sleep(0.02)
    started = psutil.Process(running.pid).children(recursive=True)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait(30) == -signal.SIGKILL and len(started) >= 2
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive, [p.cmdline() for p in alive]
    assert not (out / "summary.json").exists()
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    assert contents(out) == contents(whole)
