"""TensorStore keeps what it was given, whole shards at a time."""

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from t2i_align.data.cache import TensorStore, cast
from t2i_align.errors import ModelError, StorageError


def entry(value: float) -> dict[str, torch.Tensor]:
    return {"x0": torch.full((2, 3), value), "codes": torch.arange(4)}


def shards(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("shard-*.safetensors"))


def test_round_trip_through_disk(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    half = torch.randn(3, 5).to(torch.bfloat16)
    store.put("a", {"x": half, "flag": torch.tensor(True)}, {"crop": [1, 2], "name": "ü"})
    store.put("a@flip", entry(2.0))
    store.flush()
    again = TensorStore(tmp_path)
    assert again.keys() == {"a", "a@flip"} and len(again) == 2
    assert torch.equal(again.get("a")["x"], half) and again.get("a")["x"].dtype == torch.bfloat16
    assert again.get("a")["flag"].item() is True
    assert torch.equal(again.get("a@flip")["codes"], torch.arange(4))
    assert again.meta("a") == {"crop": [1, 2], "name": "ü"} and again.meta("a@flip") == {}
    assert "b" not in again
    with pytest.raises(KeyError):
        again.get("b")


def test_pending_entries_are_readable_and_equal_to_stored_ones(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.put("a", entry(1.0), {"size": (1, 2)})
    before, meta = store.get("a"), store.meta("a")
    assert shards(tmp_path) == []
    store.flush()
    assert torch.equal(store.get("a")["x0"], before["x0"]) and store.meta("a") == meta


def test_a_shard_is_written_when_enough_waits(tmp_path: Path) -> None:
    size = sum(t.numel() * t.element_size() for t in entry(0.0).values())
    store = TensorStore(tmp_path, flush_bytes=2 * size)
    for index in range(5):
        store.put(str(index), entry(float(index)))
    assert len(shards(tmp_path)) == 2
    store.flush()
    store.flush()
    assert len(shards(tmp_path)) == 3
    assert [TensorStore(tmp_path).get(str(i))["x0"][0, 0].item() for i in range(5)] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_a_shard_is_written_when_enough_time_went_by(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, flush_seconds=0.0)
    store.put("a", entry(1.0))
    assert len(shards(tmp_path)) == 1


def test_a_key_is_stored_once(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.put("a", entry(1.0))
    store.flush()
    store.put("a", entry(9.0))
    store.flush()
    assert len(shards(tmp_path)) == 1 and store.get("a")["x0"][0, 0].item() == 1.0


def test_reading_maps_the_file(tmp_path: Path) -> None:
    """A 64 MB entry costs no resident memory before it is touched."""
    TensorStore(tmp_path).flush()
    store = TensorStore(tmp_path)
    store.put("big", {"x": torch.ones(16 * 2**20)})
    store.flush()
    script = (
        "import sys, resource\n"
        "from t2i_align.data.cache import TensorStore\n"
        "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "import safetensors.torch\n"
        "s = TensorStore(sys.argv[1]); before = rss(); x = s.get('big')['x']\n"
        "print(rss() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 16 * 2**20


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_broken_shard_is_set_aside_and_its_keys_are_missing(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = TensorStore(tmp_path)
    store.put("good", entry(1.0))
    store.flush()
    kept = shards(tmp_path)
    store.put("bad", entry(2.0))
    store.flush()
    (broken,) = set(shards(tmp_path)) - set(kept)
    data = (tmp_path / broken).read_bytes()
    new = {"truncated": data[:-7], "empty": b"", "garbage": os.urandom(400)}[damage]
    (tmp_path / broken).write_bytes(new)
    with caplog.at_level(logging.WARNING):
        again = TensorStore(tmp_path)
    assert again.keys() == {"good"}
    assert (tmp_path / f"{broken}.corrupt").exists() and shards(tmp_path) == kept
    assert "set aside" in caplog.text and broken in caplog.text and "rebuilt" in caplog.text


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_rust(*_: object, **__: object) -> None:
    raise safetensors.SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize("failure", [no_space, no_space_in_rust])
def test_disk_full_is_told_and_earlier_shards_are_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: object
) -> None:
    store = TensorStore(tmp_path)
    store.put("a", entry(1.0))
    store.flush()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    store.put("b", entry(2.0))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", failure)
        with pytest.raises(StorageError) as caught:
            store.flush()
    assert "disk full while writing" in str(caught.value)
    assert "what was cached before is intact" in str(caught.value)
    assert "set cache.dir to a larger disk" in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    store.flush()
    assert TensorStore(tmp_path).keys() == {"a", "b"}


def test_a_real_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    """The kernel refuses files over 64 KiB: the shard fails half-way, for real."""
    script = (
        "import resource, signal, sys, torch\n"
        "from t2i_align.data.cache import TensorStore\n"
        "from t2i_align.errors import StorageError\n"
        "s = TensorStore(sys.argv[1]); s.put('a', {'x': torch.ones(4)}); s.flush()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "s.put('b', {'x': torch.ones(2**20)})\n"
        "try: s.flush()\n"
        "except StorageError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "cannot write" in done.stdout and "File too large" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == shards(tmp_path)
    assert TensorStore(tmp_path).keys() == {"a"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"is cache\.dir writable\?"):
        TensorStore(tmp_path / "file" / "store")


def test_strays_of_a_killed_write_are_removed_when_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".shard-1.safetensors.x.tmp", tmp_path / ".shard-2.safetensors.x.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert TensorStore(tmp_path).keys() == set()
    assert not old.exists() and new.exists()


def test_cast_keeps_integers_and_rounds_floats() -> None:
    exact = torch.tensor([1.0, 0.333333])
    kept = cast({"x": exact, "n": torch.tensor([70000])}, torch.float16, "record 'r'", "fix it")
    assert kept["n"].dtype == torch.int64 and kept["n"].item() == 70000
    assert torch.equal(kept["x"], exact.half())


def test_cast_of_a_view_keeps_only_the_view() -> None:
    row = torch.zeros(1000, 4)[1]
    assert cast({"x": row}, torch.float32, "r", "")["x"].untyped_storage().nbytes() == 16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cast_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ModelError) as caught:
        cast({"mean": torch.tensor([bad])}, torch.float16, "record 'r7'", "use float32")
    assert str(caught.value) == (
        "record 'r7': non-finite mean from the frozen encoder\n  fix: use float32"
    )


def test_cast_refuses_what_float16_cannot_hold() -> None:
    with pytest.raises(ModelError) as caught:
        cast({"h": torch.tensor([-70000.0])}, torch.float16, "prompt 'a cat'", "")
    assert str(caught.value) == (
        "prompt 'a cat': h reaches 7e+04, float16 ends at 6.55e+04\n"
        "  fix: set cache.dtype: float32 (or bfloat16)"
    )
    wide = cast({"h": torch.tensor([-70000.0])}, torch.bfloat16, "p", "")
    assert wide["h"].isfinite().all()
