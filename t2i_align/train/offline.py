"""Preference training on stored records.

    source -> cache (latents, text) -> [draw an event of the next records]*

Batches are read one ahead in a thread; which records they hold is a function of the run seed and
the count of records seen, so a resumed run needs no state.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from t2i_align.contract import Coupling, DrawSpec, Event, ScoredBatch, TensorDict
from t2i_align.data.batch import Batch, Prepared
from t2i_align.data.cache_folder import note_use
from t2i_align.data.label_source import build_source
from t2i_align.data.manifest import Manifest
from t2i_align.data.order import BucketOrder, Curriculum, Picks, picks, value_gaps
from t2i_align.data.prepare import prepare
from t2i_align.data.reference_cache import Key, item_keys
from t2i_align.data.share import Share
from t2i_align.errors import DataError
from t2i_align.protocols import Generator, Inverts, Needs, Objective
from t2i_align.recipe import Recipe
from t2i_align.train.engine import Engine
from t2i_align.train.feed import Drawn
from t2i_align.train.setup import Setup

FACTS = (
    "chosen",
    "rejected",
    "preference",
    "labels",
    "groups",
    "ranks",
    "values",
    "prompts",
    "records",
    "weight",
)


def unscored(batch: Batch, event: Event, device: torch.device) -> ScoredBatch:
    """What the objective will see of a data batch, on the training device, scores left out."""
    parts = {name: getattr(batch, name) for name in FACTS}
    moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in parts.items()}
    return ScoredBatch(scores={}, lam=event.lam, log_snr=event.log_snr, **moved)


def prepared(
    setup: Setup,
    generator: Generator,
    objective: Objective,
    share: tuple[int, int] | None = None,
) -> Prepared:
    """The recipe's records, cached; of several builders' records those of one, ``(k, of n)``."""
    recipe = setup.recipe
    shown = setup.console if setup.main else None
    source = build_source(recipe.chosen("data"), recipe.data, recipe.cache.dir, shown)
    source = source if share is None else Share(source, *share)
    with setup.accelerator.main_process_first():
        return prepare(
            source,
            generator,
            objective.needs.layout,
            recipe.cache,
            pairing=recipe.data.pairing,
            extra_prompts=("",),
            console=shown,
        )


def draw_spec(recipe: Recipe, objective: Objective) -> tuple[DrawSpec, Coupling]:
    """How events are drawn, and what the items of a record share."""
    draw = recipe.draw.model_dump()
    asked: Any = draw.pop("coupling")
    draw.pop("num_distinct")  # which draws there are, not how one is made
    coupling: Coupling = objective.needs.coupling if asked == "auto" else asked
    inversion = objective.inversion if isinstance(objective, Inverts) else None
    return DrawSpec(**draw, inversion=inversion), coupling


def require(needs: Needs, manifest: Manifest) -> None:
    """Refuse data that lack what the objective computes with.

    Raises:
        DataError: some item has no value, or no label.
    """
    for asked, column, noun, fix in (
        (
            needs.values,
            "values",
            "a judge's number",
            "let judges score the items (data.label_by), or use a file with score columns",
        ),
        (needs.labels, "labels", "a label", "use data labelled good or bad"),
    ):
        missing = manifest.num_missing(column) if asked else 0
        if missing:
            raise DataError(
                f"objective.type: it needs {noun} of every item; {missing} of "
                f"{manifest.num_items} items have none",
                fix,
            )


class StoredFeed:
    """Events of stored records.

    Args:
        setup: recipe and process group.
        generator: draws.
        objective: whose layout the records have.
    """

    def __init__(self, setup: Setup, generator: Generator, objective: Objective) -> None:
        """Fill the cache where something is new."""
        self.setup, self.generator = setup, generator
        self.data = prepared(setup, generator, objective)
        require(objective.needs, self.data.manifest)
        if setup.main:
            recipe, names = setup.recipe, [s.folder.name for s in (self.data.media, self.data.text)]
            root = self.data.media.folder.parent
            note_use(root, recipe.output_dir, recipe.model.name_or_path, names)
        self.coupling: Coupling
        self.spec, self.coupling = draw_spec(setup.recipe, objective)
        self.order: Curriculum | BucketOrder | None = self._order()
        self._pool = ThreadPoolExecutor(1)
        self._ahead: Future[Batch] | None = None
        self._position = 0
        self._engine: Engine | None = None

    def _order(self) -> Curriculum | BucketOrder | None:
        """Another order than plain passes, where the recipe has one."""
        recipe, manifest = self.setup.recipe, self.data.manifest
        if recipe.data.curriculum is not None:
            return Curriculum(value_gaps(manifest.table), recipe.data.curriculum, recipe.seed)
        sizes = manifest.sizes()
        if sizes is None:
            return None
        order = BucketOrder(torch.from_numpy(sizes), recipe.train.train_batch_size, recipe.seed)
        self.setup.say(self._told(order))
        return order

    def _told(self, order: BucketOrder) -> str:
        """One line on buckets before a run begins."""
        report, waiting = self.data.report, order.waiting()
        text = "buckets: " + ", ".join(f"{n} {count}" for n, count in report.buckets.items())
        if report.beyond_aspect:
            text += f"; {report.beyond_aspect} records are beyond them, cropped to the nearest"
        if waiting:
            text += (
                f"; {waiting} records are in buckets of fewer than train_batch_size "
                f"{order.batch}, so they wait for the records of several passes"
            )
        return text

    def ready(self, engine: Engine) -> None:
        """The engine whose precision draws that need weights are made in."""
        self._engine = engine

    def start(self, samples_seen: int, state: TensorDict) -> None:
        """Read ahead from a position."""
        share = self.setup.recipe.train.train_batch_size
        self._position = samples_seen + self.setup.accelerator.process_index * share
        self._ahead = self._pool.submit(self._load, self._position)

    def _picks(self, at: int) -> Picks:
        recipe = self.setup.recipe
        if self.order is not None:
            return self.order(at, recipe.train.train_batch_size)
        return picks(at, recipe.train.train_batch_size, len(self.data), recipe.seed)

    @property
    def num_records(self) -> int:
        """Records the whole run meets, over all processes and passes."""
        return self.setup.recipe.train.max_train_steps * self.setup.records_per_step

    @property
    def num_passes(self) -> int:
        """Passes over the data that the run begins."""
        last = self.num_records - self.setup.recipe.train.train_batch_size
        return max(number for _, number in self._picks(last)) + 1

    @property
    def num_positions(self) -> int:
        """Records after which no draw is new: the run's, or one round where passes go round."""
        recipe, total = self.setup.recipe, self.num_records
        if recipe.draw.num_distinct is None or self.order is not None:
            return total
        size = recipe.train.train_batch_size
        return min(total, -(-recipe.draw.num_distinct * len(self.data) // size) * size)

    def _wanted(self, at: int) -> tuple[list[tuple[int, int]], dict[str, Any]]:
        """Records of a micro-batch with their draws, and what else a batch is a function of."""
        recipe = self.setup.recipe
        num = recipe.draw.num_distinct
        found = [(k, draw if num is None else draw % num) for k, draw in self._picks(at)]
        return found, {
            "run_seed": recipe.seed,
            "coupling": self.coupling,
            "empty_prompts": recipe.data.proportion_empty_prompts,
        }

    def _load(self, at: int) -> Batch:
        found, others = self._wanted(at)
        return self.data.batch(found, **others)

    def next(self) -> Drawn:
        """Draw an event of the next records."""
        assert self._ahead is not None and self._engine is not None, "start and ready first"
        batch = self._ahead.result()
        self._position += self.setup.micro
        self._ahead = self._pool.submit(self._load, self._position)
        with self._engine.autocast():
            return self._drawn(batch)

    def at(self, position: int) -> Drawn:
        """The micro-batch at any position; needs no engine where drawing runs no network."""
        return self._drawn(self._load(position))

    def keys(self, position: int) -> list[Key]:
        """What a reference cache knows the items of a micro-batch by; no latents are read."""
        found, others = self._wanted(position)
        return item_keys(*self.data.names(found, **others))

    def _drawn(self, batch: Batch) -> Drawn:
        device = self.setup.accelerator.device
        event = self.generator.draw(batch.sample, self.spec, batch.seeds).to(device)
        keys = item_keys(batch.seeds, batch.sample.meta)
        return Drawn(event, unscored(batch, event, device), batch.record_ids, keys=keys)

    def identity(self) -> str:
        """Hash of records, media and order."""
        identity = self.data.identity()
        return identity if self.order is None else f"{identity}-{self.order.identity()}"

    def state(self) -> TensorDict:
        """The position is all, and the engine counts it."""
        return {}

    def summary(self) -> Mapping[str, Any]:
        """Records, and what became of the source's rows."""
        return {"records": len(self.data), "data": self.data.report.to_dict()}

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)
