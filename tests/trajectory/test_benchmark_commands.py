"""Every ``t2i-align`` command of docs/benchmarks.md, run in its order in one folder.

Evaluations have fewer pictures and sampler steps. MODEL is the bundled SDXL, GenEval's published
file six prompts of its form from the embedded world, brought from a server of this machine, and its
detector the exact one. The command for a cluster names the extra where Ray is not installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shlex
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import t2i_align
from t2i_align.cli import build_app
from t2i_align.evaluate import prompt_files
from t2i_align.scenes.grammar import fixed_prompts

pytestmark = pytest.mark.slow
TEXT = (Path(t2i_align.__file__).parent / "docs" / "benchmarks.md").read_text()
RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
SMALLER = {
    "eval scenes --model": "--per-task 2 --num-inference-steps 2",
    "eval scenes --images": "--per-task 2",
    "eval geneval --model": "--set detector=scenes --num-inference-steps 1 --resolution 64",
    "eval suite quick": "--num-inference-steps 1",
}


def commands() -> list[str]:
    """The lines, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def call(line: str) -> tuple[int, str]:
    line = line.replace("--model MODEL", "--model bundled/scenes_sdxl")
    more = next((v for k, v in SMALLER.items() if k in line), "")
    done = RUNNER.invoke(build_app(), shlex.split(f"{line} {more}")[1:])
    return done.exit_code, f"{done.stdout}{done.stderr}{done.exception or ''}"


@pytest.fixture
def geneval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file of six prompts, one a task, published on this machine."""
    served = tmp_path / "served"
    served.mkdir()
    rows = [m for m, _ in fixed_prompts(2, 0, held_out=True)][::2]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (served / "p.jsonl").write_bytes(content)

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    facts = {"file": "p.jsonl", "url": f"http://127.0.0.1:{server.server_port}/p.jsonl"}
    facts["sha256"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(prompt_files, "_details", lambda name: {"prompts": facts})
    monkeypatch.setenv("T2I_ALIGN_BENCHMARKS", str(tmp_path / "home"))
    yield
    server.shutdown()


def test_they_all_work(geneval: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = commands()
    assert len(lines) == 10 and all(line.startswith("t2i-align ") for line in lines)
    ray = importlib.util.find_spec("ray") is not None
    for line in lines:
        code, text = call(line)
        if "--ray-workers" in line and not ray:
            assert code != 0 and "t2i-align[ray]" in text, text
            continue
        assert code == 0, f"{line}\n{text}"
    out = tmp_path / "outputs"
    summaries = {p.parent.name: json.loads(p.read_text()) for p in out.rglob("summary.json")}
    assert summaries["geneval"]["protocol"]["prompts"] == "official"
    assert summaries["geneval"]["images_found"] == 24
    changed = summaries["stricter"]["protocol"]["replayed_with"]
    assert changed == {"counting_threshold": 0.95}
    assert summaries["again"]["overall"] == summaries["base"]["overall"]
    titles = [
        s["title"] for s in json.loads((out / "other" / "beside.json").read_text())["sections"]
    ]
    assert titles == ["Diversity", "Drift", "Held-out judges"]
    assert (tmp_path / "base.html").stat().st_size > 20_000
