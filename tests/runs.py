"""Whole runs on tiny models: write a recipe, train, read the results."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML

from t2i_align.recipe import load_recipe


def write_recipe(folder: Path, name: str, sections: dict[str, Any]) -> Path:
    """A recipe file from nested dicts."""
    path = folder / f"{name}.yaml"
    with path.open("w") as stream:
        YAML().dump({"output_dir": str(folder / name), **sections}, stream)
    return path


def train(folder: Path, name: str, sections: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """Run a recipe in this process; returns its summary."""
    from rich.console import Console

    from t2i_align.train.run import train as run

    path = write_recipe(folder, name, sections)
    return run(load_recipe(path, overrides), Console(file=io.StringIO()))


def losses(run_folder: Path, key: str = "loss") -> list[float]:
    """A metric's curve."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(x)[key] for x in lines]


def weights(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Trained parameters of a checkpoint."""
    from safetensors.torch import load_file

    return load_file(run_folder / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


def forget_precision() -> None:
    """Let the next run have a precision of its own; accelerate keeps the first of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def jpeg(seed: int, height: int, width: int) -> bytes:
    """A smooth random picture."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def pickapic(path: Path, num: int, *, broken: Sequence[int] = (), ties: Sequence[int] = ()) -> Path:
    """A parquet with Pick-a-Pic's columns; some JPEGs truncated, some rows tied."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for i in range(num):
        first = jpeg(2 * i, 72, 72 + 8 * (i % 3))
        label = 0.5 if i in ties else float(i % 2)
        rows.append(
            {
                "caption": f"a photo of thing {i % 7}",
                "jpg_0": first[: len(first) // 3] if i in broken else first,
                "jpg_1": jpeg(2 * i + 1, 80, 64),
                "label_0": label,
                "label_1": 1 - label,
                "has_label": True,
                "ranking_id": i,
                "image_0_uid": f"{i}-0",
                "image_1_uid": f"{i}-1",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=32)
    return path


def point_model(folder: Path, seed: int = 3) -> Path:
    """The voxel DiT shrunk to one voxel of two channels: a flow over the plane."""
    from t2i_align.generators.voxel_net import VoxelDiT

    torch.manual_seed(seed)
    VoxelDiT(channels=2, size=1, patch=1, dim=32, depth=2, heads=2).save_pretrained(folder)
    return folder


def point(xy: Sequence[float]) -> list[Any]:
    """A point of the plane as voxels ``(2, 1, 1, 1)``."""
    return [[[[float(v)]]] for v in xy]


def point_pairs(path: Path, num: int, seed: int, *, shuffled: bool = False) -> Path:
    """Pairs of standard normal points.

    The one with the larger first coordinate wins (or a coin decides).
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        a, b = rng.normal(size=(2, 2))
        first = rng.random() < 0.5 if shuffled else a[0] > b[0]
        w, l = (a, b) if first else (b, a)  # noqa: E741
        rows.append({"id": str(i), "prompt": "p", "chosen": point(w), "rejected": point(l)})
    return write_jsonl(path, rows)


def voxel_sections(model: Path, data: Path, cache: Path, **train_options: Any) -> dict[str, Any]:
    """A recipe over point or voxel pairs."""
    return {
        "model": {"type": "voxel_flow", "name_or_path": str(model)},
        "objective": {"type": "dpo", "beta": 5.0},
        "data": {"type": "trl", "path": str(data), "media": "voxels"},
        "cache": {"dir": str(cache), "dtype": "float32"},
        "train": {"report_to": "none", "lr_scheduler": "constant", **train_options},
    }
