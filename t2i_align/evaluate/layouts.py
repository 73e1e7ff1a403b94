"""Where the pictures of ``--images`` lie: our own folders, or as a benchmark's users have them.

    folders      <id>/samples/<number>.png          GenEval's, and what `eval --model` writes
    flat         <id>.png                           one picture a prompt, e.g. DPG-Bench's grids
    numbered     <id>_<number>.png                  UniGenBench's
    samples      [<category>/]samples/<prompt>_<running number>.png     T2I-CompBench's
    styles       <style>/<index>.jpg                HPS v2's
    lines        image/<line>.jpg, from 1           GenEval++'s

Numbers count from 0 and may have leading zeros or not; a picture may be PNG, JPEG or WebP, although
GenEval's own reader passes over everything but PNG without a word. The layout is told by which
names are there. Where names of two layouts are there nothing is guessed.

T2I-CompBench's running number goes through a whole category, so the k-th picture of a prompt is the
one with its k-th smallest number. The prompt is what stands before the last underscore.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from t2i_align.errors import DataError
from t2i_align.evaluate.benchmark import Picture
from t2i_align.evaluate.pictures import SUFFIXES, check_prompts

DEPTH = 3  # folders and the name, of the deepest layout
Files = Mapping[str, Sequence[Path]]
Names = Iterator[list[str]]


@dataclass(frozen=True)
class Layout:
    """One way to name pictures.

    Args:
        name: short.
        pattern: how names are built, for people.
        names: of the pictures in order: the names each may have, without their ending.
        one: whether it holds one picture a prompt only.
    """

    name: str
    pattern: str
    names: Callable[[Sequence[Picture], Files], Names]
    one: bool = False


def spelled(text: str) -> list[str]:
    """A number with its leading zeros and without; another text as it is."""
    return list(dict.fromkeys((text, str(int(text))))) if text.isdecimal() else [text]


def _folders(pictures: Sequence[Picture], files: Files) -> Names:
    for picture in pictures:
        numbers = dict.fromkeys(f"{picture.number:0{width}d}" for width in (4, 5, 1))
        yield [f"{picture.item.id}/samples/{number}" for number in numbers]


def _flat(pictures: Sequence[Picture], files: Files) -> Names:
    return (spelled(p.item.id) for p in pictures)


def _numbered(pictures: Sequence[Picture], files: Files) -> Names:
    return ([f"{name}_{p.number}" for name in spelled(p.item.id)] for p in pictures)


def _styles(pictures: Sequence[Picture], files: Files) -> Names:
    for picture in pictures:
        style, index = (picture.item.metadata[key] for key in ("style", "index"))
        yield [f"{style}/{index:05d}"] if picture.number == 0 else []


def _lines(pictures: Sequence[Picture], files: Files) -> Names:
    lines = (int(p.item.id) + 1 for p in pictures)
    return ([f"image/{line}", f"{line}"] for line in lines)


def _samples(pictures: Sequence[Picture], files: Files) -> Names:
    """Names of a prompt's files by their number; with one category its folder may be left out."""
    single = len({p.item.task for p in pictures}) == 1
    found: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for name in files:
        folder, _, last = name.rpartition("/")
        prompt, _, number = last.rpartition("_")
        if number.isdecimal():
            found[folder, prompt].append((int(number), name))
    ordered = {key: [name for _, name in sorted(names)] for key, names in found.items()}
    for picture in pictures:
        item = picture.item
        folders = [f"{item.task}/samples"] + (["samples"] if single else [])
        lists = [ordered.get((folder, item.prompt), []) for folder in folders]
        yield [names[picture.number] for names in lists if picture.number < len(names)]


FOLDERS = Layout("folders", "<id>/samples/0000.png", _folders)
COMMON = (
    FOLDERS,
    Layout("flat", "<id>.png", _flat, one=True),
    Layout("numbered", "<id>_<number>.png", _numbered),
)
OWN: dict[str, tuple[Layout, ...]] = {
    # no flat names: 1.jpg is the first line here, not the prompt with the id 1
    "geneval_plus_plus": (FOLDERS, Layout("lines", "image/<line>.jpg, from 1", _lines, one=True)),
    "hpsv2_bench": (*COMMON, Layout("styles", "<style>/<index>.jpg", _styles, one=True)),
    "t2i_compbench": (
        *COMMON,
        Layout("samples", "<category>/samples/<prompt>_<running number>.png", _samples),
    ),
}


def layouts(benchmark: str) -> tuple[Layout, ...]:
    """What is read of a benchmark."""
    return OWN.get(benchmark, COMMON)


def pictures_in(folder: Path) -> dict[str, list[Path]]:
    """Picture files by their name below a folder, without its ending, at most three deep.

    Links to folders are followed, as the user put them there.
    """
    found: dict[str, list[Path]] = {}
    for here, inside, names in os.walk(folder, followlinks=True):
        below = Path(here).relative_to(folder)
        if len(below.parts) == DEPTH - 1:
            inside.clear()
        inside.sort()
        for name in sorted(names):
            stem, dot, ending = name.rpartition(".")
            if f"{dot}{ending}".lower() in SUFFIXES and stem:
                found.setdefault((below / stem).as_posix(), []).append(Path(here) / name)
    return found


def located(
    pictures: Sequence[Picture], folder: Path, benchmark: str
) -> tuple[Layout | None, list[Picture]]:
    """The layout of a folder, and the pictures with the files that are there.

    Args:
        pictures: that are asked for.
        folder: of the user.
        benchmark: whose names may be used.

    Returns:
        The layout, None where no asked picture is there, and the pictures; absent ones unchanged.

    Raises:
        DataError: names of two layouts, two files of one picture, one picture a prompt where
            several are asked for, or pictures of other prompts.
    """
    files = pictures_in(folder)
    known = [(layout, list(layout.names(pictures, files))) for layout in layouts(benchmark)]
    fits = [
        (layout, n) for layout, n in known if any(name in files for names in n for name in names)
    ]
    if len(fits) > 1:
        shown = " and ".join(f"{layout.pattern} ({_first(n, files)})" for layout, n in fits)
        raise DataError(
            f"--images: {folder} holds pictures named in two ways: {shown}",
            "give a folder with one of them",
        )
    if not fits or fits[0][0] is FOLDERS:
        check_prompts(pictures)
    if not fits:
        return None, list(pictures)
    layout, names = fits[0]
    _check_count(layout, pictures, folder, benchmark)
    return layout, [_with_file(p, n, files) for p, n in zip(pictures, names, strict=True)]


def _first(names: Sequence[Sequence[str]], files: Files) -> str:
    """The first file that a layout finds, as an example."""
    return next(files[name][0].name for some in names for name in some if name in files)


def _check_count(layout: Layout, pictures: Sequence[Picture], folder: Path, benchmark: str) -> None:
    """Refuse one picture a prompt where several are asked for."""
    count = 1 + max(p.number for p in pictures)
    if layout.one and count > 1:
        grid = "; for 2 x 2 grids --set grid=true" if benchmark == "dpg_bench" else ""
        raise DataError(
            f"--images: {folder} holds {layout.pattern}, one picture a prompt; {count} are asked "
            "for",
            f"where one is meant: --set images_per_prompt=1{grid}",
        )


def _with_file(picture: Picture, names: Sequence[str], files: Files) -> Picture:
    """A picture with its file.

    Raises:
        DataError: there are two.
    """
    there = [file for name in names for file in files.get(name, ())]
    if len(there) > 1:
        raise DataError(f"--images: {there[0]} and {there[1].name} are one picture's files")
    return replace(picture, file=there[0]) if there else picture


def none_found(folder: Path, benchmark: str) -> DataError:
    """What is said where no picture is found."""
    known = "; ".join(layout.pattern for layout in layouts(benchmark))
    return DataError(f"--images: {folder} holds no picture of '{benchmark}'", f"it needs {known}")
