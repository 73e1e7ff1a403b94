"""Reference errors on disk: what goes in comes out bit for bit, by keys that name all it is of."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_align.contract import Event, Score, Seeds
from t2i_align.data import reference_cache
from t2i_align.data.batch import item_seeds
from t2i_align.data.reference_cache import (
    ReferenceStore,
    item_keys,
    relatives,
    score_of,
    space_name,
    values_of,
)
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.views import build_views
from t2i_align.process.elbo import elbo_score
from t2i_align.train.reference import reference_sha256


def elbo_event(num_items: int = 4, num_draws: int = 3, **more: Any) -> Event:
    draws = torch.Generator().manual_seed(0)
    state = torch.randn(num_items, num_draws, 2, 5, generator=draws)
    time = torch.rand(num_items, num_draws, generator=draws)
    mask = torch.ones(num_items, num_draws, dtype=torch.bool)
    return Event("elbo", {}, mask, x_t=state, time=time, target=state + 1, **more)


def same(ours: Score, theirs: Score) -> bool:
    """Everything an objective may read of a score without predictions, bit for bit."""
    pairs = [(ours.logp, theirs.logp), (ours.mask, theirs.mask), (ours.dims, theirs.dims)]
    if theirs.error is not None:
        assert ours.error is not None
        pairs.append((ours.error, theirs.error))
    plain = (ours.kind, ours.reduction) == (theirs.kind, theirs.reduction)
    return plain and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("kind", ["plain", "weighted", "masked elements"])
def test_a_denoising_score_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(1)
    more: dict[str, Any] = {}
    if kind == "weighted":
        more["weight"] = torch.rand(4, 3, generator=draws)
    if kind == "masked elements":
        more["elem_mask"] = torch.rand(4, 2, 5, generator=draws) > 0.4
    event = elbo_event(**more)
    live = elbo_score(torch.randn(12, 2, 5, generator=draws), event, frozenset())
    store = ReferenceStore(tmp_path, {"of": kind})
    keys = [(k, -k) for k in range(4)]
    store.put(keys, values_of(live))
    for reader in (store, reopened(store, {"of": kind})):
        found = reader.get(keys)
        assert found is not None and same(score_of(event, found), live)


def reopened(store: ReferenceStore, facts: dict[str, Any]) -> ReferenceStore:
    store.flush()
    return ReferenceStore(store.folder.parent, facts)


def test_an_exact_score_of_ragged_units_knows_no_padding(tmp_path: Path) -> None:
    """Written in a batch padded to 5 units, read one by one in batches without padding."""
    lengths = torch.tensor([2, 5, 3])
    mask = torch.arange(5) < lengths[:, None]
    logp = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    live = Score("token", logp, mask, torch.ones_like(mask, dtype=torch.int64), "sum")
    store = ReferenceStore(tmp_path, {})
    keys = [(9, 1), (9, 0), (-9, 5)]
    store.put(keys, values_of(live))
    store = reopened(store, {})
    for row, key in enumerate(keys):
        num = int(lengths[row])
        event = Event("token", {}, torch.ones(1, num, dtype=torch.bool))
        found = store.get([key])
        assert found is not None
        alone = score_of(event, found)
        assert torch.equal(alone.logp[0], logp[row, :num]) and alone.reduction == "sum"
        assert alone.error is None and alone.dims.tolist() == [[1] * num]


def test_a_million_pairs_take_forty_bytes_each(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, {})
    keys = [(k * 7919 % 10007, k) for k in range(10_000)]
    store.put(keys, list(torch.arange(10_000.0)[:, None]))
    store.flush()
    (part,) = store.folder.glob("part-*")
    assert part.stat().st_size < 20 * 10_000 + 1024
    store = ReferenceStore(tmp_path, {})
    found = store.get(keys[::37])
    assert found is not None and torch.equal(torch.cat(found), torch.arange(10_000.0)[::37])
    assert store.get([keys[0], (3, -3)]) is None and len(store) == 10_000


def test_a_part_is_written_once_and_entries_are_not_replaced(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, {}, flush_seconds=0.0)
    store.put([(1, 1)], [torch.tensor([1.0])])
    store.put([(1, 1)], [torch.tensor([2.0])])
    store.flush()
    assert len(list(store.folder.glob("part-*"))) == 1
    row = store.row((1, 1))
    assert row is not None and row.item() == 1.0


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_part_is_set_aside(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ReferenceStore(tmp_path, {})
    for number in (1, 2):
        store.put([(number, 0)], [torch.tensor([float(number)])])
        store.flush()
    broken = next(p for p in store.folder.glob("part-*") if holds(p, 2))
    raw = bytearray(broken.read_bytes())
    raw[-1] ^= 1  # the value's last bit
    broken.write_bytes({"flipped": bytes(raw), "cut": bytes(raw[:-2]), "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        again = ReferenceStore(tmp_path, {})
    assert again.get([(1, 0)]) is not None and again.get([(2, 0)]) is None
    assert "set aside" in caplog.text and broken.with_name(broken.name + ".corrupt").exists()


def holds(part: Path, first: int) -> bool:
    from safetensors.torch import load_file

    return load_file(part)["keys"][0, 0].item() == first


META = {"media_key": "a@flip", "prompt_key": "p"}


def test_a_key_names_seeds_and_content_and_nothing_else() -> None:
    """Eq. (1): run seed, record, draw and coupling act through the seeds; the rest by content."""

    def key(seed: int = 0, record: str = "r", draw: int = 0, **meta: str) -> Any:
        seeds = item_seeds(seed, [(record, draw, 0)], "time+noise")
        return item_keys(seeds, [META | meta | {"record_id": "other", "prompt": "shown"}])[0]

    variants = [
        key(),
        key(seed=1),
        key(record="s"),
        key(draw=1),
        key(media_key="a"),
        key(prompt_key=""),
    ]
    assert len(set(variants)) == len(variants)
    assert key() == key()
    shared = item_seeds(0, [("r", 0, 0), ("r", 0, 1)], "time+noise")
    apart = item_seeds(0, [("r", 0, 0), ("r", 0, 1)], "none")
    winner, loser = item_keys(shared, [META, META])
    assert winner == loser  # the same picture under the same seeds is the same event
    assert len(set(item_keys(apart, [META, META]))) == 2


def test_fields_of_a_key_cannot_run_into_each_other() -> None:
    seeds = Seeds(torch.tensor([1, 11]), torch.tensor([11, 1]))
    a, b = item_keys(seeds, [{"media_key": "x", "prompt_key": "y"}] * 2)
    assert a != b
    one = Seeds(seeds.time[:1], seeds.noise[:1])
    c = item_keys(one, [{"media_key": "xy", "prompt_key": ""}])[0]
    assert c != item_keys(one, [{"media_key": "x", "prompt_key": "y"}])[0]


def test_spaces_differ_by_every_fact_and_relatives_are_found(tmp_path: Path) -> None:
    facts = {"draw": {"num_draws": 1}, "weights": "a", "numerics": {"device": "cpu"}}
    others = [facts | {"weights": "b"}, facts | {"draw": {"num_draws": 2}}]
    names = {space_name(f) for f in (facts, *others)}
    assert len(names) == 3
    for each in (facts, *others):
        ReferenceStore(tmp_path, each)
    cheap = {k: v for k, v in facts.items() if k != "weights"}
    found = {path.name for path in relatives(tmp_path, cheap)}
    assert found == {space_name(facts), space_name(others[0])}


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))


def test_the_hash_of_a_reference_is_that_of_what_it_computes_with() -> None:
    """Full fine-tuning, LoRA of any rank and a frozen copy have one reference; training and
    adapters do not move it, one changed weight does, and so do adapters it starts from.
    """
    lora = LoraOptions(r=2, target_modules="all-linear")
    full = build_views(tiny(), None, [], 0, reference=True)
    plain = reference_sha256(full, None)
    adapted = build_views(tiny(), lora, [], 0, reference=True)
    wider = LoraOptions(r=3, target_modules="all-linear")
    assert reference_sha256(adapted, lora) == plain
    assert reference_sha256(build_views(tiny(), wider, [], 1, reference=True), wider) == plain
    copied = build_views(tiny(), lora, [], 0, reference=True, reference_mode="frozen_copy")
    assert reference_sha256(copied, lora) == plain
    with torch.no_grad():
        for views in (full, adapted):
            for p in views.trained().values():
                p.add_(1.0)
    assert reference_sha256(full, None) == plain == reference_sha256(adapted, lora)
    adapted.let_reference_follow()
    started = reference_sha256(adapted, lora)
    assert started != plain
    scaled = lora.model_copy(update={"lora_alpha": 7})
    assert reference_sha256(adapted, scaled) != started
    assert full.reference is not None
    with torch.no_grad():
        next(full.reference.parameters())[0, 0] += 1e-6
    assert reference_sha256(full, None) != plain


def test_entries_wait_in_memory_until_a_flush_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_cache, "FLUSH_ITEMS", 3)
    store = ReferenceStore(tmp_path, {})
    store.put([(1, 0), (2, 0)], [torch.zeros(1)] * 2)
    assert list(store.folder.glob("part-*")) == [] and len(store) == 2
    store.put([(3, 0)], [torch.zeros(1)])
    assert len(list(store.folder.glob("part-*"))) == 1


def test_the_mask_of_an_event_is_not_the_scores_business() -> None:
    """A draw that is masked out stays out: its value is not kept, its place is 0."""
    event = elbo_event(2, 2)
    mask = torch.tensor([[True, False], [True, True]])
    event = replace(event, mask=mask)
    live = elbo_score(torch.randn(4, 2, 5), event, frozenset())
    rows = values_of(live)
    assert [len(row) for row in rows] == [1, 2]
    again = score_of(event, rows)
    assert torch.equal(again.per_item(), live.per_item())
    assert again.error is not None and again.error[0, 1] == 0
