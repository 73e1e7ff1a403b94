"""Small recipes and data files for tests that load recipes."""

from __future__ import annotations

import json
from pathlib import Path

BASE = """\
# line 1: a comment
output_dir: {out}
model:
  type: diffusers
  name_or_path: {model}
  lora:
    r: 8
objective:
  type: dpo
  beta: 2000
data:
  type: pickapic
  path: {data}
train:
  learning_rate: 1e-5
  max_train_steps: 10
"""


def write_pairs(path: Path) -> Path:
    """A parquet file with Pick-a-Pic's columns; its images are never decoded here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"caption": ["a cat"], "jpg_0": [b"0"], "jpg_1": [b"1"], "label_0": [1.0]}
    pq.write_table(pa.table(row | {"label_1": [0.0]}), path)
    return path


def write_pipeline(folder: Path, name: str = "StableDiffusionPipeline") -> Path:
    """A folder that looks like a pipeline as far as recipes are checked."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


def write_recipe(folder: Path, *edits: tuple[str, str]) -> Path:
    """A valid recipe with its data and model beside it, and text replaced in it."""
    text = BASE.format(
        out=folder / "out",
        model=write_pipeline(folder / "model"),
        data=write_pairs(folder / "d.parquet"),
    )
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "r.yaml"
    path.write_text(text)
    return path
