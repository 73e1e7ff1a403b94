"""Where the numbers of a report come from: models, hashes, versions, commands."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2i_align import __version__
from t2i_align.errors import DataError
from t2i_align.optional import version_of
from t2i_align.plain_json import loads

PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate", "peft"),
    *("numpy", "pillow", "matplotlib", "jinja2"),
)
MISSING = "not on this machine"
DRAWN = (
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "resolution",
    "negative_prompt",
    "precision",
)
Folders = tuple[Path, Path]
Facts = Mapping[str, Any]


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a file; empty without the file.

    Raises:
        DataError: the file holds something else.
    """
    if not file.is_file():
        return {}
    try:
        found = loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds no JSON object, got {type(found).__name__}")
    return found


def facts_of(folder: Path) -> dict[str, Any]:
    """Protocol, model and summary of an evaluation."""
    return (
        {"protocol": {}}
        | read_object(folder / "protocol.json")
        | read_object(folder / "summary.json")
    )


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sides_table(folders: Folders, facts: tuple[Facts, Facts]) -> list[dict[str, Any]]:
    """What was evaluated and how, before and after side by side; equal lines too."""
    known = dict.fromkeys(name for fact in facts for name in fact)
    names = [n for n in known if all(isinstance(f.get(n), str | None) for f in facts)]
    rows = [("folder", *map(str, folders))]
    rows += [(n, *(f.get(n) for f in facts)) for n in names]
    rows += [("sha256 of results.jsonl", *(sha256(f / "results.jsonl") for f in folders))]
    rows += [(k, *(f["protocol"].get(k) for f in facts)) for k in facts[0]["protocol"]]
    return [{"": n, "before": a, "after": b} for n, a, b in rows]


def weights(facts: tuple[Facts, Facts], runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Each file of weights once, with its uses and its SHA-256."""
    uses: dict[Path, list[str]] = {}
    for use, file in [*_evaluated(facts), *_trained(runs)]:
        uses.setdefault(file, []).append(use)
    resolved: dict[Path, tuple[Path, list[str]]] = {}
    for file, names in uses.items():
        resolved.setdefault(file.resolve(), (file, []))[1].extend(names)
    return [
        {
            "used as": ", ".join(dict.fromkeys(names)),
            "file": str(file),
            "bytes": file.stat().st_size if file.is_file() else None,
            "sha256": sha256(file) if file.is_file() else MISSING,
        }
        for file, names in resolved.values()
    ]


def _evaluated(facts: tuple[Facts, Facts]) -> Iterator[tuple[str, Path]]:
    """(use, file) of the weights two evaluations name."""
    from t2i_align.generators.diffusers_folder import local_path

    for side, fact in zip(("before", "after"), facts, strict=True):
        if fact.get("model") and not fact.get("denoiser"):
            model = local_path(fact["model"])
            parts = [p for p in (model / "unet", model / "transformer") if p.is_dir()]
            for file in (f for part in parts or [model] for f in _files(part)):
                yield f"{side}: denoiser of the model", file
        for kind in ("denoiser", "lora"):
            if fact.get(kind):
                for file in _files(local_path(fact[kind])):
                    yield f"{side}: {kind}", file


def _trained(runs: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """(use, file) of the weights runs wrote."""
    for folder in runs:
        for name in read_object(folder / "summary.json").get("exported", []):
            for file in _files(folder / name):
                yield f"trained by {folder.name}", file


def _files(path: Path) -> list[Path]:
    """Files of weights at a path; the path itself where there are none."""
    return sorted(path.glob("*.safetensors")) or [path]


def versions() -> list[dict[str, Any]]:
    """Versions of what this report was made with."""
    rows = [("t2i-align", __version__), ("python", platform.python_version())]
    rows += [(name, version) for name in PACKAGES if (version := version_of(name))]
    return [{"package": name, "version": version} for name, version in rows]


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """A resolved recipe as YAML that ``t2i-align train`` takes; empty for an empty one."""
    from ruamel.yaml import YAML

    if not recipe:
        return ""
    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    text = io.StringIO()
    yaml.dump(dict(recipe), text)
    return text.getvalue()


def commands(
    folders: Folders, facts: tuple[Facts, Facts], runs: Sequence[Path], out: Path
) -> list[str]:
    """The commands that make all of it again, ready for a shell."""
    made = [["train", f"{folder.name}.yaml"] for folder in runs if _has_recipe(folder)]
    made += [
        eval_command(f, fact) for f, fact in zip(folders, facts, strict=True) if "model" in fact
    ]
    sides = [str(folder) for folder in folders]
    made.append(["compare", *sides])
    made.append(["report", *sides, "--out", str(out)])
    made[-1] += [word for folder in runs for word in ("--run", str(folder))]
    return [shlex.join(["t2i-align", *words]) for words in made]


def _has_recipe(folder: Path) -> bool:
    return bool(read_object(folder / "run.json").get("recipe"))


def eval_command(folder: Path, fact: Facts) -> list[str]:
    """Words of the ``eval`` command of a folder."""
    protocol = fact["protocol"]
    words = ["eval", str(protocol["benchmark"]), *_source(fact)]
    options = fact.get("options")
    if options is None:  # an evaluation of the scenes by a version that had no other
        options = {n: protocol[n] for n in ("per_task", "prompt_seed", "held_out")}
    for name, value in options.items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    for name in (*DRAWN, "batch_size"):
        value = protocol.get(name, fact.get(name))
        if value is not None and not fact.get("replayed"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return [*words, "--out", str(folder)]


def _source(fact: Facts) -> list[str]:
    """Where the pictures of an evaluation came from, as options of ``eval``."""
    if fact.get("replayed"):
        return ["--detections", str(fact["replayed"])]
    if fact.get("pictures"):
        return ["--images", str(fact["pictures"])]
    words = ["--model", str(fact["model"])]
    for name in ("lora", "denoiser", "max_sequence_length"):
        if fact.get(name):
            words += [f"--{name.replace('_', '-')}", str(fact[name])]
    return words
