"""A recipe: one YAML file that says everything about a run, strictly.

Each section is validated alone, by the Options class of whatever its ``type`` names in the tables
of generators, objectives and sources; so a new entry in a table never edits this file. All
sections' problems and all cross-field checks (:mod:`t2i_align.checks`) are reported together.

    load_recipe("sdxl_dpo_lora_24gb", ["data.path=pairs/*.parquet", "train.learning_rate=2e-5"])
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field, SerializeAsAny

from t2i_align import (  # noqa: F401 register checks
    checks,
    checks_buckets,
    checks_cache,
    checks_distributed,
    checks_model,
    checks_rollout,
    checks_rounds,
)
from t2i_align.data import SOURCES
from t2i_align.data.options import RecordOptions
from t2i_align.errors import Problem, RecipeError, UserError
from t2i_align.explain import show, validate
from t2i_align.generators import GENERATORS
from t2i_align.generators.adapters import AdaptOptions, ReferenceOptions
from t2i_align.objectives import OBJECTIVES
from t2i_align.options import Options
from t2i_align.registry import Table, nearest, resolve
from t2i_align.rollout.options import RolloutOptions
from t2i_align.train.options import CacheOptions, DrawOptions, TrainOptions, ValidationOptions
from t2i_align.train.rounds_options import RoundsOptions
from t2i_align.yaml_source import Document, override, read

if TYPE_CHECKING:
    from t2i_align.protocols import Needs

T = TypeVar("T", bound=Options)
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Choice:
    """A section whose ``type`` picks its Options class from a table."""

    table: Table
    noun: str
    default: str | None = None


CHOICES = {
    "model": Choice(GENERATORS, "generator", "diffusers"),
    "objective": Choice(OBJECTIVES, "objective"),
    "data": Choice(SOURCES, "source"),
}
FIXED: dict[str, type[Options]] = {
    "reference": ReferenceOptions,
    "draw": DrawOptions,
    "rollout": RolloutOptions,
    "cache": CacheOptions,
    "train": TrainOptions,
    "validation": ValidationOptions,
    "rounds": RoundsOptions,
}
NULLABLE = {"rollout", "rounds", "validation"}


def _defaults(cls: type[T]) -> Callable[[], T]:
    return lambda: cls.model_validate({})


class TopOptions(Options):
    """The keys at the top of a recipe that are not sections."""

    output_dir: str = Field(min_length=1, description="folder of checkpoints, logs and results")
    seed: int = Field(
        default=0,
        ge=0,
        lt=1 << 63,
        description="noise, data order and adapters are functions of it",
    )


class Recipe(TopOptions):
    """A validated recipe; built by :func:`load_recipe`, or from options in Python."""

    model: SerializeAsAny[AdaptOptions] = Field(description="the generator that is trained")
    objective: SerializeAsAny[Options] = Field(description="what is minimised")
    data: SerializeAsAny[RecordOptions] = Field(description="where preference records come from")
    reference: ReferenceOptions = Field(
        default_factory=_defaults(ReferenceOptions),
        description="the frozen model the policy is compared with",
    )
    draw: DrawOptions = Field(
        default_factory=_defaults(DrawOptions), description="how noise levels and noise are drawn"
    )
    rollout: RolloutOptions | None = Field(
        default=None, description="samples of the policy while it is trained; null for none"
    )
    cache: CacheOptions = Field(
        default_factory=_defaults(CacheOptions), description="encoded media and text on disk"
    )
    train: TrainOptions = Field(
        default_factory=_defaults(TrainOptions), description="optimisation, checkpoints, logging"
    )
    validation: ValidationOptions | None = Field(
        default=None, description="sample grids while training; null for none"
    )
    rounds: RoundsOptions | None = Field(
        default=None,
        description="several trainings in a row, each from the policy before; null for one",
    )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, every default written out; loads back to an equal recipe."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: equal recipes have equal fingerprints."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def needs(self) -> Needs:
        """What the objective declares with its options."""
        return self.chosen("objective")(self.objective).needs

    def chosen(self, section: str) -> Any:
        """The class a section's ``type`` names: the generator, the objective, or the source."""
        name = getattr(self, section).model_dump(include={"type"})["type"]
        return resolve(CHOICES[section].table[name])


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a shipped recipe.

    Raises:
        RecipeError: neither; with the nearest shipped name.
    """
    path, text = Path(path_or_name).expanduser(), str(path_or_name)
    if path.is_file():
        return path
    names = shipped()
    if text in names:
        return names[text]
    if "/" in text or path.suffix in (".yaml", ".yml", ".json") or path.is_dir():
        message = "is a folder" if path.is_dir() else "no such file"
    else:
        message = f"neither a file nor a shipped recipe; shipped: {', '.join(names)}"
    hint = nearest(path.stem, list(names)) or "list them with: t2i-align ls recipes"
    raise RecipeError([Problem(text, message, fix=hint)], "recipe")


def copy_recipe(name: str, dest: Path) -> Path:
    """Copy a shipped recipe.

    Args:
        name: its name.
        dest: a new file, or an existing folder; parents are made.

    Returns:
        The file written.

    Raises:
        UserError: no such recipe, or the file exists (never overwritten), or cannot be written.
    """
    source = shipped().get(name.removesuffix(".yaml")) or find_recipe(name)
    dest = dest.expanduser()
    target = dest / source.name if dest.is_dir() else dest
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"no folder can be made at '{target.parent}': {error.strerror}") from error
    try:
        with target.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError as error:
        raise UserError(
            f"'{error.filename}' exists and is not overwritten", "choose another name"
        ) from error
    except OSError as error:
        raise UserError(f"'{target}' cannot be written: {error.strerror}") from error
    return target


def load_recipe(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    *,
    cuda: bool | None = None,
    run_checks: bool = True,
) -> Recipe:
    """Read, override, validate and cross-check a recipe.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe.
        overrides: ``section.key=value`` texts, values read as YAML.
        cuda: whether the run will have a CUDA device; None leaves out the checks that depend on it.
        run_checks: False skips the cross-field checks, to read a recipe whose files are elsewhere.

    Raises:
        RecipeError: every problem of every section, in the order of the file.
    """
    path = find_recipe(path_or_name)
    document, problems = override(read(path, str(path_or_name)), overrides)
    valid, found = _validate_all(document)
    problems += found
    if run_checks:
        failed = checks.run(Recipe.model_construct(**valid), set(valid), cuda=cuda)
        problems += [replace(p, where=document.where(_path(p.key))) for p in failed]
    if problems:
        problems.sort(key=_line)
        raise RecipeError(problems, document.name)
    return Recipe(**valid)


def noted_recipe(values: dict[str, Any], name: str) -> Recipe:
    """A recipe as :meth:`Recipe.to_dict` wrote it, by this version or one before it.

    Options that came since have their defaults, which stand for what was done before. Nothing of
    what lies around the recipe is looked at.

    Args:
        values: by section.
        name: where they are from, for messages.

    Raises:
        RecipeError: it holds what this version does not know.
    """
    valid, problems = _validate_all(Document(name, values))
    if problems:
        raise RecipeError(problems, name)
    return Recipe(**valid)


def written_out(values: dict[str, Any], name: str) -> dict[str, Any]:
    """What :func:`noted_recipe` is given, with this version's defaults in it.

    Sections that this version cannot read stay as they are.
    """
    valid, _ = _validate_all(Document(name, values))
    plain = Recipe.model_construct(**valid).to_dict()
    return values | {key: plain[key] for key in valid}


def _line(problem: Problem) -> float:
    """Sort key: the line in the file, with the command line last."""
    line = problem.where.rpartition(":")[2]
    return int(line) if line.isdigit() else math.inf


def _path(key: str) -> tuple[str, ...]:
    return tuple(key.split("[")[0].split("."))


def _validate_all(document: Document) -> tuple[dict[str, Any], list[Problem]]:
    """Validated top-level values by key, and the problems of the others."""
    names = list(Recipe.model_fields)
    valid: dict[str, Any] = {}
    problems = [
        Problem(
            key,
            f"unknown key; allowed: {', '.join(names)}",
            document.where((key,)),
            nearest(key, names),
        )
        for key in document.data
        if key not in names
    ]
    plain = {k: v for k, v in document.data.items() if k in TopOptions.model_fields}
    top, found = validate(TopOptions, plain, (), document.where)
    problems += found
    if top is not None:
        valid |= {"output_dir": top.output_dir, "seed": top.seed}
    for section in (*CHOICES, *FIXED):
        options, found = _validate_section(section, document)
        problems += found
        if not found:
            valid[section] = options
    return valid, problems


def _validate_section(section: str, document: Document) -> tuple[Options | None, list[Problem]]:
    """Options of one section, or its problems."""
    choice, where = CHOICES.get(section), document.where((section,))
    if section not in document.data:
        if choice is None:
            return Recipe.model_fields[section].get_default(call_default_factory=True), []
        about = Recipe.model_fields[section].description
        return None, [Problem(section, "is missing; must be a section", where, about or "")]
    value = document.data[section]
    if value is None and section in NULLABLE:
        return None, []
    if not isinstance(value, dict):
        fix = f"write {section}: {{type: {value}}}" if choice and isinstance(value, str) else ""
        return None, [Problem(section, f"got {show(value)}; must be a section", where, fix)]
    if choice is None:
        return validate(FIXED[section], value, (section,), document.where)
    name = value.get("type", choice.default)
    if not isinstance(name, str) or name not in choice.table:
        return None, [_bad_type(section, choice, name, document)]
    options = resolve(choice.table[name]).Options
    return validate(options, {**value, "type": name}, (section,), document.where)


def _bad_type(section: str, choice: Choice, name: Any, document: Document) -> Problem:
    """The problem of a missing or unknown ``type``."""
    known = list(choice.table)
    got = "is missing" if name is None else f"got {show(name)}"
    fix = nearest(name, known) if isinstance(name, str) else ""
    message = f"{got}; known {choice.noun}s: {', '.join(known)}"
    return Problem(f"{section}.type", message, document.where((section, "type")), fix)
