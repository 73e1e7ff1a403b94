"""Several benchmarks in one go: ``eval/suites/<name>.yaml``, or a file of one's own.

All benchmarks are built and their prompts read before the first picture is made, so that what is
missing is said at once and in one list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console

from t2i_align.catalog import find_root
from t2i_align.errors import DataError, RecipeError, UserError
from t2i_align.evaluate.answers import write_whole
from t2i_align.evaluate.benchmarks import build
from t2i_align.evaluate.run import Request, run
from t2i_align.evaluate.sampling import Model, defaults
from t2i_align.explain import validate
from t2i_align.options import Options
from t2i_align.registry import nearest
from t2i_align.yaml_source import read


class Entry(Options):
    """One benchmark of a suite."""

    benchmark: str = Field(description="its name")
    options: dict[str, Any] = Field(default_factory=dict, description="of the benchmark")
    sampling: dict[str, Any] = Field(
        default_factory=dict, description="resolution, num_inference_steps, guidance_scale"
    )


class Suite(Options):
    """A list of benchmarks."""

    summary: str = Field(description="what it is for, in one sentence")
    benchmarks: list[Entry] = Field(min_length=1, description="in this order")


@dataclass(frozen=True)
class Setting:
    """What all benchmarks of a suite share.

    Args:
        model: that draws the pictures.
        images: or a folder with one folder of pictures a benchmark.
        out: one folder a benchmark is made in it.
        sampling: what the command line says; None: the suite's, then the benchmark's own.
        processes: as in :class:`~t2i_align.evaluate.run.Request`.
        device: for models and judges.
        allow_partial: totals although pictures are missing, marked.
    """

    model: Model | None
    images: Path | None
    out: Path
    sampling: Mapping[str, Any] = field(default_factory=dict)
    processes: tuple[int, int | None] = (1, None)
    device: str = "cpu"
    allow_partial: bool = False


def suites(root: Path | None = None) -> dict[str, Path]:
    """Files of the suites by name."""
    folder = (root or find_root()) / "eval" / "suites"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_suite(name: str, root: Path | None = None) -> Suite:
    """A suite by name, or by the path of its file.

    Raises:
        UserError: no such suite.
        RecipeError: every problem of its file.
    """
    known = suites(root)
    if name.endswith((".yaml", ".yml")):
        known[name] = Path(name)
    if name not in known or not known[name].is_file():
        hint = nearest(name, list(known)) or "e.g. t2i-align eval suite quick --model M --out O"
        raise UserError(f"no suite '{name}'; known: {', '.join(known)}", hint)
    document = read(known[name])
    suite, problems = validate(Suite, document.data, (), document.where)
    if suite is None:
        raise RecipeError(problems, str(known[name]))
    return suite


def requests(suite: Suite, setting: Setting) -> list[Request]:
    """What each benchmark of a suite is asked.

    Raises:
        DataError: prompts of some are missing; names all of them.
    """
    missing = []
    found = []
    for entry in suite.benchmarks:
        try:
            build(entry.benchmark, entry.options).items()
        except DataError as error:
            missing.append(f"{entry.benchmark}: {error.message}")
        sampling = defaults(entry.benchmark).with_given(entry.sampling)
        sampling = sampling.with_given(setting.sampling)
        name, images = entry.benchmark, setting.images
        found.append(
            Request(
                name,
                setting.out / name,
                entry.options,
                setting.model,
                None if images is None else images / name,
                sampling=sampling,
                processes=setting.processes,
            )
        )
    if missing:
        fix = "fetch them with `t2i-align eval fetch NAME`"
        raise DataError("the suite lacks prompts:\n  " + "\n  ".join(missing), fix)
    return found


def run_suite(
    name: str, setting: Setting, console: Console, root: Path | None = None
) -> list[dict[str, Any]]:
    """Run a suite; finished benchmarks are only judged again. Also written to ``suite.json``.

    Args:
        name: of the suite.
        setting: model and folder.
        console: for progress.
        root: the catalogue.

    Returns:
        A row a benchmark: total with its interval, pictures.
    """
    rows = []
    for request in requests(read_suite(name, root), setting):
        result = run(request, console, setting.device, allow_partial=setting.allow_partial)
        overall = result["overall"]
        rows.append(
            {
                "benchmark": request.benchmark,
                "overall": f"{overall['mean']:.3f}",
                "95 % interval": f"[{overall['low']:.3f}, {overall['high']:.3f}]",
                "pictures": f"{result['images_found']} of {result['images_expected']}",
                "partial": result["partial"],
            }
        )
        write_whole(
            setting.out / "suite.json", [json.dumps({"suite": name, "rows": rows}, indent=1)]
        )
    return rows
