"""``judges convert``: a published checkpoint into safetensors, once and for all.

A pickle is read with ``weights_only=True`` and only with the sha256 that was given or stands on the
card. Its names must be exactly those of the published layout, and mapping them there and back must
give every tensor again. What is written is what the judge loads: ``model.safetensors``, whose
metadata keep the hash of the published file, and ``config.json`` where the shape is known.

A converter is a function of the tensors and the card's options (converters.py);
the table below names one a judge.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from t2i_align.errors import ModelError, OutputError, UserError
from t2i_align.judges.base import judge_card
from t2i_align.judges.converters import Converted
from t2i_align.judges.weights import CONVERTED, load_tensors, sha256_of
from t2i_align.registry import nearest, resolve


@dataclass(frozen=True)
class Report:
    """What was done.

    Args:
        file: the file written.
        num_tensors: in it.
        num_bytes: of it.
        source_sha256: of what it was made from.
        sha256: of it.
        others: further files written.
    """

    file: Path
    num_tensors: int
    num_bytes: int
    source_sha256: str
    sha256: str
    others: list[Path] = field(default_factory=list)


_CLIP = "t2i_align.judges.converters:clip"
_HEAD = "t2i_align.judges.converters:aesthetic"
_VIT = "t2i_align.judges.converters:vit"
CONVERTERS: dict[str, str] = {
    "clip_score": _CLIP,
    "clip_sim": _CLIP,
    "pickscore": _CLIP,
    "hpsv2": _CLIP,
    "hpsv2_1": _CLIP,
    "aesthetic_v1": _HEAD,
    "aesthetic_v2": _HEAD,
    "aesthetic_v2_5": _HEAD,
    "clip_i": _CLIP,
    "imagereward": "t2i_align.judges.converters:imagereward",
    "dino": _VIT,
    "nsfw": _VIT,
    "safety_checker": "t2i_align.judges.converters:safety_checker",
}
FOLDERS = {"dreamsim": "t2i_align.judges.dreamsim_merge:merge"}  # made of several files


def convert(name: str, source: Path, out: Path, sha256: str | None = None) -> Report:
    """Convert a published checkpoint of a judge.

    Args:
        name: the judge.
        source: its file; for DreamSim a folder.
        out: folder to write, where the judge looks for it or anywhere.
        sha256: hash of ``source``, by default the one on the judge's card.

    Raises:
        UserError: no such judge, or nothing to convert for it.
        OutputError: ``out`` holds converted weights already.
        ModelError: not the published checkpoint, or a pickle without a known hash.
    """
    options = judge_card(name).details.get("options", {})
    known = [*CONVERTERS, *FOLDERS]
    if name not in known:
        hint = nearest(name, known) or f"judges with a converter: {', '.join(sorted(known))}"
        raise UserError(f"there is nothing to convert for the judge '{name}'", hint)
    if (out / CONVERTED).exists():
        raise OutputError(f"{out / CONVERTED} exists", "give another folder, or remove it first")
    if name in FOLDERS:
        from t2i_align.judges.dreamsim_merge import folder_hash

        made = Converted(resolve(FOLDERS[name])(source, sha256 or options.get("sha256")))
        return _written(made, out, folder_hash(source))
    if source.is_dir():
        raise ModelError(f"{source} is a folder", "give the file of weights itself")
    tensors = load_tensors(source, sha256 or options.get("sha256"))
    made = resolve(CONVERTERS[name])(tensors, options)
    return _written(made, out, sha256_of(source), source.with_name("config.json"))


def _written(made: Converted, out: Path, source: str, config: Path | None = None) -> Report:
    """Write, the weights last and atomically, so that a folder with them is complete."""
    from safetensors.torch import save_file

    from t2i_align.judges.weight_files import SOURCE

    out.mkdir(parents=True, exist_ok=True)
    others, target = [], out / "config.json"
    text = None if made.config is None else json.dumps(made.config, indent=2, sort_keys=True)
    if text is None and config is not None and config.is_file():
        text = config.read_text(encoding="utf-8")
    if text is not None and target.resolve() != (config or target / "none").resolve():
        target.write_text(text, encoding="utf-8")
        others.append(target)
    file, temporary = out / CONVERTED, out / f".{CONVERTED}.tmp"
    tensors = {k: v.contiguous().clone() for k, v in made.tensors.items()}
    save_file(tensors, temporary, metadata={"format": "pt", SOURCE: source})
    temporary.rename(file)
    return Report(file, len(tensors), file.stat().st_size, source, sha256_of(file), others)
