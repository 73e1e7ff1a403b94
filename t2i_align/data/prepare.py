"""One streaming pass from a source to a cache: decode, encode what is new, write the manifest.

    <cache.dir>/v1/media-<hash of media_key, dtype>/    encoded media by content (and bucket)
    <cache.dir>/v1/text-<hash of text_key, dtype>/      encoded prompts by content
    <cache.dir>/v1/manifests/<hash>.arrow, .json        the records of a source and layout, report

Keys name content, never hyper-parameters, so another objective, learning rate or subset of the data
re-encodes nothing. A build that was killed goes on where the last shard ended. With aspect buckets
(:mod:`t2i_align.data.buckets`) a record's bucket is decided here, by its winner's true size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from t2i_align.contract import Encoded, Layout, Media, MediaError
from t2i_align.data import manifest as manifests
from t2i_align.data.batch import Prepared, media_key, prompt_key
from t2i_align.data.buckets import Buckets, buckets_of, variant_at
from t2i_align.data.cache import DTYPES, TensorStore, make_folder
from t2i_align.data.encode import MediaQueue, PromptQueue
from t2i_align.data.manifest import Manifest, ManifestRow, Report, Writer, digest
from t2i_align.data.media import content_hash, resolve
from t2i_align.data.options import Pairing
from t2i_align.data.records import Record, as_layout
from t2i_align.data.source import MAX_NAMED, Source
from t2i_align.data.video import true_size
from t2i_align.errors import DataError, StorageError
from t2i_align.protocols import Generator

if TYPE_CHECKING:
    from rich.console import Console

VERSION = "v1"


class CacheSettings(Protocol):
    """What is asked of the recipe's ``cache`` section."""

    @property
    def dir(self) -> str:
        """Root folder."""
        ...

    @property
    def dtype(self) -> str:
        """Precision of floating tensors."""
        ...

    @property
    def encode_batch_size(self) -> int:
        """Media and prompts encoded at once."""
        ...


@dataclass
class _Build:
    """The state of one pass."""

    generator: Generator
    media: MediaQueue
    text: PromptQueue
    report: Report
    buckets: Buckets | None

    def drain(self) -> None:
        """Encode and store all that waits."""
        self.media.drain()
        self.text.drain()
        self.media.store.flush()
        self.text.store.flush()


def prepare(
    source: Source,
    generator: Generator,
    layout: Layout,
    cache: CacheSettings,
    *,
    pairing: Pairing = "best_worst",
    extra_prompts: Sequence[str] = ("",),
    console: Console | None = None,
) -> Prepared:
    """Make sure that all an objective of ``layout`` needs of a source is cached.

    Args:
        source: where records come from; not iterated when a complete manifest exists.
        generator: whose frozen encoders run, if anything is new.
        layout: what the objective needs.
        cache: the recipe's ``cache`` section.
        pairing: how rankings become pairs.
        extra_prompts: prompts to encode besides those of the records; "" serves caption dropout.
        console: where to show progress; None or not a terminal: nowhere.

    Raises:
        DataError: unreadable data, an impossible layout, or no usable record.
        ModelError: an encoder gave numbers that cannot be cached.
        StorageError: the disk is full; what was cached stays.
    """
    root = Path(cache.dir).expanduser() / VERSION
    build, spaces = _open(root, generator, cache)
    media, text = build.media.store, build.text.store
    identity: list[Any] = [manifests.FORMAT, source.fingerprint(), layout, pairing, spaces]
    if build.buckets is not None:
        identity.append(asdict(build.buckets))
    path = root / "manifests" / f"{digest(identity)}.arrow"
    with _keeping_work(build):
        for prompt in extra_prompts:
            build.text.add(prompt_key(prompt), prompt)
        found = manifests.load(path)
        settled = found is not None and found[1].num_skipped == 0 and not found[1].by_path
        if found is None or not settled or not _complete(found[0], generator, media, text):
            folders = [store.folder.name for store in (media, text)]
            writer = Writer(path, bucketed=build.buckets is not None, spaces=folders)
            _pass(source, layout, pairing, build, writer, console)
            found = manifests.load(path)
            assert found is not None, path
        build.drain()
    report = replace(
        found[1], encoded_media=build.media.num_encoded, encoded_prompts=build.text.num_encoded
    )
    return Prepared(generator, layout, found[0], media, text, report)


def spaces_of(generator: Generator, cache: CacheSettings) -> dict[str, str]:
    """The hashes that name a generator's folders ``media-...`` and ``text-...``."""
    return {
        "media": digest([generator.media_key(), cache.dtype]),
        "text": digest([generator.text_key(), cache.dtype]),
    }


def _open(root: Path, generator: Generator, cache: CacheSettings) -> tuple[_Build, dict[str, str]]:
    """A generator's stores with queues before them, and the hashes that name their folders."""
    spaces = spaces_of(generator, cache)
    media, text = (TensorStore(root / f"{kind}-{name}") for kind, name in spaces.items())
    make_folder(root / "manifests")
    dtype, size = DTYPES[cache.dtype], cache.encode_batch_size
    build = _Build(
        generator,
        MediaQueue(generator, media, dtype, size),
        PromptQueue(generator, text, dtype, size),
        Report(),
        buckets_of(generator),
    )
    return build, spaces


def _complete(
    manifest: Manifest, generator: Generator, media: TensorStore, text: TensorStore
) -> bool:
    """Whether the stores still hold all that a manifest names."""
    variants = generator.media_variants()
    return all(key in text for key in manifest.unique("prompt_keys")) and all(
        media_key(content, variant_at(size, variant)) in media
        for content, size in manifest.media()
        for variant in variants
    )


@contextmanager
def _keeping_work(build: _Build) -> Iterator[None]:
    """Store what is encoded already when a build stops half-way (Ctrl-C, an unreadable file)."""
    try:
        yield
    except StorageError:
        raise
    except BaseException:
        with suppress(StorageError):
            build.media.store.flush()
            build.text.store.flush()
        raise


def _pass(
    source: Source,
    layout: Layout,
    pairing: Pairing,
    build: _Build,
    writer: Writer,
    console: Console | None,
) -> None:
    """Stream the source once; the manifest appears only if all went well."""
    from t2i_align.progress import progress

    report = build.report
    shown = console if console is not None and console.is_terminal else None
    try:
        with progress(shown, "caching", source.count(), unit="records") as bar:
            for record in source:
                made = as_layout(record, layout, pairing)
                if not made and record.layout == "binary":
                    report.unused += 1
                elif not made:
                    report.ties += 1
                _add(made, build, writer)
                bar.reach(source.stats.read)
            build.drain()
        _finish(report, source, writer.num_rows, layout)
        writer.commit(report)
    finally:
        writer.discard()


def _add(records: list[Record], build: _Build, writer: Writer) -> None:
    """Queue what records need and list those that can be used; media they share are read once."""
    memo: dict[int, Media | MediaError] = {}
    for record in records:
        build.report.by_path |= any(isinstance(item.media.data, Path) for item in record.items)
        try:
            media = [_resolved(item.media, memo) for item in record.items]
            size, beyond = _bucket(record, media, build.buckets)
            loaded = _load(media, size, build)
        except MediaError as error:
            _skip(build.report, record.id, str(error))
            continue
        for key, encoded in loaded.items():
            build.media.add(key, record.id, encoded)
        prompts = [item.prompt for item in record.items]
        for prompt in prompts:
            build.text.add(prompt_key(prompt), prompt)
        _count(build.report, size, beyond=beyond)
        writer.add(_row(record, [m.meta["key"] for m in media], size))


def _resolved(media: Media, memo: dict[int, Media | MediaError]) -> Media:
    """A medium in memory, its content hash in ``meta["key"]``; a failure is remembered too."""
    if id(media) not in memo:
        try:
            whole = resolve(media)
            memo[id(media)] = replace(whole, meta={**whole.meta, "key": content_hash(whole)})
        except MediaError as error:
            memo[id(media)] = error
    found = memo[id(media)]
    if isinstance(found, MediaError):
        raise found
    return found


def bucket_counts(
    source: Source, layout: Layout, pairing: Pairing, buckets: Buckets, limit: int
) -> dict[str, int]:
    """Records in each bucket, of a source's first ``limit`` annotations; only headers are read."""
    report = Report()
    for record in itertools.islice(source, limit):
        for made in as_layout(record, layout, pairing):
            with suppress(MediaError):
                media = [resolve(item.media) for item in made.items]
                _count(report, _bucket(made, media, buckets)[0], beyond=False)
    return report.buckets


def _bucket(
    record: Record, media: Sequence[Media], buckets: Buckets | None
) -> tuple[list[int], bool]:
    """The size all of a record is fitted to, and whether its winner is beyond every bucket.

    Without buckets the size is empty: the generator's own.
    """
    if buckets is None:
        return [], False
    ranks = record.ranks or range(len(media))
    winner = min(range(len(media)), key=ranks.__getitem__)
    size = true_size(media[winner])
    return list(buckets.nearest(size)), buckets.beyond(size)


def _count(report: Report, size: list[int], *, beyond: bool) -> None:
    if size:
        name = variant_at(size, "")
        report.buckets[name] = report.buckets.get(name, 0) + 1
        report.beyond_aspect += beyond


def _load(media: Sequence[Media], size: list[int], build: _Build) -> dict[str, Encoded]:
    """What the encoder must see, by store key; raises before anything of the record is queued."""
    loaded: dict[str, Encoded] = {}
    for medium in media:
        for plain in build.generator.media_variants():
            variant = variant_at(size, plain)
            key = media_key(medium.meta["key"], variant)
            if key not in loaded and not build.media.holds(key):
                loaded[key] = build.generator.load_media(medium, variant)
    return loaded


def _row(record: Record, keys: list[str], size: list[int]) -> ManifestRow:
    prompts = [item.prompt for item in record.items]
    return ManifestRow(
        id=record.id,
        keys=keys,
        prompts=prompts,
        prompt_keys=[prompt_key(prompt) for prompt in prompts],
        preference=record.preference,
        labels=[item.label for item in record.items],
        ranks=list(record.ranks or ()),
        values=[item.value for item in record.items],
        weight=record.weight,
        size=size,
    )


def _skip(report: Report, record_id: str, reason: str) -> None:
    report.num_skipped += 1
    if len(report.skipped) < MAX_NAMED:
        report.skipped.append((record_id, reason))


def _finish(report: Report, source: Source, usable: int, layout: Layout) -> None:
    """Add the source's own counts.

    Raises:
        DataError: nothing usable; says where the records went.
    """
    stats = source.stats
    report.read, report.usable, report.no_label = stats.read, usable, stats.no_label
    report.ties += stats.ties
    report.num_skipped += stats.num_skipped
    report.skipped = (stats.skipped + report.skipped)[:MAX_NAMED]
    if usable == 0:
        raise _nothing_usable(report, layout, stats.ties)


def _nothing_usable(report: Report, layout: Layout, dropped: int) -> DataError:
    """Where the records went, most first, and what to do about the largest part."""
    parts = [
        (
            dropped,
            "ties dropped (data.ties: drop)",
            "set data.ties: keep (or first), or use data with preferences",
        ),
        (report.ties - dropped, "without a preference", "use data with preferences"),
        (report.no_label, "without a label", "use a split that has labels"),
        (report.unused, f"of no use for {layout}", "use data with items labelled good"),
        (
            report.num_skipped,
            "broken or missing",
            "are the media where the paths point, and whole?",
        ),
    ]
    parts = sorted((part for part in parts if part[0]), key=lambda part: -part[0])
    told = ", ".join(f"{count} {what}" for count, what, _ in parts)
    message = f"0 usable {layout} of {report.read} records" + (f": {told}" if told else "")
    for name, reason in report.skipped[:5]:
        message += f"\n    {name}: {reason}"
    return DataError(message, parts[0][2] if parts else "is data.path the right file?")
