"""Batches from a prepared cache: pure functions of (which records, which draw of each, run seed).

Nothing about a record depends on what else is in the batch, on its size, or on the process that
asks. Everything random comes from :func:`t2i_align.process.seeds.derive` of (run seed, record id,
draw, stream):

    time, noise   seeds of the event; coupling says which of them a record's items share
    flip          one variant of the media, jointly for a record
    caption       whether a record's prompts become empty (caption dropout)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from t2i_align.contract import Coupling, Layout, Sample, Seeds
from t2i_align.data.buckets import variant_at
from t2i_align.data.cache import TensorStore
from t2i_align.data.manifest import Manifest, ManifestRow, Report, digest
from t2i_align.errors import DataError
from t2i_align.process.seeds import derive, uniform01
from t2i_align.protocols import Generator

SHARED_STREAMS: dict[Coupling, frozenset[str]] = {
    "none": frozenset(),
    "time": frozenset({"time"}),
    "time+noise": frozenset({"time", "noise"}),
}


@dataclass(frozen=True)
class Batch:
    """B items of some records.

    Args:
        sample: states and conditioning; pairs: all winners, then all losers; otherwise record by
            record.
        seeds: ``(B,)`` time and noise seeds.
        chosen: ``(P,)`` item index of each pair's winner; empty without pairs.
        rejected: ``(P,)`` of its loser.
        preference: ``(P,)`` float32, 1 or 0.5.
        labels: ``(B,)`` int64 +1 or -1, or None when the data has none.
        groups: ``(B,)`` int64 record number inside the batch, for groups; else None.
        ranks: ``(B,)`` int64, 0 = best, for groups; else None.
        values: ``(B,)`` float32 with NaN where a record has none, or None when no record has one.
        prompts: ``(B,)`` int64 hash of each item's prompt.
        records: ``(B,)`` int64 record number inside the batch.
        weight: ``(P,)`` for pairs, else ``(B,)``, float32, or None when all records weigh 1.
        record_ids: one a record, in order.
    """

    sample: Sample
    seeds: Seeds
    chosen: Tensor
    rejected: Tensor
    preference: Tensor
    labels: Tensor | None
    groups: Tensor | None
    ranks: Tensor | None
    values: Tensor | None
    prompts: Tensor
    records: Tensor
    weight: Tensor | None
    record_ids: tuple[str, ...]


@dataclass(frozen=True)
class _Slot:
    """One item: its record's place in the batch, its own place in the record, the draw."""

    record: int
    item: int
    draw: int
    row: ManifestRow


def media_key(content: str, variant: str) -> str:
    """Key of a variant of a medium in the media store."""
    return f"{content}@{variant}" if variant else content


def prompt_key(prompt: str) -> str:
    """Key of a prompt in the text store, whose folder stands for the encoders."""
    return digest(["prompt", prompt])


def prompt_number(prompt: str) -> int:
    """A prompt as a number in [0, 2**62), for objectives that keep something for each prompt."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") >> 2


def item_seeds(run_seed: int, slots: Sequence[tuple[str, int, int]], coupling: Coupling) -> Seeds:
    """Seeds of items given as (record id, draw, item number in the record)."""

    def stream(name: str) -> Tensor:
        shared = name in SHARED_STREAMS[coupling]
        return torch.tensor(
            [
                derive(run_seed, record, draw, name if shared else f"{name}/{item}")
                for record, draw, item in slots
            ],
            dtype=torch.int64,
        )

    return Seeds(time=stream("time"), noise=stream("noise"))


class Prepared:
    """A cached data set.

    Args:
        generator: assembles samples; its encoders are not needed any more.
        layout: of the records.
        manifest: the records.
        media: media store.
        text: text store.
        report: what became of the source's rows.
    """

    def __init__(
        self,
        generator: Generator,
        layout: Layout,
        manifest: Manifest,
        media: TensorStore,
        text: TensorStore,
        report: Report,
    ) -> None:
        """Nothing is read yet."""
        self.generator = generator
        self.layout = layout
        self.manifest = manifest
        self.media = media
        self.text = text
        self.report = report
        self._identity = ""

    def __len__(self) -> int:
        """Number of records."""
        return len(self.manifest)

    def identity(self) -> str:
        """Hash of which records there are, with which media and labels, in which order.

        Every checkpoint asks for it, so it is made once.
        """
        if self._identity:
            return self._identity
        hasher = hashlib.sha256()
        for name in ("id", "keys", "prompt_keys"):
            column = self.manifest.table[name].combine_chunks()
            flat = column if name == "id" else column.flatten()
            hasher.update("\n".join(flat.to_pylist()).encode())
        bucketed = ["size"] if self.manifest.has_sizes else []
        for name in ("preference", "labels", "ranks", "values", "weight", *bucketed):
            hasher.update(repr(self.manifest.table[name].to_pylist()).encode())
        self._identity = hasher.hexdigest()
        return self._identity

    def ids(self, index: int) -> str:
        """Id of a record."""
        return self.manifest.table["id"][index].as_py()

    def batch(
        self,
        picks: Sequence[tuple[int, int]],
        *,
        run_seed: int,
        coupling: Coupling,
        empty_prompts: float,
    ) -> Batch:
        """The batch of some (record index, draw index).

        Args:
            picks: which records, and which draw of each.
            run_seed: of the run.
            coupling: what the items of a record share.
            empty_prompts: probability that a record's prompts are dropped.
        """
        rows = [self.manifest[index] for index, _ in picks]
        if len({tuple(row.size) for row in rows}) > 1:
            raise ValueError("records of several buckets cannot share a batch; see BucketOrder")
        slots = self._slots(rows, [draw for _, draw in picks])
        num_pairs = len(rows) if self.layout == "pairs" else 0
        return Batch(
            sample=self._sample(slots, run_seed, empty_prompts),
            seeds=item_seeds(run_seed, [(s.row.id, s.draw, s.item) for s in slots], coupling),
            chosen=torch.arange(num_pairs),
            rejected=torch.arange(num_pairs) + num_pairs,
            preference=torch.tensor([r.preference for r in rows[:num_pairs]], dtype=torch.float32),
            labels=self._labels(slots),
            groups=self._if_groups([s.record for s in slots]),
            ranks=self._if_groups([s.row.ranks[s.item] for s in slots if s.row.ranks]),
            values=self._values(slots),
            prompts=torch.tensor([prompt_number(s.row.prompts[s.item]) for s in slots]),
            records=torch.tensor([s.record for s in slots]),
            weight=self._weight(slots, num_pairs),
            record_ids=tuple(row.id for row in rows),
        )

    def names(
        self,
        picks: Sequence[tuple[int, int]],
        *,
        run_seed: int,
        coupling: Coupling,
        empty_prompts: float,
    ) -> tuple[Seeds, list[dict[str, str]]]:
        """What :meth:`batch` would hold, by name: seeds, and keys of its items; nothing is read."""
        rows = [self.manifest[index] for index, _ in picks]
        slots = self._slots(rows, [draw for _, draw in picks])
        seeds = item_seeds(run_seed, [(s.row.id, s.draw, s.item) for s in slots], coupling)
        return seeds, [self._facts(slot, run_seed, empty_prompts) for slot in slots]

    def _slots(self, rows: list[ManifestRow], draws: list[int]) -> list[_Slot]:
        slots = [
            _Slot(record, item, draw, row)
            for record, (row, draw) in enumerate(zip(rows, draws, strict=True))
            for item in range(len(row.keys))
        ]
        if self.layout == "pairs":
            slots.sort(key=lambda slot: slot.item)  # stable: winners in record order, then losers
        return slots

    def _sample(self, slots: list[_Slot], run_seed: int, empty_prompts: float) -> Sample:
        states, conds, metas = [], [], []
        for slot in slots:
            facts = self._facts(slot, run_seed, empty_prompts)
            states.append(self.media.get(facts["media_key"]))
            conds.append(self._cond(facts["prompt_key"]))
            metas.append(self.media.meta(facts["media_key"]) | facts)
        return self.generator.assemble(states, conds, metas)

    def _facts(self, slot: _Slot, run_seed: int, empty_prompts: float) -> dict[str, str]:
        """An item's record and prompt, and the keys that a reference cache knows it by."""
        row = slot.row
        variant = variant_at(row.size, self._variant(run_seed, row.id, slot.draw))
        dropped = uniform01(run_seed, row.id, slot.draw, "caption") < empty_prompts
        return {
            "record_id": row.id,
            "prompt": row.prompts[slot.item],
            "media_key": media_key(row.keys[slot.item], variant),
            "prompt_key": prompt_key("") if dropped else row.prompt_keys[slot.item],
        }

    def _variant(self, run_seed: int, record_id: str, draw: int) -> str:
        variants = self.generator.media_variants()
        place = int(uniform01(run_seed, record_id, draw, "flip") * len(variants))
        return variants[min(place, len(variants) - 1)]

    def _cond(self, key: str) -> dict[str, Tensor]:
        if key not in self.text:
            raise DataError(
                f"the text cache lacks key {key}",
                'caption dropout needs the empty prompt: prepare(..., extra_prompts=("",))',
            )
        return self.text.get(key)

    def _labels(self, slots: list[_Slot]) -> Tensor | None:
        if self.layout == "pairs" or not self.manifest.has_labels:
            return None
        return torch.tensor([s.row.labels[s.item] or 0 for s in slots], dtype=torch.int64)

    def _if_groups(self, values: list[int]) -> Tensor | None:
        return torch.tensor(values, dtype=torch.int64) if self.layout == "groups" else None

    def _values(self, slots: list[_Slot]) -> Tensor | None:
        if not self.manifest.has_values:
            return None
        values = [s.row.values[s.item] for s in slots]
        return torch.tensor([float("nan") if v is None else v for v in values])

    def _weight(self, slots: list[_Slot], num_pairs: int) -> Tensor | None:
        if not self.manifest.has_weights:
            return None
        return torch.tensor([s.row.weight for s in slots[: num_pairs or len(slots)]])
