"""A table ten times as long takes no more memory to score; 100,000 small pictures take minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_builders import image_bytes

SCORE = """
import json, resource, sys
import typer
from t2i_align.cli.score import score

app = typer.Typer()
app.command()(score)
app([sys.argv[1], "--judge", "saturation", "--parquet", sys.argv[2], "--device", "cpu"],
    standalone_mode=False)
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
used = resource.getrusage(resource.RUSAGE_SELF)
peak = int(lines["VmHWM"].split()[0])
print(json.dumps({"peak": peak, "seconds": used.ru_utime + used.ru_stime}))
"""


def write_jpegs(path: Path, num: int) -> Path:
    """JPEGs of 64 to 128 pixels."""
    rng = np.random.default_rng(0)
    sides = rng.integers(64, 129, (500, 2)).tolist()
    pictures = [image_bytes(k, (w, h)) for k, (w, h) in enumerate(sides)]
    schema = pa.schema([("image", pa.binary()), ("prompt", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, num, 5000):
            rows = range(start, start + 5000)
            columns = [[pictures[k % 500] for k in rows], [f"prompt {k}" for k in rows]]
            writer.write_table(pa.table(columns, schema=schema))
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    found = {}
    for num in (10_000, 100_000):
        file, out = write_jpegs(tmp_path / f"{num}.parquet", num), tmp_path / f"o{num}.parquet"
        done = subprocess.run(
            [sys.executable, "-c", SCORE, str(file), str(out)],
            capture_output=True,
            text=True,
            check=True,
        )
        found[num] = json.loads(done.stdout.splitlines()[-1])
        assert pq.read_metadata(out).num_rows == num
        file.unlink()
    assert found[100_000]["peak"] <= 1.1 * found[10_000]["peak"]
    assert found[100_000]["seconds"] <= 360
