"""Asking judges about a stream of pictures, and what is said of the answers.

    pictures (score_source.py) -> batches -> every judge -> parts on disk (score_store.py)

Memory is that of one batch, plus eight bytes a number where means are taken. A picture that cannot
be scored has no number and a reason; it is counted and never averaged as 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.errors import InterruptedRun, UserError
from t2i_align.evaluate.score_source import Entry
from t2i_align.evaluate.score_store import (
    Identity,
    ScoredRow,
    ScoreStore,
    write_csv,
    write_jsonl,
    write_parquet,
)

if TYPE_CHECKING:
    from rich.console import Console

    from t2i_align.judges.base import Judge, Normalize
    from t2i_align.judges.facts import JudgeFacts

__all__ = ["write_csv", "write_jsonl", "write_parquet"]
BATCH = 64


@dataclass(frozen=True)
class Member:
    """A loaded judge.

    Args:
        facts: what its numbers come from.
        judge: built.
        scale: puts its numbers on the common scale, None to leave them.
    """

    facts: JudgeFacts
    judge: Judge
    scale: Normalize | None

    @property
    def name(self) -> str:
        """Of its card."""
        return self.facts.name


def with_held_out(names: Sequence[str]) -> list[str]:
    """Judges by name, each once, an ensemble followed by the judges it holds out.

    Raises:
        UserError: unknown judge.
    """
    from t2i_align.judges.base import judge_card

    found: list[str] = []
    for name in names:
        found += [name, *judge_card(name).details.get("options", {}).get("held_out", [])]
    return list(dict.fromkeys(found))


def panel(
    names: Sequence[str],
    *,
    device: str | None = None,
    dtype: str = "float32",
    normalized: bool = False,
) -> list[Member]:
    """Judges by name, each once and loaded.

    Raises:
        UserError: unknown judge, nothing to normalise with, or a rule over whole groups.
        ModelError: its weights are missing.
    """
    import torch

    from t2i_align.judges.base import judge_card, load, normalizer
    from t2i_align.judges.ensemble import Ensemble
    from t2i_align.judges.facts import facts_of

    cards = [judge_card(name) for name in dict.fromkeys(names)]  # a typo is told before any work
    scales = [normalizer(card) if normalized else None for card in cards]
    where = device_of(device)
    members = []
    for card, scale in zip(cards, scales, strict=True):
        judge = load(card.name, where, getattr(torch, dtype))
        if isinstance(judge, Ensemble) and judge.options.rule == "rank":
            raise UserError(
                f"'{card.name}' ranks all samples of a prompt, and pictures are scored in batches",
                "score its members, or use another rule",
            )
        members.append(Member(facts_of(card.name, judge), judge, scale))
    return members


def device_of(name: str | None) -> str:
    """A device by name; a GPU if there is one when None.

    Raises:
        UserError: not a device of this machine.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"device '{name}' cannot be used: {first}", "e.g. cpu, cuda:0") from error
    return name


def identify(
    source: Mapping[str, Any],
    members: Sequence[Member],
    *,
    device: str | None = None,
    dtype: str = "float32",
) -> Identity:
    """All that the numbers of a call depend on.

    Args:
        source: fingerprint of the pictures.
        members: the judges.
        device: as given to :func:`panel`.
        dtype: likewise.
    """
    settings = {
        "device": device_of(device).partition(":")[0],
        "dtype": dtype,
        "batch": BATCH,
        "normalized": any(m.scale is not None for m in members),
    }
    return Identity(source, tuple(m.facts for m in members), settings)


def judged(members: Sequence[Member], entries: Sequence[Entry]) -> list[ScoredRow]:
    """What every judge says of a batch.

    Raises:
        UserError: a judge behind an address is not there; its answers would all be missing.
    """
    media, prompts = [e.media for e in entries], [e.prompt or "" for e in entries]
    columns = []
    for member in members:
        found = member.judge.score(media, prompts).kept(member.name)
        values = found.values if member.scale is None else member.scale(found.values)
        columns.append(list(zip(values.tolist(), found.reasons, strict=True)))
    rows = []
    for i, entry in enumerate(entries):
        reasons = [entry.problem or column[i][1] for column in columns]
        values = [None if why else c[i][0] for why, c in zip(reasons, columns, strict=True)]
        rows.append(ScoredRow(entry.name, entry.prompt, values, reasons, entry.group, entry.stamp))
    return rows


def score_into(
    store: ScoreStore,
    entries: Iterable[Entry],
    members: Sequence[Member],
    *,
    total: int | None = None,
    console: Console | None = None,
    what: str = "scoring",
) -> None:
    """Score what a store does not hold yet.

    Args:
        store: rows go there; those it has are passed over.
        entries: all pictures, in the order of the store.
        members: the judges of the store's columns.
        total: how many there are, for the bar.
        console: None shows nothing.
        what: the bar's name.

    Raises:
        InterruptedRun: Ctrl-C; what was scored is kept.
    """
    from t2i_align.progress import progress

    done = len(store)  # a multiple of BATCH or all: numbers do not depend on where a call stopped
    rest = itertools.islice(entries, done, None)
    try:
        with progress(console, what, total, done=done) as bar:
            while part := list(itertools.islice(rest, BATCH)):
                store.add(judged(members, part))
                bar.advance(len(part))
    except KeyboardInterrupt:
        raise InterruptedRun(
            f"stopped after {len(store)} pictures", "run the same command again to continue"
        ) from None
    finally:
        store.flush()


@contextmanager
def working_store(identity: Identity, outputs: Sequence[Path]) -> Iterator[ScoreStore]:
    """The parts of a call: beside its first output, so that a later call finds them, or temporary.

    They are deleted when the block ends well.

    Args:
        identity: of the rows.
        outputs: files the call will write.
    """
    import tempfile

    if not outputs:
        with tempfile.TemporaryDirectory() as folder:
            yield ScoreStore(Path(folder) / "parts", identity)
        return
    folder = outputs[0].parent / f".{outputs[0].name}.parts-{identity.digest()}"
    store = ScoreStore(folder, identity)
    yield store
    store.remove()


def write(store: ScoreStore, outputs: Mapping[str, Path]) -> None:
    """All rows to files by kind: ``csv``, ``jsonl``, ``parquet``.

    Raises:
        StorageError: a file cannot be written; the parts are intact.
    """
    if "csv" in outputs:
        write_csv(outputs["csv"], store.rows())
    if "jsonl" in outputs:
        write_jsonl(outputs["jsonl"], store.rows())
    if "parquet" in outputs:
        write_parquet(outputs["parquet"], store.rows(), store.identity)


def totals(store: ScoreStore) -> dict[str, dict[str, Any]]:
    """Mean, scored and failed of each judge, and what its numbers come from."""
    import numpy as np

    found = {}
    for facts in store.identity.judges:
        values = store.numbers(facts.name)
        known = values[~np.isnan(values)]
        found[facts.name] = {
            "mean": math.fsum(known) / len(known) if len(known) else None,
            "scored": len(known),
            "failed": len(values) - len(known),
        }
    return found


def shown(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> list[dict[str, str]]:
    """Rows for a terminal: a reason column only where something failed.

    Args:
        rows: public rows of a store, those to show.
        names: of the judges.
    """
    some = list(rows)
    columns = ["file", "prompt", *names]
    if any(row["reason"] for row in some):
        columns.append("reason")
    return [{k: number(row[k]) for k in columns} for row in some]


def number(value: float | str | None) -> str:
    """Four decimals, text as it is, NaN for what has no number."""
    if value is None:
        return "NaN"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
