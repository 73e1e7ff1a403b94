"""The quickstart: the bundled base before and after one recipe, with the public verbs only.

Every phase is one command of the command line, printed before it runs, and leaves a file by which a
later call sees that it is done; so the whole may be stopped and started again, and a finished one
is only read. What the phases depend on (commands, recipe, version, and the files of the base, of
the recipe's data and of the judges) is hashed: a folder made with anything else is refused, not
mixed.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from t2i_align import __version__
from t2i_align.catalog import find_root
from t2i_align.errors import DataError, InterruptedRun, UserError
from t2i_align.evaluate.compare import compare
from t2i_align.train.output import started

if TYPE_CHECKING:
    from t2i_align.data.options import RecordOptions

FORMAT = 1
MODEL = "bundled/scenes_sdxl"
JUDGES = ("scenes_clip", "colorfulness", "saturation", "sharpness")


@dataclass(frozen=True)
class Phase:
    """One command.

    Args:
        name: for tables.
        command: arguments of ``t2i-align``.
        product: file that exists once it is done.
        resumed: arguments added where the command was begun before.
        begun: folder of the run that tells that.
        silent: whether what it prints is left out (its progress is shown).
    """

    name: str
    command: tuple[str, ...]
    product: Path
    resumed: tuple[str, ...] = ()
    begun: Path | None = None
    silent: bool = False


def phases(out: Path, recipe: str, per_task: int, prompt_seed: int) -> list[Phase]:
    """The commands of a quickstart in order."""
    run = out / "policy"
    which = ("--per-task", str(per_task), "--prompt-seed", str(prompt_seed))

    def evaluate(side: str, *more: str) -> Phase:
        command = ("eval", "scenes", "--model", MODEL, *more, "--out", str(out / side), *which)
        return Phase(f"evaluate {side}", command, out / side / "summary.json")

    def judge(side: str) -> Phase:
        file = out / f"scores_{side}.jsonl"
        named = tuple(x for name in JUDGES for x in ("--judge", name))
        command = ("score", str(out / side / "images"), *named, "--jsonl", str(file))
        return Phase(f"judge {side}", command, file, silent=True)

    resumed = ("train.resume_from_checkpoint=latest",)
    train = Phase(
        "train",
        ("train", recipe, f"output_dir={run}"),
        run / "summary.json",
        resumed,
        run,
    )
    after = evaluate("after", "--denoiser", str(run / "unet"))
    return [evaluate("before"), train, after, judge("before"), judge("after")]


def commands(planned: Sequence[Phase], out: Path) -> list[list[str]]:
    """Arguments of the phases with OUT for their folder, which may be moved or named otherwise."""

    def portable(text: str) -> str:
        key, equals, value = text.rpartition("=")
        inside = value.startswith(f"{out}/")
        return key + equals + (value.replace(str(out), "OUT", 1) if inside else value)

    return [[portable(text) for text in phase.command] for phase in planned]


def fingerprint(planned: Sequence[Phase], out: Path, recipe: str) -> str:
    """SHA-256 of what the result depends on.

    Commands, recipe and version; names and contents of the files of the base model, of the recipe's
    data and of the judges that have weights. Data of a hub count by their revision in the recipe.

    Raises:
        RecipeError: the recipe is wrong.
        DataError: there is nothing at its ``data.path``.
    """
    from t2i_align.generators.diffusers_folder import fingerprint as of_folder
    from t2i_align.generators.diffusers_folder import local_path
    from t2i_align.recipe import load_recipe

    read = load_recipe(recipe)
    judges = find_root() / "reward_models"
    weights = [name for name in JUDGES if any((judges / name).glob("*.safetensors"))]
    parts = [
        __version__,
        read.to_dict(),
        commands(planned, out),
        of_folder(local_path(MODEL), ["."]),
        of_folder(judges, weights),
        data_sha256(read.data),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def data_sha256(data: RecordOptions) -> dict[str, str]:
    """SHA-256 of the contents of each data file by its name, found as the data loader finds it.

    Args:
        data: the recipe's ``data`` section.
    """
    from t2i_align.data.folder import FolderOptions
    from t2i_align.data.options import FileOptions
    from t2i_align.data.rows import find_files
    from t2i_align.generators.diffusers_folder import fingerprint as of_folder

    if isinstance(data, FolderOptions):
        return {"folder": of_folder(Path(data.path).expanduser(), ["."])}
    if not isinstance(data, FileOptions) or data.path is None:
        return {}
    found = {}
    for file in find_files(data):
        with file.path.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


class Ledger:
    """``phases.json``: what the folder was made from, and the seconds of each finished phase."""

    def __init__(self, out: Path, made_from: str) -> None:
        """Read or begin it.

        Raises:
            DataError: the folder was made from something else.
        """
        self.path = out / "phases.json"
        self.data: dict[str, Any] = {"format": FORMAT, "made_from": made_from, "seconds": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())
            if self.data["made_from"] != made_from:
                raise DataError(
                    f"{out} holds results of another version, recipe or setting, or of other "
                    "bundled files",
                    "choose another --out (make quickstart OUT=FOLDER)",
                )
        elif out.exists() and any(out.iterdir()):
            raise DataError(f"{out} is not empty, and not of this verb", "choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """Replace the file in one step."""
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1))
        temporary.rename(self.path)

    def add(self, name: str, seconds: float) -> None:
        """Seconds of a phase; those of interrupted attempts add up."""
        self.data["seconds"][name] = round(self.data["seconds"].get(name, 0.0) + seconds, 1)
        self.write()


def perform(phase: Phase, ledger: Ledger, console: Console) -> None:
    """Run one phase if its product is missing.

    Raises:
        UserError: its command failed; carries its exit code.
        InterruptedRun: Ctrl-C.
    """
    command = phase.command
    if phase.product.exists():
        console.print(f"[dim]done before: {phase.name}[/]")
        return
    if phase.begun is not None and started(phase.begun):
        command += phase.resumed
    shown = shlex.join(["t2i-align", *command])
    console.print(f"\n[bold]$[/] {shown}", highlight=False, soft_wrap=True)
    start = time.monotonic()
    try:
        full = [sys.executable, "-m", "t2i_align", *command]
        where = subprocess.DEVNULL if phase.silent else None
        code = subprocess.run(full, check=False, stdout=where).returncode
    except KeyboardInterrupt:
        raise InterruptedRun("stopped", "run the same command again to continue") from None
    finally:
        ledger.add(phase.name, time.monotonic() - start)
    if code != 0 or not phase.product.exists():
        error = UserError(f"`{shown}` failed (exit code {code})", "see its message above")
        error.exit_code = code or 1
        raise error


def judged(before_file: Path, after_file: Path) -> list[dict[str, Any]]:
    """Mean of every judge before and after, and the paired difference with its interval.

    Args:
        before_file: score file of the pictures before, one JSON object a line.
        after_file: of the same prompts' pictures after.
    """
    from t2i_align.evaluate.aggregate import paired_difference

    files = (before_file, after_file)
    sides = [[json.loads(x) for x in file.read_text().splitlines()] for file in files]
    table = []
    for name in JUDGES:
        x, y = ([row[name] for row in rows] for rows in sides)
        both = [
            (a, b, r["prompt"])
            for a, b, r in zip(x, y, sides[0], strict=True)
            if None not in (a, b)
        ]
        before, after, prompts = ([t[k] for t in both] for k in range(3))
        d = paired_difference(before, after, prompts)
        table.append(
            {
                "judge": name,
                "before": sum(before) / len(before),
                "after": sum(after) / len(after),
                "difference": d.mean,
                "low": d.low,
                "high": d.high,
                "failed": len(x) - len(both),
            }
        )
    return table


def summarise(out: Path, ledger: Ledger) -> dict[str, Any]:
    """``summary.json``: before, after, difference by task and overall, judges, seconds.

    All of :func:`~t2i_align.evaluate.compare.compare` is in it, so that nothing compares again.
    """
    result = compare(out / "before", out / "after")
    lines = {**result["tasks"], "overall": result["overall"]}
    seconds = dict(ledger.data["seconds"])
    summary = {
        "format": FORMAT,
        "t2i_align": __version__,
        "made_from": ledger.data["made_from"],
        "before": {name: r["before"] for name, r in lines.items()},
        "after": {name: r["after"] for name, r in lines.items()},
        "difference": {name: r["difference"] for name, r in lines.items()},
        **result,
        "judges": judged(out / "scores_before.jsonl", out / "scores_after.jsonl"),
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def report(out: Path, summary: dict[str, Any]) -> Path:
    """The HTML report beside the summary."""
    from t2i_align.evaluate.pages import Section
    from t2i_align.evaluate.report import build_report

    judges = [
        {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        for row in summary["judges"]
    ]
    seconds = [{"phase": k, "seconds": f"{v:.1f}"} for k, v in summary["seconds"].items()]
    extras = [
        Section("Other judges", "The same pictures under judges that took no part.", judges),
        Section("Time", "Wall time of each phase.", seconds),
    ]
    target = out / "report.html"
    return build_report(
        out / "before",
        out / "after",
        target,
        runs=[out / "policy"],
        extras=extras,
        title="Quickstart",
        result=summary,
    )


def quickstart(
    out: Path, recipe: str, per_task: int, prompt_seed: int, console: Console
) -> tuple[dict[str, Any], Path]:
    """Run what is missing; the summary and the path of the report."""
    planned = phases(out, recipe, per_task, prompt_seed)
    ledger = Ledger(out, fingerprint(planned, out, recipe))
    for phase in planned:
        perform(phase, ledger, console)
    summary = summarise(out, ledger)
    return summary, report(out, summary)
