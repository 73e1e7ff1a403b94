"""The model card of an export: what it is, how it was made, whom to cite.

The front matter holds what the hub reads. Paths of the machine the run was on are shortened to
their last part: a card is made to be published.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i_align import __version__
from t2i_align.errors import DataError
from t2i_align.plain_json import loads

CARD = "README.md"
LICENCE = "inherits-base-model"
LICENCE_TEXT = (
    "These weights inherit the base model's licence, which this export does not know: read it on "
    "the base model's page and name it here before publishing."
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHORT_FACTS = ("steps", "samples_seen", "trainable_parameters", "records_per_second")


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Args:
        title: name of the export.
        form: ``peft``, ``kohya`` or ``merged``.
        base: name or path of the base model.
        library: hub's ``library_name``, or None.
        usage: Python lines that load it, or none.
        tags: of the hub.
        recipe: the run's, as a dict; None where only an adapter file was given.
        facts: rows of the table, by label.
        citations: BibTeX entries.
        scores: summaries of ``t2i-align eval``.
    """

    title: str
    form: str
    base: str
    library: str | None
    usage: Sequence[str]
    tags: Sequence[str] = ()
    recipe: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    citations: Sequence[str] = ()
    scores: Sequence[Mapping[str, Any]] = ()


def render(facts: Facts) -> str:
    """The README.md."""
    parts = [
        f"---\n{front_matter(facts)}\n---",
        f"# {facts.title}",
        _about(facts),
        *_usage(facts),
        *_scores(facts.scores),
        *_recipe(facts.recipe),
        f"## Licence\n\n{LICENCE_TEXT}",
        *_citations(facts.citations),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: Facts) -> str:
    """YAML the hub reads; a base model or data set is named there only by a hub id."""
    from huggingface_hub import ModelCardData

    data = (facts.recipe or {}).get("data", {})
    source = data.get("hub_id")
    made = ModelCardData(
        base_model=facts.base if is_hub_id(facts.base) else None,
        library_name=facts.library,
        license="other",
        license_name=LICENCE,
        datasets=[source] if source and is_hub_id(source) else None,
        tags=list(facts.tags),
    )
    return made.to_yaml(line_break="\n").strip()


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the hub's and no path of this machine."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def shorten(value: Any) -> Any:
    """Recipe values without this machine's folders: absolute and home paths by their last part."""
    if isinstance(value, Mapping):
        return {k: shorten(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [shorten(v) for v in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value


def _about(facts: Facts) -> str:
    rows = {"base model": f"`{shorten(facts.base)}`", "format": facts.form, **facts.facts}
    lines = ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())]
    return "\n".join(lines) + f"\n\nWritten by t2i-align {__version__}."


def _usage(facts: Facts) -> list[str]:
    if not facts.usage:
        return []
    return ["## Use\n\n```python\n" + "\n".join(facts.usage) + "\n```"]


def _scores(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = []
    for score in scores:
        rows = [f"| {task} | {value:.3f} |" for task, value in score.get("tasks", {}).items()]
        if "overall" in score:
            o = score["overall"]
            rows.append(f"| overall | {o['mean']:.3f} [{o['low']:.3f}, {o['high']:.3f}] |")
        name = score.get("protocol", {}).get("benchmark", "benchmark")
        parts.append(f"## Scores: {name}\n\n| task | score |\n|---|---|\n" + "\n".join(rows))
    return parts


def _recipe(recipe: Mapping[str, Any] | None) -> list[str]:
    if recipe is None:
        return []
    from ruamel.yaml import YAML

    writer, stream = YAML(), io.StringIO()
    writer.dump(shorten(recipe), stream)
    text = "## Recipe\n\nPaths are shortened to their last part."
    return [f"{text}\n\n```yaml\n{stream.getvalue().rstrip()}\n```"]


def _citations(entries: Sequence[str]) -> list[str]:
    return ["## Citation\n\n```bibtex\n" + "\n\n".join(entries) + "\n```"] if entries else []


def read_summary(path: Path) -> dict[str, Any]:
    """A ``summary.json`` of ``t2i-align eval``, or of the folder that holds it.

    Raises:
        DataError: no such file, or it holds no scores.
    """
    file = path / "summary.json" if path.is_dir() else path
    try:
        found = loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"--scores: cannot read {file}: {error}") from error
    if not isinstance(found, dict) or not {"tasks", "overall"} & found.keys():
        raise DataError(
            f"--scores: {file} holds no scores", "give the --out folder of t2i-align eval"
        )
    return found


def run_facts(folder: Path) -> dict[str, Any]:
    """Rows of the table from a run's own summary; empty before it has finished."""
    file = folder / "summary.json"
    if not file.is_file():
        return {}
    summary = loads(file.read_text())
    rows = {k.replace("_", " "): summary[k] for k in SHORT_FACTS if k in summary}
    last = summary.get("last") or {}
    return rows | {f"last {k}": f"{v:.4g}" for k, v in last.items() if k == "loss"}
