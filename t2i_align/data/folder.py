"""A folder of images with ``metadata.jsonl``, Hugging Face's ImageFolder convention.

Rows are pairs ``{"prompt": ..., "chosen": "a.png", "rejected": "b.png"}`` or single images
``{"file_name": "a.png", "prompt" or "text": ..., "label": 1}``; without a label an image counts as
good. Every ``metadata.jsonl`` below the folder is read; file names are relative to it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from t2i_align.contract import MediaError
from t2i_align.data.binary import parse_label
from t2i_align.data.media import cell_media
from t2i_align.data.options import FileOptions, RecordOptions
from t2i_align.data.records import Item, Record
from t2i_align.data.rows import Row, Rows
from t2i_align.data.source import Stats, record_options, usable, whole_text
from t2i_align.errors import DataError
from t2i_align.options import Options

EITHER = (("prompt", "text"), ("chosen", "file_name"))
OPTIONAL = ("id", "rejected", "label")


class FolderOptions(RecordOptions):
    """Options of ``data: {type: folder}``."""

    known_columns: ClassVar[tuple[str, ...]] = (*EITHER[0], *EITHER[1], *OPTIONAL)

    type: Literal["folder"] = "folder"
    path: str = Field(description="folder of images with a metadata.jsonl; ~ is the home folder")


class Folder:
    """Pairs or single images of an image folder."""

    Options: ClassVar[type[Options]] = FolderOptions

    def __init__(self, options: FolderOptions) -> None:
        """Read nothing yet."""
        self.options = options
        self.stats = Stats()
        self.root = Path(options.path).expanduser()

    @staticmethod
    def check(options: FolderOptions) -> list[str]:
        """Problems visible without reading rows."""
        try:
            return Folder(options)._rows().check()
        except DataError as error:
            return [str(error)]

    def __iter__(self) -> Iterator[Record]:
        """Stream records."""
        self.stats = Stats()
        return usable(iter(self._rows()), self._record, self.stats, self.options.max_records)

    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes and times of all files below the folder, images included; options."""
        digest = hashlib.sha256()
        for folder, folders, files in os.walk(self.root):
            folders.sort()
            for name in sorted(files):
                stat = os.stat(os.path.join(folder, name))
                digest.update(json.dumps([folder, name, stat.st_size, stat.st_mtime_ns]).encode())
        return {"folder": digest.hexdigest()} | record_options(self.options, ())

    def count(self) -> int | None:
        """Lines of the metadata files."""
        try:
            return self._rows().count()
        except DataError:
            return None

    def _rows(self) -> Rows:
        """The rows of every metadata file.

        Raises:
            DataError: no folder, or no metadata file in it.
        """
        if not self.root.is_dir():
            raise DataError(f"data.path: '{self.options.path}' is not a folder", "check the path")
        files = sorted(str(path) for path in self.root.rglob("metadata.jsonl"))
        if not files:
            raise DataError(
                f"data.path: no metadata.jsonl in {self.root}",
                'write one line an image: {"file_name": "a.png", "prompt": "a cat"}',
            )
        options = FileOptions.model_construct(
            path=files,
            hub_id=None,
            split="train",
            columns=self.options.columns,
            max_records=self.options.max_records,
        )
        return Rows(options, (), OPTIONAL, EITHER)

    def _record(self, row: Row) -> Record | None:
        cells = row.cells
        name = str(cells.get("id") or self._place(row))
        prompt = cells.get("prompt", cells.get("text"))
        if not isinstance(prompt, str):
            raise MediaError("prompt is missing")
        prompt = whole_text(prompt, "prompt")
        if cells.get("chosen") is not None:
            sides = ("chosen", "rejected")
            items = tuple(
                Item(cell_media("image", cells.get(s), row.folder), prompt) for s in sides
            )
            return Record(name, "pair", items)
        label = parse_label(cells["label"]) if "label" in cells else 1
        if label is None:
            self.stats.no_label += 1
            return None
        media = cell_media("image", cells.get("file_name"), row.folder)
        return Record(name, "binary", (Item(media, prompt, label=label),))

    def _place(self, row: Row) -> str:
        """``subfolder/metadata.jsonl:row``, the same wherever the folder lies."""
        assert row.folder is not None
        below = row.folder.relative_to(self.root).as_posix()
        return f"{below}/metadata.jsonl:{row.name.rpartition(':')[2]}".removeprefix("./")
