"""Small recipes and data files for tests that load recipes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from t2i_align.recipe import shipped

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


def data_type(name: str) -> str:
    """``type`` of a recipe's data section."""
    found = re.search(r"^data:\n  type: (\w+)", shipped()[name].read_text(), re.MULTILINE)
    assert found is not None, name
    return found.group(1)


def in_place(name: str, folder: Path) -> str:
    """An override that puts a file of the kind a recipe reads where it is looked for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, kind = folder / "d.parquet", data_type(name)
    if kind == "none":
        return "rollout.prompts=[a cat]"
    if kind == "captions":
        row = {"image": [b"0"], "prompt": ["a"], "negative_prompt": ["b"]}
    elif kind == "trl":
        row = {"prompt": ["a"], "chosen": [b"0"], "rejected": [b"1"]}
    elif kind == "ranked":
        row = {"prompt": ["a"], "images": [[b"0", b"1"]], "ranks": [[0, 1]]}
    else:
        return f"data.path={write_pairs(path)}"
    pq.write_table(pa.table(row), path)
    return f"data.path={path}"


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
