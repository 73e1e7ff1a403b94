"""What a recipe will do and cost, found without weights or an accelerator.

The network is built on the meta device and one step is run there (:mod:`t2i_align.train.trace`);
memory is put together in :mod:`t2i_align.train.memory`, FLOPs in :mod:`t2i_align.train.cost`.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import torch

from t2i_align.contract import DrawSpec
from t2i_align.data.records import as_layout
from t2i_align.errors import DataError
from t2i_align.generators.diffusers_family import DiffusersGenerator
from t2i_align.generators.diffusers_folder import DTYPES
from t2i_align.generators.views import BORROWED
from t2i_align.protocols import Generator
from t2i_align.recipe import Recipe
from t2i_align.train.cost import Calls, calls, compares, states_seen
from t2i_align.train.memory import HALVES, memory, num_parameters
from t2i_align.train.recompute import Measured, fitted
from t2i_align.train.reference import load_mode
from t2i_align.train.trace import Device, Look, Traced, example_event, trace, trace_forward

GB = 1e9
NUM_READ = 32  # rows that are looked at
ITEMS = {"pairs": 2.0, "groups": 2.0}  # of a record, where none can be looked at; else 1
KINDS = {
    "policy": "policy, forward and backward",
    "reference": "reference",
    "inversion": "inversion",
    "rollout": "sampling, if the judge keeps every comparison",
}


@dataclass(frozen=True)
class Plan:
    """A resolved recipe in numbers; memory in bytes on one device.

    Args:
        network: class of the trained network.
        parameters: all scalars of it.
        trainable_parameters: those that are trained.
        items_per_forward: samples in one forward (2 for a pair); of lists as many as the longest
            that was looked at.
        records_per_step: records of one optimizer step on one process.
        memory: bytes by kind, and the most alive at once (``peak``, less than their sum). Where
            reference errors may be kept, ``peak, reference all cached`` is without the copy.
        flops: of one record by what they are for.
        flops_per_record: their sum; text and media are cached, decoder and judge are left out.
        judged_per_record: samples that are decoded and judged.
        recomputed: share of the blocks whose activations are recomputed, where the recipe leaves
            that to the plan; else None.
        num_records: records in the data, None when it cannot be counted without reading.
        passes: passes over the data, None likewise.
        cache_bytes: latents and text on disk, an upper bound (no two prompts alike), None likewise.
    """

    network: str
    parameters: int
    trainable_parameters: int
    items_per_forward: int
    records_per_step: int
    max_train_steps: int
    memory: dict[str, int]
    flops: dict[str, int]
    flops_per_record: int
    judged_per_record: float
    recomputed: float | None
    num_records: int | None
    passes: float | None
    cache_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value for a table."""
        share = 100 * self.trainable_parameters / max(self.parameters, 1)
        seen = f"{self.records_per_step} records, {self.items_per_forward} samples a forward"
        return [
            ("network", f"{self.network}, {self.parameters:,} parameters"),
            ("trained", f"{self.trainable_parameters:,} parameters ({share:.2f} %)"),
            ("one step", seen),
            *(
                []
                if self.recomputed is None
                else [("recomputed", f"{self.recomputed:.0%} of blocks")]
            ),
            *self._compute(),
            *((f"memory: {k}", f"{v / GB:.2f} GB") for k, v in self.memory.items()),
            *self._data(),
            ("steps", f"{self.max_train_steps:,}"),
        ]

    def _compute(self) -> list[tuple[str, str]]:
        rows = [("compute", f"{self.flops_per_record / 1e12:.3g} TFLOP a record")]
        parts = {k: v for k, v in self.flops.items() if v}
        for k, v in parts.items() if len(parts) > 1 else ():
            rows.append((f"compute: {k}", f"{v / 1e12:.3g} TFLOP ({KINDS[k]})"))
        if self.judged_per_record:
            rows.append(("judged", f"{self.judged_per_record:.3g} decoded samples a record"))
        return rows

    def _data(self) -> list[tuple[str, str]]:
        if self.num_records is None:
            return [("data", "not counted (hub data or unreadable without a pass)")]
        return [
            ("data", f"{self.num_records:,} records, {self.passes:.2f} passes"),
            ("cache on disk", f"at most {(self.cache_bytes or 0) / GB:.2f} GB"),
        ]


@dataclass(frozen=True)
class Rows:
    """What the first rows of the data give the objective.

    Args:
        count: rows, None when they cannot be counted.
        records: records a row, in the mean.
        media: media a row.
        items: items a record.
        longest: items of the longest record.
    """

    count: int | None
    records: float
    media: float
    items: float
    longest: int


def rows_of(recipe: Recipe) -> Rows:
    """Look at the first rows, where they can be counted and are not labelled by judges first."""
    source, layout = recipe.chosen("data")(recipe.data), recipe.needs.layout
    count, usual = source.count(), ITEMS.get(layout, 1.0)
    if count is None:
        return Rows(None, 1.0, usual, usual, int(usual))
    try:
        first = list(itertools.islice(source, NUM_READ))
        made = [as_layout(record, layout, recipe.data.pairing) for record in first]
    except DataError:  # told by training itself, where it also says what to do
        first, made = [], []
    lengths = [len(record.items) for records in made for record in records]
    if recipe.data.label_by is not None or not lengths:
        return Rows(count, 1.0, usual, usual, int(usual))
    media = sum(len({item for r in records for item in map(id, r.items)}) for records in made)
    return Rows(
        count,
        records=len(lengths) / len(first),
        media=media / len(first),
        items=sum(lengths) / len(lengths),
        longest=max(lengths),
    )


def cached_bytes(generator: Generator, cache_dtype: str) -> tuple[int, int]:
    """Bytes of one cached medium (all variants) and of one cached prompt."""
    width = 4 if cache_dtype == "float32" else 2
    sample = generator.example(1)
    size = lambda x: x.numel() * (width if x.is_floating_point() else x.element_size())  # noqa: E731
    media = sum(size(x) for x in sample.state.values()) * len(generator.media_variants())
    return media, sum(size(x) for x in sample.cond.values())


def built(recipe: Recipe) -> Generator:
    """The recipe's generator with its network on the meta device."""
    generator: Generator = recipe.chosen("model")(recipe.model, "meta")
    generator.load_module(
        recipe.seed,
        reference="reference" in recipe.needs.views,
        reference_mode=recipe.reference.mode,
    )
    if recipe.reference.moves:
        generator.views.let_reference_follow()
    if recipe.train.channels_last:
        for net in {generator.module, generator.views.reference or generator.module}:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return generator


def looked(recipe: Recipe, generator: Generator, device: Device) -> Look:
    """How the recipe's step runs; a network that is told its guidance has one branch."""
    guided = recipe.rollout if recipe.needs.feed == "trajectory" else None
    if isinstance(generator, DiffusersGenerator) and generator.layout.branches == "embedded":
        guided = None
    return Look(
        half=HALVES[recipe.train.mixed_precision],
        device=device,
        guidance=1.0 if guided is None else guided.guidance_scale,
        detach=guided is not None and guided.detach_negative,
        accumulated=recipe.train.gradient_accumulation_steps > 1,
    )


def rollout_peak(recipe: Recipe, generator: Generator, look: Look) -> int:
    """Most bytes alive while the policy is sampled for training."""
    options, feed = recipe.rollout, recipe.needs.feed
    if options is None or feed == "stored":
        return 0
    size = recipe.train.train_batch_size
    if feed == "trajectory":
        candidates = options.num_candidates if compares(recipe) == "steps" else 1
        size = options.batch_size * candidates
    return trace_forward(generator, example_event(generator, size, DrawSpec()), "policy", look)


def flops_of(recipe: Recipe, found: Calls, step: Traced, look: Look, items: int) -> dict[str, int]:
    """FLOPs of one record, from those of a traced step of ``items``."""
    branches = 1 if look.guidance == 1 else 2
    each = items * recipe.draw.num_draws * branches
    forward, own = step.forward / each, step.step / each
    if look.detach and branches == 2:  # half of the branches went forward only
        own = 2 * own - forward
    return found.flops(own, forward, step.reference / each, step.alone / each)


def plan(recipe: Recipe, device: Device = "cuda") -> Plan:
    """Resolve a recipe into numbers.

    Args:
        recipe: validated.
        device: whose mixed precision: CUDA computes norms in float32, the CPU does not.

    Raises:
        ModelError: the model folder is missing, or a hub id is neither on this machine nor built
            in.
    """
    generator, rows, train = built(recipe), rows_of(recipe), recipe.train
    look, views = looked(recipe, generator, device), generator.views
    items = round(train.train_batch_size * states_seen(recipe, rows.longest))
    event = example_event(generator, items, DrawSpec(num_draws=recipe.draw.num_draws))
    sampled = rollout_peak(recipe, generator, look)

    def measure() -> Measured:
        step = trace(generator, event, reference="reference" in recipe.needs.views, look=look)
        return step, memory(views, DTYPES[recipe.model.dtype], train, step, sampled)

    share, (step, bytes_) = fitted(recipe, views.module, measure)
    process: Any = getattr(generator, "process", None)
    found = calls(recipe, rows.items, process, 1 if look.guidance == 1 else 2)
    flops = flops_of(recipe, found, step, look, items)
    records = train.train_batch_size * train.gradient_accumulation_steps
    if load_mode(recipe, recipe.needs) == BORROWED and bytes_["reference copy"]:
        bytes_["peak, reference all cached"] = bytes_["peak"] - bytes_["reference copy"]
    media, text = cached_bytes(generator, recipe.cache.dtype)
    usable = None if rows.count is None else round(rows.count * rows.records)
    return Plan(
        network=type(views.module).__name__,
        parameters=num_parameters(views.module),
        trainable_parameters=sum(p.numel() for p in views.trained().values()),
        items_per_forward=items,
        records_per_step=records,
        max_train_steps=train.max_train_steps,
        memory=bytes_,
        flops=flops,
        flops_per_record=sum(flops.values()),
        judged_per_record=found.judged,
        recomputed=share,
        num_records=usable,
        passes=None if not usable else records * train.max_train_steps / usable,
        cache_bytes=None if rows.count is None else round(rows.count * (rows.media * media + text)),
    )
