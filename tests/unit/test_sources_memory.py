"""A data set larger than memory is no problem: rows are streamed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

NUM_GROUPS, ROWS_PER_GROUP, JPEG_BYTES = 4, 1900, 100_000

READ = """
import json, sys
import pyarrow.parquet
from t2i_align.data.pickapic import PickAPic

def status(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) * 1024

source = PickAPic(PickAPic.Options(type="pickapic", path=sys.argv[1]))
before = status("VmRSS")
assert not PickAPic.check(source.options)
count = total = 0
for record in source:
    count += 1
    total += sum(len(item.media.data) for item in record.items)
print(json.dumps({"count": count, "bytes": total, "growth": status("VmHWM") - before}))
"""


def write_big(path: Path) -> None:
    """About 1.5 GB of incompressible payloads in a few row groups, written one group at a time."""
    schema = pa.schema(
        [
            ("caption", pa.string()),
            ("jpg_0", pa.binary()),
            ("jpg_1", pa.binary()),
            ("label_0", pa.float64()),
        ]
    )
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(NUM_GROUPS):
            sides = [
                [rng.bytes(JPEG_BYTES) for _ in range(ROWS_PER_GROUP)] for _ in ("jpg_0", "jpg_1")
            ]
            captions, labels = ["a cat"] * ROWS_PER_GROUP, [1.0] * ROWS_PER_GROUP
            writer.write_table(pa.table([captions, *sides, labels], schema=schema))


@pytest.mark.slow
def test_a_large_parquet_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "big.parquet"
    write_big(path)
    assert path.stat().st_size > 1.5e9
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True
    )
    path.unlink()
    seen = json.loads(done.stdout)
    assert seen["count"] == NUM_GROUPS * ROWS_PER_GROUP
    assert seen["bytes"] == 2 * seen["count"] * JPEG_BYTES
    assert seen["growth"] <= 500e6
