"""Every shipped recipe, spoiled in every way of tests/mutations.py.

Each case is refused with the place and the key, or accepted, and then what the file says stands in
the resolved recipe. Nothing else is allowed: no other exception, no key that has no effect.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations import ALL, UNSET, Case, Text

from t2i_align.errors import RecipeError
from t2i_align.judges.fit_recipe import load_fit_recipe, shipped_judges
from t2i_align.recipe import load_recipe, shipped
from t2i_align.yaml_source import parse_text

SHARE = 0.6  # of the cases of a class, other ones in each recipe
MIN_CASES, MAX_SECONDS = 4000, 60.0
WITHOUT_LINE = "bytes; at most"


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    Args:
        problems: (key, message, where) of each problem.
        dump: of the resolved recipe, where it was accepted.
    """

    problems: tuple[tuple[str, str, str], ...] = ()
    dump: dict[str, Any] | None = None


Loader = Callable[[Path, Sequence[str]], Outcome]


def of_error(error: RecipeError) -> Outcome:
    return Outcome(tuple((p.key, p.message, p.where) for p in error.problems))


def generator_recipe(path: Path, overrides: Sequence[str]) -> Outcome:
    """With the checks; where these only miss data that are not here, without them."""
    try:
        return Outcome(dump=load_recipe(path, overrides).to_dict())
    except RecipeError as error:
        found = of_error(error)
    if any(not is_absence(message) for _, message, _ in found.problems):
        return found
    try:
        return Outcome(dump=load_recipe(path, overrides, run_checks=False).to_dict())
    except RecipeError as error:
        return of_error(error)


def is_absence(message: str) -> bool:
    """Whether a check says that a file of the unspoiled recipe is not on this machine."""
    return message.startswith(("nothing at", "no file '", "data.path: nothing at"))


def judge_recipe(path: Path, overrides: Sequence[str]) -> Outcome:
    try:
        return Outcome(dump=load_fit_recipe(path, overrides).to_dict())
    except RecipeError as error:
        return of_error(error)


def missing_from(dump: Any, data: Any, path: str = "") -> Iterator[str]:
    """Keys of a file that its resolved recipe does not show."""
    if isinstance(data, dict):
        for key, value in data.items():
            if not isinstance(dump, dict) or key not in dump:
                yield f"{path}.{key}"
            else:
                yield from missing_from(dump[key], value, f"{path}.{key}")
    elif not is_same(dump, data):
        yield f"{path}: {data!r} became {dump!r}"


def is_same(dump: Any, data: Any) -> bool:
    """Equal, a whole number in a field of fractions by its nearest fraction."""
    if isinstance(dump, float) and isinstance(data, int) and not isinstance(data, bool):
        return dump == float(data)
    return dump == data and isinstance(dump, bool) == isinstance(data, bool)


def at(dump: Any, path: Sequence[str]) -> Any:
    for part in path:
        dump = dump[part]
    return dump


def faults_of_refusal(case: Case, found: Outcome, name: str) -> Iterator[str]:
    if case.same:
        yield f"harmless, yet refused: {found.problems[0]}"
    num_lines = max(1, len(re.split(rb"\r\n|\r|\n|\xe2\x80[\xa8\xa9]|\xc2\x85", case.content)))
    for key, message, where in found.problems:
        if not key or not message:
            yield "a problem without a key or a message"
        place = re.fullmatch(re.escape(name) + r":(\d+)", where)
        bare = where == name and WITHOUT_LINE in message
        told = where == "command line" if case.overrides else False
        if not bare and not told and (place is None or not 1 <= int(place[1]) <= num_lines):
            yield f"no place: {where!r}: {key}: {message}"
        if case.line and key == case.key and where != f"{name}:{case.line}":
            yield f"stands on line {case.line}, said: {where} {key}"
    if case.key and case.refused and case.key not in [p[0] for p in found.problems]:
        yield f"{case.key} is not named: {found.problems}"


def faults_of_acceptance(case: Case, dump: dict[str, Any], base: dict[str, Any]) -> Iterator[str]:
    if case.refused:
        yield "accepted"
    if case.same and dump != base:
        yield "harmless, yet another recipe"
    if case.value is not UNSET and not is_same(at(dump, case.path), case.value):
        yield f"shows {at(dump, case.path)!r}"
    if not case.overrides:
        text = case.content.decode("utf-8-sig")
        yield from missing_from(dump, parse_text(text, "f").data)


def spoil(
    name: str, file: Path, load: Loader, where: Path, counts: Counter[tuple[str, str]]
) -> Iterator[str]:
    """All cases of one recipe; yields what is wrong."""
    raw = file.read_text(encoding="utf-8")
    base = load(file, ())
    assert base.dump is not None, (name, base.problems)
    text = Text.of(name, raw, parse_text(raw, name).data)
    for make in ALL:
        cases = list(make(text))
        for case in text.chance.sample(cases, max(1, round(SHARE * len(cases)))):
            where.write_bytes(case.content)
            try:
                found = load(where, case.overrides)
            except Exception as error:
                yield f"{name}, {case.kind}, {case.about}: {type(error).__name__}: {error}"[:400]
                continue
            if found.dump is None:
                counts[case.kind, "refused"] += 1
                faults = list(faults_of_refusal(case, found, str(where)))
            else:
                counts[case.kind, "accepted"] += 1
                faults = list(faults_of_acceptance(case, found.dump, base.dump))
            yield from (f"{name}, {case.kind}, {case.about}: {fault}"[:400] for fault in faults)


def test_spoiled_recipes_are_refused_or_mean_what_they_say(tmp_path: Path) -> None:
    began, counts, faults = time.process_time(), Counter[tuple[str, str]](), []
    for name, file in shipped().items():
        faults += spoil(name, file, generator_recipe, tmp_path / "r.yaml", counts)
    for name, file in shipped_judges().items():
        faults += spoil(name, file, judge_recipe, tmp_path / "j.yaml", counts)
    seconds = time.process_time() - began
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    for kind in kinds:
        both = [counts[kind, end] for end in ("refused", "accepted")]
        print("{:12} refused {:5} accepted {:5}".format(kind, *both))
    print(f"{counts.total()} cases of {len(kinds)} classes in {seconds:.0f} s of one core")
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:60])
    assert all(counts[kind, "refused"] for kind in kinds)
    assert len(kinds) == len(ALL) and counts.total() >= MIN_CASES
    assert seconds < MAX_SECONDS
