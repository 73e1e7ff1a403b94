"""Finding a pipeline folder, fingerprinting its parts, building its denoiser without weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2i_align.errors import ModelError
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.known import KNOWN
from t2i_align.generators.layouts import LAYOUTS, family_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


ASSETS = Path(__file__).parents[1] / "assets"
PROVENANCE = {"_name_or_path", "_diffusers_version", "transformers_version"}
BUNDLED = "bundled/"  # prefix of models that ship with the package


def local_path(name: str) -> Path:
    """A name as a path; ``bundled/NAME`` is a model of the package."""
    if name.startswith(BUNDLED):
        return ASSETS / name.removeprefix(BUNDLED)
    return Path(name).expanduser()


def local_or_hub(name: str) -> str:
    """What ``from_pretrained`` is given: an expanded path, or the hub id itself."""
    return str(local_path(name)) if looks_local(name) else name


def looks_local(name: str) -> bool:
    """Whether a name can only be meant as a path."""
    marked = name.startswith((".", "/", "~", BUNDLED))
    return marked or local_path(name).exists() or name.count("/") > 1


def find_folder(
    name: str, revision: str | None, variant: str | None, *, download: bool
) -> Path | None:
    """The local folder of a path or hub id; None if it is not here and may not be downloaded.

    Raises:
        ModelError: a path without a pipeline in it, or a hub id that cannot be fetched.
    """
    folder = local_path(name)
    if looks_local(name):
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"model.name_or_path: no diffusers pipeline at '{name}' (no model_index.json "
                "there)",
                "give the folder that DiffusionPipeline.save_pretrained wrote, or a hub id",
            )
        return folder
    from diffusers import DiffusionPipeline

    try:
        found = DiffusionPipeline.download(
            name, revision=revision, variant=variant, local_files_only=not download
        )
    except (OSError, ValueError) as error:
        if not download:
            return None
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"model.name_or_path: '{name}' is no local folder and could not be fetched from "
            f"the hub: {reason}",
            "check the spelling, the network, and for gated models `hf auth login`",
        ) from error
    return Path(str(found))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ModelError that names it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read {path}: {error}", "download or save the model again"
        ) from error


def family_name(index: dict[str, Any], options: DiffusersOptions) -> str:
    """The family of a pipeline: as the recipe says, else by its class."""
    if options.family != "auto":
        return options.family
    found = family_of(index["_class_name"])
    if found is None:
        known = sorted(p for layout in LAYOUTS.values() for p in layout.pipelines)
        raise ModelError(
            f"no family for pipeline class {index['_class_name']}; known: {', '.join(known)}",
            "set model.family if its denoiser is called like one of them",
        )
    return found


def fingerprint(folder: Path, parts: Iterable[str]) -> str:
    """SHA-256 over names and contents of all files of the named subfolders.

    Keys of config.json that say where a part was once saved or by which version do not count.
    """
    digest = hashlib.sha256()
    for part in sorted(parts):
        for file in sorted(p for p in (folder / part).rglob("*") if p.is_file()):
            digest.update(str(file.relative_to(folder)).encode())
            if file.name == "config.json":
                config = {k: v for k, v in read_json(file).items() if k not in PROVENANCE}
                digest.update(json.dumps(config, sort_keys=True).encode())
            else:
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def denoiser_class(index: dict[str, Any], component: str) -> type[nn.Module]:
    """The class of a component, from the library model_index.json names."""
    import diffusers

    _library, name = index[component]
    found = getattr(diffusers, name, None)
    if found is None:
        raise ModelError(
            f"{component} is a {name}, which this diffusers {diffusers.__version__} does not have"
        )
    return found


def meta_denoiser(
    cls: type[nn.Module], config: dict[str, Any], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The network without weights, on the meta device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return cls.from_config(config)  # type: ignore[attr-defined]
    finally:
        torch.set_default_dtype(before)


def load_denoiser(
    cls: type[nn.Module],
    folder: Path,
    component: str,
    dtype: torch.dtype,
    options: DiffusersOptions,
) -> nn.Module:
    """The network with its weights.

    Raises:
        ModelError: there are none, or not of the asked variant.
    """
    loader: Any = cls
    if options.denoiser_name_or_path is not None:
        return _other_denoiser(loader, options.denoiser_name_or_path, dtype)
    try:
        return loader.from_pretrained(
            folder, subfolder=component, dtype=dtype, variant=options.variant
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load the {component} of {options.name_or_path}: {str(error).splitlines()[0]}",
            "is the folder complete? check model.variant",
        ) from error


def _other_denoiser(loader: Any, name: str, dtype: torch.dtype) -> nn.Module:
    try:
        return loader.from_pretrained(local_or_hub(name), dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.denoiser_name_or_path: no weights of a {loader.__name__} in '{name}': "
            f"{str(error).splitlines()[0]}",
            "give the unet/ or transformer/ folder that a full fine-tuning run exported",
        ) from error


def vae_factor(folder: Path | None) -> int:
    """Pixels a latent pixel stands for: 8 unless the VAE's config says otherwise."""
    config = None if folder is None else folder / "vae" / "config.json"
    if config is None or not config.is_file():
        return 8
    return 2 ** (len(read_json(config)["block_out_channels"]) - 1)


def describe(
    options: DiffusersOptions,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Path | None]:
    """``(model_index, denoiser config, scheduler config, folder)`` without downloading anything.

    Hub ids that are not on this machine fall back on the table of known architectures.

    Raises:
        ModelError: an unknown hub id that is not on this machine.
    """
    folder = find_folder(options.name_or_path, options.revision, options.variant, download=False)
    if folder is None:
        if options.name_or_path not in KNOWN:
            raise ModelError(
                f"'{options.name_or_path}' is not on this machine and its architecture is not "
                "built in, "
                "so it cannot be checked without a download",
                f"download it first, or use one of: {', '.join(sorted(KNOWN))}",
            )
        entry = KNOWN[options.name_or_path]
        return entry.index, entry.denoiser, entry.scheduler, None
    index = read_json(folder / "model_index.json")
    component = LAYOUTS[family_name(index, options)].denoiser
    return (
        index,
        read_json(folder / component / "config.json"),
        read_json(folder / "scheduler" / "scheduler_config.json"),
        folder,
    )
