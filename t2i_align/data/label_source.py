"""A source over a source: its records hold what judges prefer (``data.label_by`` of a recipe).

What the file says of its samples is ignored. The judges' numbers are kept in the cache under a name
made of their cards, options and weights and of the data, so another rule or margin asks no judge
again, and a new version of a judge does.

    <cache.dir>/v1/labels/<identity>/    numbers; labels.json: what each judge says of the labels
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from t2i_align.contract import Media
from t2i_align.data.control import ShuffledLabels
from t2i_align.data.label import (
    Decision,
    Label,
    decide,
    group_name,
    hand_out,
    signs_of,
    something,
)
from t2i_align.data.label_rules import LabelByOptions
from t2i_align.data.options import RecordOptions
from t2i_align.data.records import Item, Record
from t2i_align.data.source import Source, Stats
from t2i_align.errors import DataError
from t2i_align.options import Options

if TYPE_CHECKING:
    from rich.console import Console

    from t2i_align.evaluate.score_source import Entry
    from t2i_align.evaluate.score_store import ScoreStore


def file_stamp(media: Media) -> str | None:
    """Size and time of a medium that is still a file: numbers of another state are not used."""
    if not isinstance(media.data, Path):
        return None
    try:
        stat = media.data.stat()
    except OSError:
        return "missing"
    return f"{stat.st_size}:{stat.st_mtime_ns}"


class LabelledSource:
    """A source whose records hold what judges prefer (``data.label_by``).

    Args:
        source: gives the samples; what it says of them is ignored.
        options: the rule.
        folder: of the cache, where numbers are kept.
        console: where progress and the report of held-out judges go; None shows nothing.
    """

    Options: ClassVar[type[Options]] = LabelByOptions

    def __init__(
        self, source: Source, options: LabelByOptions, folder: Path, console: Console | None = None
    ) -> None:
        """Load no judge yet."""
        self.source, self.options, self.folder, self.console = source, options, folder, console
        self.stats = Stats()
        self._store: ScoreStore | None = None

    def count(self) -> int | None:
        """Records of the source; how many are labelled is known after the first pass only."""
        return self.source.count()

    def fingerprint(self) -> dict[str, Any]:
        """The source's, the rule, and the judges that decide with version and weights."""
        own = self.options.model_dump(mode="json", exclude={"report_judges"})
        deciding = {*self.options.judges, *self.options.gates}
        facts = [f.to_dict() for f in self._opened().identity.judges if f.name in deciding]
        return self.source.fingerprint() | {"label_by": own, "judges": facts}

    def __iter__(self) -> Iterator[Record]:
        """Score what is not scored yet, decide, stream the labelled records."""
        store = self._opened()
        numbers = {name: store.numbers(name) for name in self.options.every}
        decision = decide(self._groups(store), numbers, self.options)
        something(decision, self.options)
        self._report(store, decision)
        stats = self.stats = Stats(ties=decision.counts["ties"])
        for name in [*self.options.judges, *self.options.gates]:
            for why, times in store.reasons(name).items():
                stats.skip(f"{times} samples", f"{name}: {why}")
        stats.num_skipped = decision.counts["unscored"]
        for label, members in hand_out(self._checked(store), decision.labels):
            stats.read = self.source.stats.read
            values = decision.values[list(label.members)].tolist()
            yield record_of(label, members, values)
        stats.read = self.source.stats.read
        stats.num_skipped += self.source.stats.num_skipped
        stats.skipped += self.source.stats.skipped

    def _groups(self, store: ScoreStore) -> list[str]:
        """What each sample is compared within."""
        if self.options.group_by == "prompt":
            return [group_name(prompt) for prompt in store.texts("prompt")]
        return [group or "" for group in store.texts("group")]

    def _samples(self) -> Iterator[tuple[Entry, Item]]:
        """Every item of every record, with the record's name as its group."""
        from t2i_align.evaluate.score_source import Entry

        times: Counter[str] = Counter()
        for record in self.source:
            times[record.id] += 1  # two files may use the same ids
            own = record.id if times[record.id] == 1 else f"{record.id}~{times[record.id]}"
            for k, item in enumerate(record.items):
                stamp = file_stamp(item.media)
                name = f"{own}#{k}"
                yield Entry(name, item.media, item.prompt, group=own, stamp=stamp), item

    def _checked(self, store: ScoreStore) -> Iterator[Item]:
        """Items of the second pass.

        Raises:
            DataError: a file is not the one that was scored.
        """
        stamps = store.texts("stamp")
        for (entry, item), stamp in zip(self._samples(), stamps, strict=True):
            if entry.stamp != stamp:
                raise DataError(
                    f"{item.media.data} changed since it was labelled",
                    f"delete {store.folder} to label again",
                )
            yield item

    def _opened(self) -> ScoreStore:
        """The numbers, made if they are missing; judges are let go before training."""
        from t2i_align.evaluate import scoring
        from t2i_align.evaluate.score_store import ScoreStore

        if self._store is None:
            names = scoring.with_held_out(self.options.every)
            members = scoring.panel(names, dtype=self.options.dtype)
            signs_of([*self.options.judges, *self.options.gates])
            identity = scoring.identify(
                self.source.fingerprint(), members, dtype=self.options.dtype
            )
            store = ScoreStore(self.folder / identity.digest(), identity)
            if not store.complete:
                entries = (entry for entry, _ in self._samples())
                shown = self.console if self.console and self.console.is_terminal else None
                scoring.score_into(store, entries, members, console=shown, what="labelling")
                store.finish()
            del members
            _release()
            self._store = store
        return self._store

    def _report(self, store: ScoreStore, decision: Decision) -> None:
        """One line a judge, also to ``labels.json`` beside the numbers."""
        from t2i_align.data.label_files import write_report

        found = write_report(store, decision, self.options)
        if self.console is not None:
            counts = ", ".join(f"{v} {k}" for k, v in decision.counts.items() if v)
            self.console.print(f"labels by {', '.join(self.options.judges)}: {counts}")
            for line in found:
                self.console.print(f"  {line}", highlight=False)


def record_of(label: Label, items: Sequence[Item], values: Sequence[float]) -> Record:
    """A label as a record; items lose the label they came with.

    Args:
        label: what was decided.
        items: its members.
        values: the numbers that decided.
    """
    made = tuple(
        replace(item, label=label.label, value=value)
        for item, value in zip(items, values, strict=True)
    )
    return Record(label.id, label.kind, made, preference=label.preference, ranks=label.ranks)


def _release() -> None:
    """Give the judges' memory back."""
    import gc

    import torch

    from t2i_align.judges.base import load

    load.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build_source(
    cls: Any, options: RecordOptions, cache_dir: str, console: Console | None = None
) -> Source:
    """The source of a recipe with what its section asks for around it: judges' labels, shuffling.

    Args:
        cls: the source's class.
        options: the recipe's ``data`` section.
        cache_dir: the recipe's ``cache.dir``.
        console: for progress.
    """
    if options.label_by is None:
        source: Source = cls(options)
    else:
        # The file's own ties are samples like others.
        own = {"ties": "keep"} if "ties" in type(options).model_fields else {}
        folder = Path(cache_dir).expanduser() / "v1" / "labels"
        samples = cls(options.model_copy(update=own))
        source = LabelledSource(samples, options.label_by, folder, console)
    return ShuffledLabels(source) if options.shuffle_labels else source
