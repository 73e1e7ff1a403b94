"""The recipe of a judge: one YAML file, strict like the recipes of generators.

    load_fit_recipe("judge_scenes_bt", ["fit.max_train_steps=50"])

It has sections of its own (``judge``, ``noise``, ``fit``) and shares ``data`` with those of
generators. The shipped ones lie in t2i_align/recipes/judges/.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny

from t2i_align.catalog import PACKAGE
from t2i_align.data import SOURCES
from t2i_align.data.options import RecordOptions
from t2i_align.errors import Problem, RecipeError
from t2i_align.explain import show, validate
from t2i_align.judges.fit_options import FitOptions, NoiseOptions, StartOptions
from t2i_align.options import Options
from t2i_align.registry import nearest, resolve
from t2i_align.yaml_source import Document, override, read

RECIPES = PACKAGE / "recipes" / "judges"
SECTIONS: dict[str, type[Options]] = {
    "judge": StartOptions,
    "data": RecordOptions,  # the class of its type
    "noise": NoiseOptions,
    "fit": FitOptions,
}


class TopOptions(Options):
    """The keys at the top that are not sections."""

    output_dir: str = Field(min_length=1, description="folder of the fitted judge")
    seed: int = Field(0, ge=0, lt=1 << 63, description="order, split, noise and fresh weights")
    size: int | None = Field(
        None,
        ge=1,
        description="pictures are brought to this square first (shorter side, centre crop); null: "
        "they have one size already",
    )


class FitRecipe(TopOptions):
    """A validated recipe of a judge; built by :func:`load_fit_recipe`."""

    judge: StartOptions
    data: SerializeAsAny[RecordOptions]
    noise: NoiseOptions | None = None
    fit: FitOptions = Field(default_factory=lambda: FitOptions.model_validate({}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, every default written out."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, the output folder left out."""
        facts = self.to_dict() | {"output_dir": None}
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def source(self) -> Any:
        """The source of the pairs."""
        name = self.data.model_dump(include={"type"})["type"]
        return resolve(SOURCES[name])(self.data)


def shipped_judges() -> dict[str, Path]:
    """The judges' recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_fit_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> FitRecipe:
    """Read, override and validate a judge's recipe.

    Args:
        path_or_name: a YAML file, or the name of a shipped recipe.
        overrides: ``section.key=value`` texts, values read as YAML.

    Raises:
        RecipeError: every problem of every section.
    """
    name, names = str(path_or_name), shipped_judges()
    path = Path(path_or_name).expanduser()
    if not path.is_file() and name not in names:
        message = f"neither a file nor a shipped judge recipe; shipped: {', '.join(names)}"
        raise RecipeError([Problem(name, message, fix=nearest(name, list(names)))], "judge recipe")
    document, problems = override(read(path if path.is_file() else names[name], name), overrides)
    allowed = list(FitRecipe.model_fields)
    for key in document.data:
        if key not in allowed:
            text = f"unknown key; allowed: {', '.join(allowed)}"
            problems.append(Problem(key, text, document.where((key,)), nearest(key, allowed)))
    plain = {k: v for k, v in document.data.items() if k in TopOptions.model_fields}
    top, found = validate(TopOptions, plain, (), document.where)
    parts: dict[str, Any] = {}
    for section in SECTIONS:
        found += _section(section, document, parts)
    problems += found + _together(parts, document)
    if problems or top is None:
        raise RecipeError(problems, document.name)
    return FitRecipe(output_dir=top.output_dir, seed=top.seed, size=top.size, **parts)


def _section(name: str, document: Document, parts: dict[str, Any]) -> list[Problem]:
    """Validate one section into ``parts``; its problems."""
    value, where = document.data.get(name), document.where((name,))
    if value is None and name in ("noise", "fit"):
        return []
    if not isinstance(value, dict):
        return [Problem(name, f"got {show(value)}; must be a section", where)]
    cls = SECTIONS[name]
    if name == "data":
        kind = value.get("type")
        if not isinstance(kind, str) or kind not in SOURCES:
            known = f"got {show(kind)}; known sources: {', '.join(SOURCES)}"
            where = document.where((name, "type"))
            return [Problem("data.type", known, where, nearest(str(kind), list(SOURCES)))]
        cls = resolve(SOURCES[kind]).Options
    options, problems = validate(cls, value, (name,), document.where)
    if options is not None:
        parts[name] = options
    return problems


def _together(parts: dict[str, Any], document: Document) -> list[Problem]:
    """What no section sees alone."""
    judge = parts.get("judge")
    if judge is None:
        return []
    problems = []
    if judge.type == "timed_clip" and "noise" not in parts and document.data.get("noise") is None:
        text = "is missing; a judge that is told the noise level is trained on noisy pictures"
        problems.append(Problem("noise", text, document.where(("judge",)), "noise: {}"))
    if judge.type != "timed_clip" and "noise" in parts:
        text = "belongs to judge.type: timed_clip; another judge is not told the level"
        problems.append(Problem("noise", text, document.where(("noise",)), "remove it"))
    if not _is_folder(judge):
        text = f"no open_clip folder at {show(judge.path)}"
        problems.append(Problem("judge.path", text, document.where(("judge", "path"))))
    return problems


def _is_folder(judge: StartOptions) -> bool:
    try:
        return judge.folder.is_dir()
    except (OSError, RuntimeError):  # too long, not to be looked at, ~name of an unknown user
        return False
