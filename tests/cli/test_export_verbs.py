"""``export``, ``adapter`` and ``push`` as a shell sees them, after a real training.

The hub is a server in this process that speaks the endpoints an upload needs.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from t2i_align.cli import build_app
from t2i_align.export.adapter import FILE, read_adapter
from tests import export_runs, runs
from tests.tiny import pipeline_folder

RUNNER = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})


def call(*args: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    result = RUNNER.invoke(build_app(), [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of LoRA DPO on a tiny SD1.5, averaged."""
    where = tmp_path_factory.mktemp("trained")
    sections = {
        "model": {
            "name_or_path": str(pipeline_folder("sd", where / "base")),
            "resolution": 64,
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        },
        "objective": {"type": "dpo", "beta": 500.0},
        "data": {"type": "pickapic", "path": str(runs.pickapic(where / "pairs.parquet", 8))},
        "cache": {"dir": str(where / "cache")},
        "train": {
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "train_batch_size": 4,
            "max_train_steps": 2,
            "ema_decay": 0.5,
            "report_to": "none",
        },
    }
    runs.train(where, "run", sections)
    return where / "run"


def test_a_trained_runs_exports_agree(trained: Path, tmp_path: Path) -> None:
    """What training wrote, peft, kohya and merged make one picture; --no-ema makes another."""
    from diffusers import StableDiffusionPipeline

    load: Any = StableDiffusionPipeline.from_pretrained
    base, images = trained.parent / "base", {}
    for name, form in [("p", "peft"), ("k", "kohya"), ("m", "merged")]:
        code, out, err = call("export", trained, "--format", form, "--out", tmp_path / name)
        assert code == 0, err
        assert out.startswith("wrote README.md, ")
    assert call("export", trained, "--no-ema", "--out", tmp_path / "last")[0] == 0
    images["m"] = export_runs.theirs(load(tmp_path / "m"))
    for name, where in [("run", trained), *((n, tmp_path / n) for n in ("p", "k", "last"))]:
        pipe = load(base)
        pipe.load_lora_weights(where)
        images[name] = export_runs.theirs(pipe)
    for name in ("p", "k", "m"):
        assert (images[name] - images["run"]).abs().max().item() <= 1e-4, name
    assert (images["last"] - images["run"]).abs().max().item() > 1e-3
    assert "averaged weights" in (tmp_path / "p" / "README.md").read_text()
    code, _, err = call("export", trained, "--out", tmp_path / "p")
    assert code == 7 and "exists" in err
    code, _, err = call("export", trained, "--checkpoint", "9", "--out", tmp_path / "x")
    assert code == 4 and "no step '9'; there are 2" in err


def test_arithmetic_of_files(trained: Path, tmp_path: Path) -> None:
    """half + half is the whole; interpolating to it from its double, cut to its own rank."""
    half, whole = tmp_path / "half.safetensors", tmp_path / "whole.safetensors"
    code, out, err = call("adapter", "scale", trained, "--weight", "0.5", "--out", half)
    assert code == 0 and "layers of rank 4" in out, err
    assert call("adapter", "add", half, half, "--out", whole)[0] == 0
    double, cut = tmp_path / "double", tmp_path / "cut"
    args = ["adapter", "add", whole, half, "--weight", "1", "--weight", "2", "--out", double]
    assert call(*args)[0] == 0
    args = ["adapter", "interpolate", double, half, "--weight", "0.5", "--rank", "4", "--out", cut]
    code, out, err = call(*args)
    assert code == 0 and "cut to rank 4: relative error" in out, err
    truth, found = read_adapter(trained), read_adapter(cut)
    for name, layer in read_adapter(whole).layers.items():
        expected = truth.layers[name].delta()
        top = expected.abs().max().item()
        torch.testing.assert_close(layer.delta(), expected, atol=1e-6 * top, rtol=0)
        torch.testing.assert_close(
            found.layers[name].delta(), 1.25 * expected, atol=1e-5 * top, rtol=0
        )
    code, _, err = call("adapter", "scale", trained, "--weight", "2", "--out", half)
    assert code == 7 and "exists" in err
    code, _, err = call("adapter", "add", half, whole, "--weight", "2", "--out", tmp_path / "y")
    assert code == 4 and "2 adapters and 1 weights" in err


def test_the_documented_commands_parse() -> None:
    """Every line of docs/export.md: known verb, known options, no missing argument."""
    import t2i_align

    text = (Path(t2i_align.__file__).parent / "docs" / "export.md").read_text()
    lines = [x.split("  #")[0] for x in text.splitlines() if x.startswith("t2i-align ")]
    assert len(lines) == 5
    group: Any = typer.main.get_command(build_app())
    for line in lines:
        verb, *arguments = shlex.split(line)[1:]
        command = group.commands[verb]
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(verb, arguments)


# -- push


class Hub(ThreadingHTTPServer):
    """Creates repositories and takes commits; keeps what it was sent."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.allowed = True
        super().__init__(("127.0.0.1", 0), HubHandler)

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    """The endpoints of ``create_repo``, ``create_branch`` and ``upload_folder``."""

    server: Hub

    def do_POST(self) -> None:
        """Answer like the hub, every file a regular one."""
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self._chunks()
        self.server.seen.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_test" or not self.server.allowed:
            self._answer({"error": "You may not write here"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._answer({"url": f"{self.server.url}/me/mine"})
        elif "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": n, **regular} for n in names]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            self._answer({"commitUrl": f"{self.server.url}/me/mine/commit/1", "commitOid": "1"})
        else:
            self._answer({"errors": [], "warnings": []})

    def _chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def do_GET(self) -> None:
        """Nothing is there yet."""
        self.server.seen.append(self.path)
        self._answer({"error": "Repository not found"}, 404)

    def _answer(self, what: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(what).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A running hub."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(endpoint: str, token: str | None, home: Path, *args: str | Path) -> Any:
    """The verb in a process of its own: the hub's client reads its settings when it is imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "COLUMNS": "300", "NO_COLOR": "1"}
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "t2i_align", "push", *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_push_uploads_every_file_as_it_is(hub: Hub, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    assert call("export", trained, "--out", out)[0] == 0
    (out / ".hidden").write_text("x")
    done = push(hub.url, "hf_test", tmp_path, out, "me/mine", "--private", "--revision", "beta")
    assert done.returncode == 0, done.stderr
    assert f"to {hub.url}/me/mine/commit/1" in done.stdout
    assert hub.files == {n: (out / n).read_bytes() for n in ("README.md", FILE)}
    assert hub.created["name"] == "mine" and hub.created["organization"] == "me"
    assert True in (hub.created.get("private"), hub.created.get("visibility") == "private")
    assert "/api/models/me/mine/branch/beta" in hub.seen
    assert "/api/models/me/mine/commit/beta" in hub.seen


def test_push_says_why_not(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [x]\n---\n")
    home = tmp_path / ".home"
    done = push(hub.url, None, home, tmp_path, "me/mine")
    assert done.returncode == 1 and "no token" in done.stderr and "hf auth login" in done.stderr
    assert hub.seen == []
    hub.allowed = False
    done = push(hub.url, "hf_test", home, tmp_path, "me/mine")
    assert done.returncode == 1, done.stderr
    assert "the hub refused me/mine" in done.stderr and "may not write" in done.stderr
    done = push(hub.url, "hf_test", home, tmp_path, "not a name")
    assert done.returncode == 1 and "'not a name' is no repository id" in done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = push(closed, "hf_test", home, tmp_path, "me/mine")
    assert done.returncode == 6 and "cannot be reached" in done.stderr, done.stderr


def test_dry_run_lists_and_sends_nothing(tmp_path: Path) -> None:
    code, _, err = call("push", tmp_path, "me/mine", "--dry-run")
    assert code == 4 and "has no card" in err
    (tmp_path / "README.md").write_text("x" * 1234)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "w.safetensors").write_bytes(b"12345")
    code, out, _ = call("push", tmp_path, "me/mine", "--dry-run")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["1,234", "README.md"],
        ["5", "unet/w.safetensors"],
        ["1,239", "2", "files", "to", "me/mine"],
    ]
