"""Writers of small data sets, and a generator whose encoders are arithmetic."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from t2i_align import registry
from t2i_align.contract import Encoded, Layout, Media, Sample, TensorDict
from t2i_align.data import SOURCES
from t2i_align.data.images import fit, open_image
from t2i_align.data.media import resolve
from t2i_align.data.prepare import Prepared, prepare
from t2i_align.data.records import Item, Record
from t2i_align.data.source import Stats
from t2i_align.errors import DataError


def image_bytes(seed: int, size: tuple[int, int] = (24, 16), kind: str = "JPEG") -> bytes:
    """An encoded image (width, height) of seeded noise; equal seeds give equal bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pickapic_row(index: int, label: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    """A row with Pick-a-Pic's columns; images ``2 index`` and ``2 index + 1``."""
    row = {
        "caption": f"prompt {index}",
        "jpg_0": image_bytes(2 * index),
        "jpg_1": image_bytes(2 * index + 1),
        "label_0": label,
        "label_1": None if label is None else 1.0 - label,
        "has_label": True,
        "ranking_id": index,
    }
    return row | changes


def source(kind: str, **options: Any) -> Any:
    """A source by its name in recipes."""
    cls = registry.load(SOURCES, kind, "source")
    return cls(cls.Options(type=kind, **options))


def error_of(records: Iterable[Record]) -> str:
    """The text of the DataError that iterating raises."""
    with pytest.raises(DataError) as caught:
        list(records)
    return str(caught.value)


def payloads(record: Record) -> list[Any]:
    """What the media of a record hold once read."""
    return [resolve(item.media).data for item in record.items]


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 4) -> Path:
    """Rows as parquet."""
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_images(folder: Path, names: Sequence[str]) -> None:
    """Image files; the position of a name is its seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        (folder / name).write_bytes(image_bytes(seed))


@dataclass
class FakeGenerator:
    """The encoding half of a generator. Encoders are arithmetic and count what they see.

    Args:
        variants: augmentations.
        version: part of the media key.
        poison: added to encoded media, e.g. NaN or 1e6.
    """

    variants: tuple[str, ...] = ("",)
    version: int = 1
    poison: float = 0.0
    loads: int = 0
    batches: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    def media_variants(self) -> Sequence[str]:
        return self.variants

    def media_key(self) -> Mapping[str, Any]:
        return {"fake": self.version}

    def text_key(self) -> Mapping[str, Any]:
        return {"fake text": 1}

    def load_media(self, media: Media, variant: str) -> Encoded:
        self.loads += 1
        if media.kind != "image":
            return Encoded({media.kind: media.data}, {})
        image = open_image(media.data)
        pixels, size = fit(image, 8, "random", media.meta["key"], variant == "flip")
        return Encoded({"pixels": pixels}, {"crop_top_left": list(size.crop_top_left)})

    def encode_media(self, loaded: Sequence[Encoded]) -> list[Encoded]:
        self.batches.append(len(loaded))
        if "codes" in loaded[0].state:
            return list(loaded)
        x0 = [item.state["pixels"].mean(0) + self.poison for item in loaded]
        return [Encoded({"x0": x}, item.meta) for x, item in zip(x0, loaded, strict=True)]

    def encode_prompts(self, prompts: Sequence[str]) -> list[TensorDict]:
        self.prompts += prompts
        return [{"text": text_of(prompt)} for prompt in prompts]

    def assemble(
        self,
        states: Sequence[TensorDict],
        conds: Sequence[TensorDict],
        metas: Sequence[Mapping[str, Any]],
    ) -> Sample:
        stack = lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]}  # noqa: E731
        return Sample(stack(states), stack(conds), tuple(metas))


def text_of(prompt: str) -> torch.Tensor:
    """What the fake text encoder makes of a prompt: its length and last character."""
    return torch.tensor([float(len(prompt)), float(ord(prompt[-1])) if prompt else 0.0])


def fake_generator(**settings: Any) -> Any:
    """A FakeGenerator that type checkers take for a whole Generator."""
    return FakeGenerator(**settings)


@dataclass
class ListSource:
    """Records from memory.

    Args:
        records: what is streamed.
        name: its fingerprint.
        fail_at: raise before this record.
        error: what to raise.
    """

    records: list[Record]
    name: str = "list"
    fail_at: int | None = None
    error: BaseException = field(default_factory=KeyboardInterrupt)
    stats: Stats = field(default_factory=Stats)

    def __iter__(self) -> Iterator[Record]:
        self.stats = Stats()
        for index, record in enumerate(self.records):
            if index == self.fail_at:
                raise self.error
            self.stats.read += 1
            yield record

    def fingerprint(self) -> dict[str, Any]:
        return {"list": self.name}

    def count(self) -> int | None:
        return len(self.records)


def list_source(records: list[Record], **settings: Any) -> Any:
    """A ListSource that type checkers take for a whole Source."""
    return ListSource(records, **settings)


def item(seed: int, prompt: str = "p", **facts: Any) -> Item:
    """An image item."""
    return Item(Media("image", image_bytes(seed)), prompt, **facts)


def pair(index: int, **changes: Any) -> Record:
    """A pair of images ``2 index`` (winner) and ``2 index + 1``."""
    items = (item(2 * index, f"prompt {index}"), item(2 * index + 1, f"prompt {index}"))
    return Record(**({"id": f"r{index}", "layout": "pair", "items": items} | changes))


def ranking(ranks: Sequence[int], name: str = "g", seed: int = 0) -> Record:
    """A ranking of noise images."""
    items = tuple(item(seed + i, "ranked") for i in range(len(ranks)))
    return Record(name, "ranked", items, ranks=tuple(ranks))


@dataclass(frozen=True)
class CacheSettings:
    """Stand-in for the recipe's cache section."""

    dir: str
    dtype: str = "float32"
    encode_batch_size: int = 4


Build = Callable[..., Prepared]


def build_in(folder: Path) -> Build:
    """``prepare`` into one cache folder; a list of records becomes a source."""

    def run(records: Any, generator: Any, layout: Layout = "pairs", **options: Any) -> Prepared:
        settings = CacheSettings(str(folder / "cache"), **options.pop("cache", {}))
        made = list_source(records) if isinstance(records, list) else records
        return prepare(made, generator, layout, settings, **options)

    return run
