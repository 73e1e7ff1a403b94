"""What encoded media and prompts of a diffusers pipeline depend on: the keys of their caches.

A key holds whatever could change what is stored, hashed by content where it is a file. What a
family leaves at its usual value stays out, so that a new option does not empty old caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.generators import diffusers_folder as folders
from t2i_align.generators.diffusers_frozen import OPTIONAL_PARTS
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.layouts import FamilyLayout

TEXT_PARTS = ("text_encoder", "tokenizer")  # how the names of these parts of a pipeline begin


@dataclass(frozen=True)
class Facts:
    """What a pipeline's files say.

    Args:
        index: its model_index.json.
        config: of the denoiser.
        factor: pixels a latent pixel and frames a latent frame stand for.
    """

    index: Mapping[str, Any]
    config: Mapping[str, Any]
    factor: tuple[int, int]


def media_key(folder: Path, options: DiffusersOptions, layout: FamilyLayout) -> dict[str, Any]:
    """Of encoded media; a bucket's size is in the key of its items.

    Args:
        folder: of the pipeline.
        options: the recipe's ``model`` section.
        layout: of the family.
    """
    usual = {"codec": "image", "vae_tiling": False, "variant": None, "short_clips": "skip"}
    given = {
        "codec": layout.codec,
        "vae_tiling": layout.vae_tiling,
        "variant": options.variant,
        "short_clips": _short(options),
    }
    return {
        "vae": _vae(folder, options.vae_name_or_path),
        "vae_dtype": options.vae_dtype,
        "resolution": options.resolution if options.aspect_buckets is None else "bucket",
        "crop": options.crop,
        "format": 1,
        **({"num_frames": options.num_frames} if layout.media == "video" else {}),
        **{k: v for k, v in given.items() if v != usual[k]},
    }


def _short(options: DiffusersOptions) -> str:
    """Which short clips there are: given frames decide whether anything of one is scored."""
    given = f" after {options.given_frames}" if options.given_frames else ""
    return options.short_clips + (given if options.short_clips == "mask" else "")


def _vae(folder: Path, other: str | None) -> str:
    """Hash of the VAE's files; another one of the hub by its id."""
    if not other:
        return folders.fingerprint(folder, ["vae"])
    if not folders.looks_local(other):
        return other
    return folders.fingerprint(folders.local_path(other), ["."])


def text_key(
    folder: Path, options: DiffusersOptions, layout: FamilyLayout, facts: Facts
) -> dict[str, Any]:
    """Of encoded prompts; arguments as of :func:`media_key`, and what the files say."""
    parts = [n for n in facts.index if n.startswith(TEXT_PARTS)]
    given = {"variant": options.variant, "max_sequence_length": options.max_sequence_length}
    key = {"pipeline": facts.index["_class_name"], "dtype": options.dtype, "format": 1}
    if options.layout is not None:
        parts = _parts_before(facts.index, layout.denoiser)
        key |= _ids(options, facts)
    elif options.family != "auto":
        key["family"] = options.family
    key |= {k: v for k, v in given.items() if v}
    return key | {"text": folders.fingerprint(folder, parts)}


def _parts_before(index: Mapping[str, Any], denoiser: str) -> list[str]:
    """Every part that may have a say in the denoiser's conditioning."""
    others = {"vae", "scheduler", denoiser, *OPTIONAL_PARTS}
    stored = [n for n, v in index.items() if isinstance(v, list) and v[0] is not None]
    return [n for n in stored if n not in others]


def _ids(options: DiffusersOptions, facts: Facts) -> dict[str, Any]:
    """Under a declared layout position ids are captured, so what they follow counts, too."""
    assert options.layout is not None
    return {
        "layout": options.layout.model_dump(),
        "size": [options.resolution, options.num_frames, options.frame_rate],
        "denoiser": {k: v for k, v in facts.config.items() if k not in folders.PROVENANCE},
        "factor": list(facts.factor),
    }
