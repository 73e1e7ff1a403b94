"""Published sets of human preferences, read as they are distributed.

    pickapic     parquet: caption, jpg_0, jpg_1, label_0 (1, 0, or 0.5 for a tie)[, has_label]
    hpdv2        test.json: prompt, image_path, rank (1 is best); pictures in test/
    imagereward  test.json: prompt, generations, ranking (1 is best, with ties); test_images/
    hpdv3        test.json: prompt, path1 (preferred), path2; pictures in images/ or as written
    mjbench      <split>.parquet or .json: caption, image0, image1, label (0 or 1: the better)
    mmrb2        t2i.json: pairs with prompt_content, response_a, response_b, chosen (A or B)
    genai_bench  genai_image.json: prompt, models -> ratings of three people; <model>/<id>.jpeg;
                 genai_skills.json, where it is there: skill -> prompts

The pictures of HPDv2 and ImageReward are ranked, those of GenAI-Bench rated: every two of a prompt
make a pair. Two grades of GenAI-Bench's table are misprints (41 and 33 on a scale of 1 to 5): they
are left out of their picture's mean, which t2v_metrics takes as it stands. Where a set is published
is said when its file is missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from os.path import isfile
from pathlib import Path
from typing import Any

from t2i_align.contract import Media, MediaError
from t2i_align.data.media import cell_media, is_inside
from t2i_align.data.options import FileOptions
from t2i_align.data.rows import Row, Rows, find_files
from t2i_align.errors import DataError, UserError
from t2i_align.plain_json import loads
from t2i_align.registry import nearest

Pairs = tuple[tuple[int, int, int], ...]
GRADES = range(1, 6)


@dataclass(frozen=True)
class Group:
    """Pictures of one prompt and how people compared them.

    Args:
        name: of the row, stable.
        prompt: the text.
        media: the pictures, not read yet where they are files.
        pairs: (i, j, H): H is 1 where picture i is better, -1 where j is, 0 for a tie.
        ratings: a mean rating a picture, where people rated.
        parts: of the set that are also reported apart, e.g. the skills a prompt needs.
    """

    name: str
    prompt: str
    media: tuple[Media, ...]
    pairs: Pairs
    ratings: tuple[float, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A published set.

    Args:
        read: (folder or file, split) to its groups.
        rule: the tie rule of its own evaluation, see tie_rules.py.
        averaged: over ``pairs``, or over ``prompts`` first within each.
        both_orders: whether its evaluation shows every pair in both orders.
        source: where it is published.
    """

    read: Callable[[Path, str], Iterator[Group]]
    rule: str
    source: str
    averaged: str = "pairs"
    both_orders: bool = False


Read = Callable[[Path, str], Iterator[Group]]


def _as_published(read: Read) -> Read:
    """The same reader; a file of other types than the published one is said to be so."""

    @wraps(read)
    def guarded(data: Path, split: str) -> Iterator[Group]:
        try:
            yield from read(data, split)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            fix = "download it again"
            raise DataError(f"{data}: not as published ({error!r})", fix) from error

    return guarded


def all_pairs(values: Sequence[float]) -> Pairs:
    """Every pair of items; the larger value is better, equal ones tie."""
    return tuple(
        (i, j, (values[i] > values[j]) - (values[i] < values[j]))
        for i, j in itertools.combinations(range(len(values)), 2)
    )


@_as_published
def _pickapic(data: Path, split: str) -> Iterator[Group]:
    columns = ("caption", "jpg_0", "jpg_1", "label_0")
    for row in Rows(_split(data, split), columns, ("has_label",)):
        label = row.cells["label_0"]
        if label is None or row.cells.get("has_label") is False:
            continue
        if label not in (0, 0.5, 1):
            raise DataError(f"{row.name}: label_0 is {label!r}; allowed: 0, 0.5, 1")
        media = tuple(_cell(row, name) for name in ("jpg_0", "jpg_1"))
        yield Group(row.name, row.cells["caption"], media, ((0, 1, int(2 * label - 1)),))


@_as_published
def _hpdv2(data: Path, split: str) -> Iterator[Group]:
    return _ranked(_file(data, f"{split}.json", "hpdv2"), "image_path", "rank", ("test",))


@_as_published
def _imagereward(data: Path, split: str) -> Iterator[Group]:
    file = _file(data, f"{split}.json", "imagereward")
    return _ranked(file, "generations", "ranking", ("test_images",))


def _ranked(file: Path, paths: str, ranks: str, folders: Sequence[str]) -> Iterator[Group]:
    """Rows of a prompt, its pictures and their ranks, 1 for the best."""
    for row in _rows(file, ("prompt", paths, ranks)):
        names, order = row.cells[paths], row.cells[ranks]
        if len(names) != len(order):
            raise DataError(f"{row.name}: {len(names)} pictures and {len(order)} ranks")
        media = tuple(_picture(file.parent, name, folders) for name in names)
        yield Group(row.name, row.cells["prompt"], media, all_pairs([-rank for rank in order]))


@_as_published
def _hpdv3(data: Path, split: str) -> Iterator[Group]:
    file = _file(data, f"{split}.json", "hpdv3")
    for row in _rows(file, ("prompt", "path1", "path2")):
        names = (row.cells["path1"], row.cells["path2"])
        media = tuple(_picture(file.parent, name, ("images",)) for name in names)
        yield Group(row.name, row.cells["prompt"], media, ((0, 1, 1),))


@_as_published
def _mjbench(data: Path, split: str) -> Iterator[Group]:
    for row in Rows(_split(data, split), ("caption", "image0", "image1", "label")):
        label = str(row.cells["label"])
        if label not in ("0", "1"):
            raise DataError(f"{row.name}: label is {label!r}; allowed: 0, 1 (the better image)")
        media = tuple(_cell(row, name) for name in ("image0", "image1"))
        yield Group(row.name, row.cells["caption"], media, ((0, 1, 1 if label == "0" else -1),))


@_as_published
def _mmrb2(data: Path, split: str) -> Iterator[Group]:
    file = _file(data, f"{split}.json", "mmrb2")
    for number, pair in enumerate(_json(file, "pairs")):
        where = f"{file}, pair {pair.get('id', number)}"
        if pair.get("chosen") not in ("A", "B"):
            raise DataError(f"{where}: chosen is {pair.get('chosen')!r}; allowed: A, B")
        if "prompt_content" not in pair:
            raise DataError(
                f"{where} has no prompt_content",
                "the *_response_only.json files lack prompts; run the benchmark's build first",
            )
        if any(kind != "text" for kind, _ in pair["prompt_content"]):
            raise DataError(f"{where}: its prompt has images; only text-to-image is read")
        prompt = "\n".join(text for _, text in pair["prompt_content"])
        media = tuple(
            _picture(file.parent, _only_image(pair[key], where), ("images",))
            for key in ("response_a", "response_b")
        )
        sign = 1 if pair["chosen"] == "A" else -1
        yield Group(str(pair.get("id", number)), prompt, media, ((0, 1, sign),))


def _only_image(response: dict[str, Any], where: str) -> str:
    images = [name for kind, name in response["response_content"] if kind == "image"]
    if len(images) != 1:
        raise DataError(f"{where}: a response has {len(images)} images; only text-to-image is read")
    return images[0]


@_as_published
def _genai_bench(data: Path, split: str) -> Iterator[Group]:
    file = _file(data, "genai_image.json", "genai_bench")
    table = rated_prompts(file)
    skills = _skills(file.with_name("genai_skills.json"), list(table))
    for name, row in table.items():
        means = tuple(mean_grade(g, f"{file}, {name}") for g in row["models"].values())
        media = tuple(_picture(file.parent, f"{m}/{name}.jpeg", ()) for m in row["models"])
        own = tuple(s for s, numbers in skills.items() if int(name) in numbers)
        yield Group(name, row["prompt"], media, all_pairs(means), means, own)


def _skills(file: Path, ids: Sequence[str]) -> dict[str, set[int]]:
    """Numbers of the prompts of each skill; none without the file."""
    from t2i_align.evaluate.metrics.genai import read_skills

    if not file.is_file():
        return {}
    found = read_skills(_json(file, None), ids, str(file))
    return {skill: set(numbers) for skill, numbers in found.items()}


def mean_grade(grades: Sequence[int], where: str) -> float:
    """Mean of the grades that lie on the scale.

    Raises:
        DataError: none does.
    """
    valid = [g for g in grades if g in GRADES]
    if not valid:
        raise DataError(f"{where}: no grade from 1 to 5 in {list(grades)}")
    return sum(valid) / len(valid)


def rated_prompts(file: Path) -> dict[str, Any]:
    """GenAI-Bench's own table: id -> {prompt, models: model -> ratings}."""
    table = _json(file, None)
    if not isinstance(table, dict) or not all("models" in row for row in table.values()):
        raise DataError(f"{file}: not GenAI-Bench's table {{id: {{prompt, models}}}}")
    return table


def _split(data: Path, split: str) -> FileOptions:
    """The files of one split; never another one's.

    Raises:
        DataError: several files, and none is named after the split.
    """
    options = FileOptions.model_validate({"path": str(data), "split": split})
    names = [file.name for file in find_files(options)]
    if len(names) > 1 and not all(split in name for name in names):
        raise DataError(
            f"{data}: no file is named after the split '{split}'; there are {', '.join(names[:5])}",
            "give the file itself, or another --split",
        )
    return options


def _rows(file: Path, required: tuple[str, ...]) -> Rows:
    return Rows(FileOptions.model_validate({"path": str(file)}), required)


def _cell(row: Row, name: str) -> Media:
    """A cell's picture; what is no picture fails when it is judged, and is counted there."""
    try:
        return cell_media("image", row.cells[name], row.folder)
    except MediaError:
        return Media("image", b"")


def _picture(root: Path, name: str, folders: Sequence[str]) -> Media:
    """A picture beside the annotations or in one of the folders they are unpacked to."""
    places = [root / name, *(root / folder / name for folder in folders)]
    inside = [p for p in places if is_inside(p, root)]
    if not inside:
        return Media("image", b"")  # as :func:`_cell`
    return Media("image", next((p for p in inside if isfile(p)), inside[0]))


def _file(data: Path, name: str, layout: str) -> Path:
    """The annotations, given themselves or by their folder.

    Raises:
        DataError: not there; says where they are published.
    """
    path = data / name if data.is_dir() else data
    if not path.is_file():
        raise DataError(
            f"no {name} at {data}",
            f"give the folder that holds it or the file; published as {LAYOUTS[layout].source}",
        )
    return path


def _json(file: Path, key: str | None) -> Any:
    try:
        value = loads(file.read_text(encoding="utf-8"))
        return value if key is None else value[key]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{file}: not as published ({error})", "download it again") from error


LAYOUTS: dict[str, Layout] = {
    "pickapic": Layout(_pickapic, "pickapic", "hub data set yuvalkirstain/pickapic_v1 (test)"),
    "hpdv2": Layout(_hpdv2, "inversions", "hub data set ymhao/HPDv2", averaged="prompts"),
    "imagereward": Layout(_imagereward, "drop", "github.com/THUDM/ImageReward, data/test.json"),
    "hpdv3": Layout(_hpdv3, "drop", "hub data set MizzenAI/HPDv3"),
    "mjbench": Layout(_mjbench, "strict", "hub data set MJ-Bench/MJ-Bench (gated)"),
    "mmrb2": Layout(
        _mmrb2, "strict", "github.com/facebookresearch/MMRB2, benchmark/", both_orders=True
    ),
    "genai_bench": Layout(_genai_bench, "three_way", "hub data set BaiqiL/GenAI-Bench-1600"),
}
SPLITS = {"mjbench": "alignment", "mmrb2": "t2i"}  # "test" elsewhere


def layout_of(name: str) -> Layout:
    """A layout by name.

    Raises:
        UserError: unknown; lists what there is and the nearest match.
    """
    if name not in LAYOUTS:
        hint = nearest(name, list(LAYOUTS))
        raise UserError(f"unknown judge benchmark '{name}'; known: {', '.join(LAYOUTS)}", hint)
    return LAYOUTS[name]
