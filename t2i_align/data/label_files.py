"""Labels as parquet files that the suite's sources read, and what judges say of them.

    pairs    Pick-a-Pic's columns (``type: pickapic``): the earlier sample is jpg_0, label_0 is 1, 0
             or 0.5; ``<judge>_0`` and ``<judge>_1`` beside them
    ranked   prompt, images, ranks, values, id (``type: ranked``)
    binary   prompt, image, label, value, id (``type: binary``)

A held-out judge takes no part in a decision. Its agreement is the share of decided pairs it orders
the same way, a tie counts half; of ranks the first of the best against the first of the worst.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2i_align.contract import MediaError
from t2i_align.data.cache import atomic
from t2i_align.data.label_rules import PAIR_RULES, RuleOptions
from t2i_align.data.media import resolve
from t2i_align.errors import DataError

if TYPE_CHECKING:
    from t2i_align.data.label import Decision, Label
    from t2i_align.evaluate.score_source import Entry
    from t2i_align.evaluate.score_store import ScoreStore

FLUSH_BYTES = 32 * 2**20


def write_labels(
    path: Path,
    entries: Iterable[Entry],
    decision: Decision,
    store: ScoreStore,
    options: RuleOptions,
) -> int:
    """Write what was decided; an older file is replaced when the new one is whole.

    Args:
        path: the parquet file.
        entries: the stream the decision counts.
        decision: of the rule.
        store: the judges' numbers, written beside the media.
        options: the rule, kept in the file's metadata.

    Returns:
        How many rows were written.

    Raises:
        DataError: a picture that was scored cannot be read any more.
        StorageError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = {name: store.numbers(name) for name in store.identity.names}
    about = {"rule": options.model_dump(mode="json"), "scores": store.identity.to_dict()}
    metadata = {"t2i_align.labels": json.dumps(about, sort_keys=True)}
    schema = pa.schema(_fields(options, list(numbers)), metadata=metadata)
    written = 0
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for part in _chunks(_rows(entries, decision, numbers)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
            written += len(part)
    return written


def _fields(options: RuleOptions, judges: list[str]) -> list[tuple[str, Any]]:
    import pyarrow as pa

    text, number, data = pa.string(), pa.float64(), pa.binary()
    if options.rule in PAIR_RULES:
        fields = [("caption", text), ("jpg_0", data), ("jpg_1", data)]
        fields += [("label_0", number), ("label_1", number), ("has_label", pa.bool_())]
        fields += [("ranking_id", text), ("image_0_uid", text), ("image_1_uid", text)]
        return fields + [(f"{name}_{k}", number) for name in judges for k in (0, 1)]
    if options.rule == "ranked":
        fields = [("id", text), ("prompt", text), ("images", pa.list_(data))]
        fields += [("ranks", pa.list_(pa.int64())), ("values", pa.list_(number))]
        fields += [("files", pa.list_(text))]
        return fields + [(name, pa.list_(number)) for name in judges]
    fields = [("id", text), ("prompt", text), ("image", data), ("label", pa.int64())]
    fields += [("value", number), ("file", text)]
    return fields + [(name, number) for name in judges]


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows in lists of some :data:`FLUSH_BYTES` of media."""
    part: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        part.append(row)
        media = [row.get("jpg_0"), row.get("jpg_1"), row.get("image"), *row.get("images", ())]
        size += sum(len(data) for data in media if data)
        if size >= FLUSH_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _rows(
    entries: Iterable[Entry], decision: Decision, numbers: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    from t2i_align.data.label import hand_out

    make = {"pair": _pair, "ranked": _ranked, "binary": _binary}
    for label, members in hand_out(entries, decision.labels):
        at = sorted(zip(label.members, members, strict=True), key=lambda x: x[0])
        said = {name: column[[k for k, _ in at]].tolist() for name, column in numbers.items()}
        said = {n: [None if np.isnan(v) else v for v in values] for n, values in said.items()}
        values = decision.values[[k for k, _ in at]].tolist()
        yield make[label.kind](label, [e for _, e in at], said, values)


Said = dict[str, list[float | None]]


def _pair(label: Label, entries: list[Entry], said: Said, values: list[float]) -> dict[str, Any]:
    first = label.preference if label.members[0] < label.members[1] else 1 - label.preference
    return {
        "caption": entries[0].prompt,
        "jpg_0": _data(entries[0]),
        "jpg_1": _data(entries[1]),
        "label_0": first,
        "label_1": 1 - first,
        "has_label": True,
        "ranking_id": label.id,
        "image_0_uid": entries[0].name,
        "image_1_uid": entries[1].name,
    } | {f"{name}_{k}": column[k] for name, column in said.items() for k in (0, 1)}


def _ranked(label: Label, entries: list[Entry], said: Said, values: list[float]) -> dict[str, Any]:
    assert label.ranks is not None
    return {
        "id": label.id,
        "prompt": entries[0].prompt,
        "images": [_data(entry) for entry in entries],
        "ranks": list(label.ranks),  # members of a ranking are in the order of the stream
        "values": values,
        "files": [entry.name for entry in entries],
    } | said


def _binary(label: Label, entries: list[Entry], said: Said, values: list[float]) -> dict[str, Any]:
    (entry,) = entries
    made = {"id": label.id, "prompt": entry.prompt, "image": _data(entry), "label": label.label}
    made |= {"value": values[0], "file": entry.name}
    return made | {name: column[0] for name, column in said.items()}


def _data(entry: Entry) -> bytes:
    try:
        return resolve(entry.media).data
    except MediaError as error:
        raise DataError(f"{entry.name} cannot be read any more: {error}", "run again") from error


def report(store: ScoreStore, decision: Decision, options: RuleOptions) -> dict[str, Any]:
    """What every judge says of the labels, the held-out ones apart.

    Returns:
        By judge: ``held_out``; of pairs and ranks ``agreement`` {mean, low, high, pairs} and the
        means of ``chosen`` and ``rejected``; of binary labels the means of ``good`` and ``bad``.
    """
    prompts = store.texts("prompt")
    deciding = {*options.judges, *options.gates}
    found = {}
    for name in store.identity.names:
        numbers = store.numbers(name)
        line: dict[str, Any] = {"held_out": name not in deciding}
        if options.rule == "binary":
            for kind, label in (("good", 1), ("bad", -1)):
                line[kind] = _mean(
                    [numbers[x.members[0]] for x in decision.labels if x.label == label]
                )
        else:
            line |= _agreement(name, numbers, decision.labels, prompts)
        found[name] = line
    return {"counts": decision.counts, "judges": found}


def _agreement(
    name: str, numbers: np.ndarray, labels: Sequence[Label], prompts: Sequence[str | None]
) -> dict[str, Any]:
    from t2i_align.data.label import SIGNS
    from t2i_align.evaluate.aggregate import bootstrap_mean
    from t2i_align.judges.base import judge_card

    sign = SIGNS.get(judge_card(name).direction or "", 1.0)
    pairs = [ends for label in labels if (ends := _ends(label)) is not None]
    chosen, rejected = (numbers[[pair[k] for pair in pairs]] for k in (0, 1))
    known = ~np.isnan(chosen) & ~np.isnan(rejected)
    wins = (1 + np.sign(sign * (chosen - rejected)[known])) / 2
    of = np.array([prompts[pair[0]] or "" for pair in pairs])[known]
    line: dict[str, Any] = {"mean": _mean(wins), "low": None, "high": None}
    if len(set(of)) > 1:
        line = asdict(bootstrap_mean(wins, of))
    means = {"chosen": _mean(chosen[known]), "rejected": _mean(rejected[known])}
    return {"agreement": line | {"pairs": len(wins)}} | means


def _ends(label: Label) -> tuple[int, int] | None:
    """(chosen, rejected) of a label; None of a tie."""
    if label.kind == "pair":
        return (label.members[0], label.members[1]) if label.preference > 0.5 else None
    assert label.ranks is not None
    best, worst = label.ranks.index(0), label.ranks.index(max(label.ranks))
    return label.members[best], label.members[worst]


def _mean(values: Any) -> float | None:
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else None


def report_lines(found: dict[str, Any]) -> list[str]:
    """The report as a line a judge."""
    lines = []
    for name, line in found["judges"].items():
        role = "held out" if line["held_out"] else "decides"
        if "agreement" in line:
            a = line["agreement"]
            span = "" if a["low"] is None else f" [{a['low']:.3f}, {a['high']:.3f}]"
            mean = "none" if a["mean"] is None else f"{a['mean']:.3f}"
            says = f"agrees with {mean}{span} of {a['pairs']} pairs; "
            says += f"chosen {_text(line['chosen'])}, rejected {_text(line['rejected'])}"
        else:
            says = f"good {_text(line['good'])}, bad {_text(line['bad'])}"
        lines.append(f"{name} ({role}): {says}")
    return lines


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def write_report(store: ScoreStore, decision: Decision, options: RuleOptions) -> list[str]:
    """The report beside the numbers, as ``labels.json``; its lines."""
    found = report(store, decision, options)
    with atomic(store.folder / "labels.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return report_lines(found)
