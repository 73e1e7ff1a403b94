r"""What the reference said of an item and a draw, kept on disk: one float each.

A preference loss compares the policy with a frozen reference on the same events. An event is a
function of seeds (:mod:`t2i_align.process.seeds`), so it can be drawn again at will and only the
reference's number for it has to be kept, with c(i) the media and prompt of item i:

    (1)  key(i)   = blake2b_128(time seed, noise seed, media key, prompt key of c(i))
    (2)  value(i) = error of each of the S draws of i, or log p of each of its tokens, float32
    (3)  space    = hash of everything else: weights, draw spec, process, stores, numerics

Run seed, record, draw index and coupling are in the seeds, so records that are added, labels that
are turned around, and another beta, learning rate, rank or objective find what is there. Values
are whole: reading gives the bits that were written, and ``logp = -1/2 weight error`` is formed
anew as in ``process/elbo.py``.

    <cache.dir>/v1/reference-<space>/space.json          the facts behind the hash, readable
    <cache.dir>/v1/reference-<space>/part-<uuid>.safetensors
        keys (N, 2) int64, sorted; values (M,) float32; ends (N,) int64 where widths differ

A part is written once, hashed, synced and renamed, so a kill leaves whole parts. A pair of one
draw takes 40 bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_align.contract import Event, Score, Seeds, TensorDict
from t2i_align.data.cache import HASH, atomic, make_folder, problem_of, tensors_sha256
from t2i_align.data.manifest import digest
from t2i_align.plain_json import loads

log = logging.getLogger(__name__)

FORMAT = 1
PREFIX = "reference-"
FACTS_FILE = "space.json"
FLUSH_SECONDS = 60.0
FLUSH_ITEMS = 1 << 20

Key = tuple[int, int]


def item_keys(seeds: Seeds, metas: Sequence[Mapping[str, Any]]) -> list[Key]:
    """Eq. (1) for a batch; ``metas`` name each item's entries, as :class:`Prepared` gives them."""
    rows = zip(seeds.time.tolist(), seeds.noise.tolist(), metas, strict=True)
    return [_key(f"{t}\0{n}\0{m['media_key']}\0{m['prompt_key']}") for t, n, m in rows]


def _key(text: str) -> Key:
    raw = hashlib.blake2b(text.encode(), digest_size=16).digest()
    first, second = (int.from_bytes(raw[k : k + 8], "big", signed=True) for k in (0, 8))
    return first, second


def values_of(score: Score) -> list[Tensor]:
    """Eq. (2): each item's units inside the mask, so that padding never enters."""
    units = score.logp if score.error is None else score.error
    units, mask = units.detach().float().cpu(), score.mask.cpu()
    return [row[inside].clone() for row, inside in zip(units, mask, strict=True)]


def score_of(event: Event, values: Sequence[Tensor]) -> Score:
    """The score that :func:`values_of` was given, for the same event; on its device."""
    units = torch.zeros(event.mask.shape, dtype=torch.float32)
    units[event.mask.cpu()] = torch.cat(list(values))
    units = units.to(event.mask.device)
    if event.target is None:  # an exact likelihood, a scalar a unit
        dims = torch.ones_like(event.mask, dtype=torch.int64)
        return Score(event.kind, units, event.mask, dims, "sum")
    if event.elem_mask is None:
        dims = torch.full_like(units, event.target[0, 0].numel(), dtype=torch.int64)
    else:
        inside = event.elem_mask.unsqueeze(1).expand_as(event.target)
        dims = inside.flatten(2).sum(2)
    weight = 1.0 if event.weight is None else event.weight
    return Score(event.kind, -0.5 * weight * units, event.mask, dims, "mean", error=units)


class _Part:
    """One file, mapped."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        file: Any = safe_open(path, framework="pt")
        with file as handle:
            names = handle.keys()
            keys: Tensor = handle.get_tensor("keys")
            self.values: Tensor = handle.get_tensor("values")
            self.ends: Tensor | None = handle.get_tensor("ends") if "ends" in names else None
        self.first, self.second = keys[:, 0].contiguous(), keys[:, 1].contiguous()

    def __len__(self) -> int:
        return len(self.first)

    def row(self, key: Key) -> Tensor | None:
        """Values of a key, or None; several keys may begin alike."""
        at = int(torch.searchsorted(self.first, key[0]))
        while at < len(self.first) and int(self.first[at]) == key[0]:
            if int(self.second[at]) == key[1]:
                return self._slice(at)
            at += 1
        return None

    def _slice(self, at: int) -> Tensor:
        if self.ends is None:
            width = len(self.values) // len(self.first)
            return self.values[at * width : (at + 1) * width]
        return self.values[(int(self.ends[at - 1]) if at else 0) : int(self.ends[at])]


class ReferenceStore:
    """What one reference said of items and draws; several processes may write into its folder.

    Args:
        root: folder of the cache's version.
        facts: Eq. (3), JSON-able.
        flush_seconds: a part is written when the last was this long ago.
    """

    def __init__(
        self, root: Path, facts: Mapping[str, Any], *, flush_seconds: float = FLUSH_SECONDS
    ) -> None:
        """Check and map the parts that are there."""
        self.folder = root / space_name(facts)
        self.flush_seconds = flush_seconds
        make_folder(self.folder)
        if not (self.folder / FACTS_FILE).is_file():
            with atomic(self.folder / FACTS_FILE) as temporary:
                temporary.write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")
        self._parts: list[_Part] = []
        self._waiting: dict[Key, Tensor] = {}
        self._flushed = time.monotonic()
        for path in sorted(self.folder.glob("part-*.safetensors")):
            self._open(path)

    def _open(self, path: Path) -> None:
        """Map a part; one that is not what was written is set aside, its items are scored anew."""
        problem = problem_of(path)
        if problem:
            aside = path.with_name(path.name + ".corrupt")
            path.rename(aside)
            log.warning("reference cache: set aside as %s (%s)", aside, problem)
            return
        self._parts.append(_Part(path))

    def __len__(self) -> int:
        """Entries, those that several processes wrote counted each time."""
        return sum(map(len, self._parts)) + len(self._waiting)

    def row(self, key: Key) -> Tensor | None:
        """Values of one item and draw."""
        if key in self._waiting:
            return self._waiting[key]
        found = (part.row(key) for part in self._parts)
        return next((row for row in found if row is not None), None)

    def get(self, keys: Sequence[Key]) -> list[Tensor] | None:
        """Values of all items of a batch, or None when one is missing."""
        rows = []
        for key in keys:
            row = self.row(key)
            if row is None:
                return None
            rows.append(row)
        return rows

    def put(self, keys: Sequence[Key], values: Sequence[Tensor]) -> None:
        """Keep what is new.

        Raises:
            StorageError: a part was due and could not be written.
        """
        for key, row in zip(keys, values, strict=True):
            if self.row(key) is None:
                self._waiting[key] = row
        due = time.monotonic() - self._flushed >= self.flush_seconds
        if due or len(self._waiting) >= FLUSH_ITEMS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one part.

        Raises:
            StorageError: the disk is full or not writable; earlier parts are intact.
        """
        from safetensors.torch import save_file

        self._flushed = time.monotonic()
        if not self._waiting:
            return
        tensors = packed(self._waiting)
        path = self.folder / f"part-{uuid.uuid4().hex}.safetensors"
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={HASH: tensors_sha256(tensors)})
        self._parts.append(_Part(path))
        self._waiting = {}


def packed(rows: Mapping[Key, Tensor]) -> TensorDict:
    """Entries as the tensors of a part, sorted by key."""
    keys = sorted(rows)
    widths = torch.tensor([len(rows[key]) for key in keys])
    tensors = {"keys": torch.tensor(keys), "values": torch.cat([rows[key] for key in keys])}
    same = bool((widths == widths[0]).all())
    return tensors if same else tensors | {"ends": widths.cumsum(0)}


def space_name(facts: Mapping[str, Any]) -> str:
    """Folder of Eq. (3)."""
    return PREFIX + digest(dict(facts))


def facts_in(folder: Path) -> dict[str, Any]:
    """What a space is of; empty where its file cannot be read."""
    try:
        found = loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def relatives(root: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Spaces that agree with ``facts`` in all that those name, whatever else they depend on."""
    plain = json.loads(json.dumps(dict(facts)))
    known = ((folder, facts_in(folder)) for folder in sorted(root.glob(f"{PREFIX}*")))
    return [f for f, theirs in known if all(theirs.get(k) == v for k, v in plain.items())]
