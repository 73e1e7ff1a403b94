"""When a run keeps what its reference says, and that what is kept is this reference's.

A frozen reference says the same of an event each time, so it needs to be asked once. In one run an
event comes again only where passes go round in a few draws (``draw.num_distinct``, by default each
pass has a draw of its own); between runs of a sweep all come again. ``cache.reference: auto``
therefore keeps errors when this run meets draws again, uses them when an earlier run or
``t2i-align cache build`` left them, and else does not write what nobody will read.

It is refused where the number is not the reference's alone: a reference that follows the policy,
noise that is found with the policy's weights, samples of the policy, objectives that compare whole
predictions. The first batch that is read is also scored: numbers that are not this model's stop
the run.

Full fine-tuning needs a second network for its reference. Where all that the run will ask is kept,
none is made: the network itself, not trained yet, scores the batch that is looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from t2i_align.contract import DrawSpec, Score, Seeds
from t2i_align.data.cache import tensors_sha256
from t2i_align.data.cache_folder import note_use
from t2i_align.data.prepare import VERSION
from t2i_align.data.reference_cache import (
    FORMAT,
    ReferenceStore,
    relatives,
    score_of,
    space_name,
    values_of,
)
from t2i_align.errors import TrainingError
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.views import BORROWED, Views
from t2i_align.protocols import Generator, Needs
from t2i_align.recipe import Recipe
from t2i_align.train.checkpoint import Checkpoints
from t2i_align.train.feed import Drawn

if TYPE_CHECKING:
    from t2i_align.train.offline import StoredFeed
    from t2i_align.train.setup import Setup

# of model: where weights come from (they are hashed), and what a reference never has
NOT_ITS_OWN = {"name_or_path", "revision", "lora", "gradient_checkpointing", "start_from"}
ADAPTER = "lora_"
# largest relative difference of a number read and the same scored in another batch
TOLERANCE = {False: 1e-3, True: 5e-2}  # by whether something is in half precision


def obstacle(recipe: Recipe, needs: Needs) -> str:
    """Why what the reference says may not be kept; empty when it may."""
    name = recipe.objective.model_dump()["type"]
    if "reference" not in needs.views:
        return f"{name} has no reference"
    if needs.feed != "stored":
        return f"{name} trains on samples of the policy, which never come again"
    if needs.want:
        return f"{name} compares whole predictions ({', '.join(sorted(needs.want))}), not errors"
    if not needs.cacheable_reference:
        return f"{name} finds its noise by inverting samples with the network"
    if recipe.reference.moves:
        return f"reference.refresh '{recipe.reference.refresh}' moves the reference"
    return ""


def halves(recipe: Recipe) -> bool:
    """Whether the reference runs in half precision, partly or whole."""
    return recipe.train.mixed_precision != "no" or recipe.model.dtype != "float32"


def numerics(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What decides on rounding.

    In half precision kernels are chosen by the batch's shape, and a margin multiplies what they
    round by beta / 2; so numbers are shared only between runs of the same geometry.
    """
    train = recipe.train
    found: dict[str, Any] = {"device": device.type, "mixed_precision": train.mixed_precision}
    if not halves(recipe):
        return found
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    same = ("train_batch_size", "channels_last", "compile")
    return found | {k: getattr(train, k) for k in same} | {"torch": torch.__version__, "on": named}


def reference_sha256(views: Views, lora: LoraOptions | None) -> str:
    """One hash over the weights behind the view ``reference``.

    Adapters that are off do not count, nor does the way they are wrapped around the base; those of
    ``model.start_from`` are on, so they do, with the options that scale them.
    """
    assert views.reference is not None
    hasher = hashlib.sha256()
    for name, value in sorted(views.reference.state_dict().items()):
        if ADAPTER not in name and isinstance(value, torch.Tensor):
            plain = name.replace("base_layer.", "")
            hasher.update(tensors_sha256({plain: value}).encode())
    if views.reference is views.module and views.followed:
        hasher.update(tensors_sha256(views.followed).encode())
        hasher.update(json.dumps(lora.model_dump() if lora else None, sort_keys=True).encode())
    return hasher.hexdigest()


def probe(generator: Generator, spec: DrawSpec) -> str:
    """Hash of an event drawn of zeros: process, prediction and draw spec in one."""
    zero = torch.zeros(1, dtype=torch.int64)
    event = generator.draw(generator.example(1), spec, Seeds(zero, zero))
    kept = {k: v for k, v in vars(event).items() if isinstance(v, torch.Tensor)}
    return tensors_sha256(kept | {f"inputs.{k}": v for k, v in event.inputs.items()})


def cheap_facts(setup: Setup, generator: Generator, feed: StoredFeed) -> dict[str, Any]:
    """All that a space depends on but the weights, which take long to hash."""
    recipe = setup.recipe
    facts = {
        "format": FORMAT,
        "media": feed.data.media.folder.name,
        "text": feed.data.text.folder.name,
        "model": recipe.model.model_dump(mode="json", exclude=NOT_ITS_OWN),
        "draw": asdict(feed.spec),
        "probe": probe(generator, feed.spec),
        "numerics": numerics(recipe, setup.accelerator.device),
    }
    return json.loads(json.dumps(facts))


class Kept:
    """What the reference said, read where it is known and written where it is not.

    Args:
        store: on disk.
        tolerance: of the first batch that is read.
        anyone: whether a flag is set on any process, so that all read or all score.
    """

    def __init__(
        self, store: ReferenceStore, tolerance: float, anyone: Callable[[bool], bool]
    ) -> None:
        """Nothing read yet."""
        self.store, self.tolerance, self.anyone = store, tolerance, anyone
        self.num_read = self.num_scored = 0
        self._doubted: Score | None = None
        self._trusted = False

    def read(self, drawn: Drawn) -> Score | None:
        """The reference's score of an event; None where the network has to be asked."""
        if drawn.event.depends_on_policy or drawn.keys is None:
            raise ValueError("what depends on the policy has no cached reference")
        values = self.store.get(drawn.keys)
        if self.anyone(values is None):
            return None
        assert values is not None
        found = score_of(drawn.event, values)
        if not self.num_read and not self._trusted:
            self._doubted = found
        self.num_read += len(drawn.keys)
        return None if self._doubted is found else found

    def settle(self, drawn: Drawn, live: Score) -> Score:
        """Take what the network said: keep it, or hold the first score that was read against it.

        Returns:
            What was read, where something was, so that resumed runs see the same bits.

        Raises:
            TrainingError: what was read is another model's.
        """
        if self._doubted is not None:
            kept, self._doubted = self._doubted, None
            self._compare(kept, live, drawn)
            return kept
        assert drawn.keys is not None
        self.store.put(drawn.keys, values_of(live))
        self.num_scored += len(drawn.keys)
        return live

    def trust(self, drawn: Drawn, live: Score) -> None:
        """Hold what is known of a first batch against the network, before anything is trained.

        Raises:
            TrainingError: it is another model's.
        """
        values = self.store.get(drawn.keys or [])
        assert values, "only of what is known"
        self._compare(score_of(drawn.event, values), live, drawn)
        self._trusted = True

    def _compare(self, kept: Score, live: Score, drawn: Drawn) -> None:
        off = (kept.logp - live.logp).abs().where(live.mask, 0)
        allowed = self.tolerance * live.logp.abs().where(live.mask, 0).amax()
        if bool(off.amax() <= allowed):
            return
        raise TrainingError(
            f"the reference cache {self.store.folder} is not of this reference: log-likelihoods "
            f"differ by up to {float(off.amax()):.3g}, allowed is {float(allowed):.3g}; records: "
            f"{', '.join(drawn.record_ids[:4])}",
            "remove that folder, or set cache.reference: never; t2i-align cache verify finds "
            "files that were changed",
        )

    def __enter__(self) -> Kept:
        """For the time of a run."""
        return self

    def __exit__(self, *error: object) -> None:
        """What was paid for is kept, whatever ended the run."""
        self.flush()

    def flush(self) -> None:
        """Write what waits; before each checkpoint, so that a resumed run reads the same bits."""
        self.store.flush()

    def summary(self) -> dict[str, int]:
        """For the run's summary: items read, and items the reference was asked."""
        return {"read": self.num_read, "scored": self.num_scored}


def load_mode(recipe: Recipe, needs: Needs) -> str:
    """How the network is loaded: the reference's copy is not made before it is known to be needed.

    That is: where errors may be kept, and the reference would be a second network.
    """
    kept = not obstacle(recipe, needs) and recipe.cache.reference != "never"
    return BORROWED if kept and recipe.model.lora is None else recipe.reference.mode


def reference_of(setup: Setup, generator: Generator, feed: Any, needs: Needs) -> Kept | None:
    """The reference cache of a run, see :func:`kept_reference`, and the reference it leaves over.

    A copy that the network stands for is made, unless all that it would say is kept.

    Raises:
        TrainingError: what is kept is another model's.
    """
    kept, views = kept_reference(setup, generator, feed, needs), generator.views
    if views.borrowed:
        known = kept is not None and all_known(setup, generator, feed, kept)
        views.settle_reference(needed=not known)
    return kept


def all_known(setup: Setup, generator: Generator, feed: StoredFeed, kept: Kept) -> bool:
    """Whether everything the run will ask is kept, on every process; of this model, by one look."""
    positions = still_to_come(setup, feed)
    missing = not positions or any(kept.store.get(feed.keys(at)) is None for at in positions)
    if setup.anyone(missing):
        return False
    drawn = feed.at(positions.start)
    with torch.no_grad(), setup.accelerator.autocast():
        kept.trust(drawn, generator.score(drawn.event, "reference"))
    setup.say("the reference cache has all that this run asks: no copy of the network is made")
    return True


def still_to_come(setup: Setup, feed: StoredFeed) -> range:
    """Where this process's micro-batches begin, from the checkpoint on where there is one.

    A run may go on with another batch size, and then it meets other records than it would have.
    """
    train, begin, end = setup.recipe.train, 0, feed.num_positions
    if train.resume_from_checkpoint is not None:
        found = Checkpoints(setup.folder / "checkpoints", None).load(train.resume_from_checkpoint)
        if found is not None:
            begin = found.samples_seen
            end = begin + (train.max_train_steps - found.step) * setup.records_per_step
    return range(begin + setup.accelerator.process_index * train.train_batch_size, end, setup.micro)


def kept_reference(setup: Setup, generator: Generator, feed: Any, needs: Needs) -> Kept | None:
    """The reference cache of a run, or None; says which and why where there is a reference.

    Args:
        setup: recipe and process group.
        generator: its network loaded; the weights are hashed only if that decides something.
        feed: of stored records, else there is none.
        needs: of the objective.
    """
    if "reference" not in needs.views or needs.feed != "stored":
        return None
    recipe, root = setup.recipe, Path(setup.recipe.cache.dir).expanduser() / VERSION
    facts, why = _decide(setup, generator, feed, needs, root)
    if facts is None:
        setup.say(f"reference cache: off: {why}")
        return None
    store = ReferenceStore(root, facts)
    if setup.main:
        note_use(root, recipe.output_dir, recipe.model.name_or_path, [store.folder.name])
    setup.say(f"reference cache: on: {why}; {len(store)} items and draws are there")
    return Kept(store, TOLERANCE[halves(recipe)], setup.anyone)


def _decide(
    setup: Setup, generator: Generator, feed: StoredFeed, needs: Needs, root: Path
) -> tuple[dict[str, Any] | None, str]:
    """Facts of the space to use, or None; and the reason. Alike on every process."""
    recipe, passes = setup.recipe, feed.num_passes
    mode, barred, num = recipe.cache.reference, obstacle(recipe, needs), recipe.draw.num_distinct
    if barred or mode == "never":
        return None, barred or "cache.reference: never"
    cheap = cheap_facts(setup, generator, feed)
    repeats = num is not None and passes > num
    if mode == "auto" and not repeats and setup.anyone(not relatives(root, cheap)):
        return None, _met_once(passes)
    facts = cheap | {"weights": reference_sha256(generator.views, recipe.model.lora)}
    if repeats:
        return facts, f"{passes} passes go round in {num} draws, the first {num} pay for it"
    if mode == "always":
        return facts, "cache.reference: always"
    known = (root / space_name(facts)).is_dir() and ReferenceStore(root, facts).get(feed.keys(0))
    if setup.anyone(not known):
        return None, _met_once(passes)
    return facts, "an earlier run or cache build left what this reference says"


def _met_once(passes: int) -> str:
    return (
        f"each of {passes} passes has draws of its own, met once; draw.num_distinct lets passes "
        "go round in a few, cache.reference: always serves the next runs of a sweep"
    )
