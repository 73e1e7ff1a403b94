"""Finding a pipeline folder, fingerprinting its parts, building its denoiser without weights."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from t2i_align.errors import ModelError
from t2i_align.generators.attention import computes_in, set_attention
from t2i_align.generators.diffusers_options import DiffusersOptions
from t2i_align.generators.distilled import (
    EXPERTS_FIX,
    MEANFLOW_FIX,
    experts_reason,
    meanflow_reason,
    refiner_reason,
)
from t2i_align.generators.known import KNOWN
from t2i_align.generators.layout_checks import check_pipeline
from t2i_align.generators.layouts import FAMILIES, FamilyLayout, declared, family_of, layout_of
from t2i_align.generators.quantize import quantize
from t2i_align.later import importing
from t2i_align.plain_json import loads

LOADING = (  # what a library answers a broken folder with
    *(OSError, ValueError, TypeError, AttributeError, LookupError),
    *(UnpicklingError, SafetensorError),
)
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
    marked = name.startswith((".", "/", "~", BUNDLED)) or name.count("/") > 1
    try:
        return marked or local_path(name).exists()
    except OSError:  # too long for a file name
        return False


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
        found = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read {path}: {error}", "download or save the model again"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object", "download or save the model again")
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's ``model_index.json``.

    Raises:
        ModelError: its class or a part is not named as a pipeline names them: code of its own is
            not run, and a part is a folder inside.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(
            f"{path}: _class_name is {index.get('_class_name')!r}, not a class of diffusers",
            "pipelines with code of their own are not loaded; use a stock pipeline",
        )
    for name, value in index.items():
        if not isinstance(value, list) or name.startswith("_"):
            continue
        pair = len(value) == 2 and all(isinstance(v, str | None) for v in value)
        if not pair or not name.isidentifier():
            raise ModelError(
                f"{path}: the part {name[:80]!r} is not [library, class] in a folder of the model",
                "download or save the model again",
            )
    return index


def family(index: dict[str, Any], options: DiffusersOptions) -> tuple[str, FamilyLayout]:
    """The family of a pipeline and its layout: as the recipe says, else by its class.

    Raises:
        ModelError: no family has it, it is a refiner, or it has two experts.
    """
    refiner = refiner_reason(index)
    if refiner is not None:
        raise ModelError(f"model.name_or_path: {refiner}", "train the base model instead")
    experts = experts_reason(index)
    if experts is not None:
        raise ModelError(f"model.name_or_path: {experts}", EXPERTS_FIX)
    if options.layout is not None:
        check_pipeline(index, options, options.layout)
        return "declared", declared(options.layout)
    if options.family != "auto":
        return options.family, layout_of(options.family)
    found = family_of(index["_class_name"])
    if found is None:
        known = sorted(p for name in FAMILIES for p in layout_of(name).pipelines)
        raise ModelError(
            f"no family for pipeline class {index['_class_name']}; known: {', '.join(known)}",
            "describe how its denoiser is called in model.layout, or set model.family if it is "
            "called like one of them",
        )
    return found, layout_of(found)


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
    with importing():
        found = getattr(diffusers, name, None)
    if not isinstance(found, type):
        raise ModelError(
            f"{component} is a {name}, which this diffusers {diffusers.__version__} does not have"
        )
    return found


def own_parts(
    pipeline: type, index: dict[str, Any], folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Components of classes that diffusers names but finds only in the pipeline's own module.

    So are the text encoders of deprecated pipelines (AltDiffusion's).
    """
    import diffusers

    own = vars(sys.modules[pipeline.__module__])
    stored = {k: v[1] for k, v in index.items() if isinstance(v, list) and v[0] != "transformers"}
    hidden = {k: own[v] for k, v in stored.items() if v in own and not hasattr(diffusers, v)}
    return {k: v.from_pretrained(folder / k, dtype=dtype) for k, v in hidden.items()}


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
    except LOADING as error:
        raise ModelError(
            f"cannot load the {component} of {options.name_or_path}: {str(error).splitlines()[0]}",
            "is the folder complete? check model.variant",
        ) from error


def prepared(
    net: nn.Module,
    options: DiffusersOptions,
    device: torch.device,
    names: Iterable[str],
    mixed_precision: str = "no",
) -> nn.Module:
    """A loaded network on its device, quantised and with the attention kernel of the recipe.

    Args:
        net: on the CPU or the meta device.
        options: the recipe's ``model`` section.
        device: where it goes.
        names: of its conditioning, as far as they are known.
        mixed_precision: of the autocast it will run in.

    Raises:
        ModelError: it would be trained although it is quantised, or the kernel is not usable.
    """
    if options.quantization is not None:
        if options.lora is None:
            raise ModelError(
                "model.quantization: rounded weights have no gradient, so they are not trained",
                "add model.lora, or remove model.quantization",
            )
        net = quantize(net, options.quantization, device)
    masked = any("mask" in name for name in names)
    dtype = computes_in(options.dtype, mixed_precision)
    set_attention(net, options.attention, device, dtype, masked=masked)
    return net.to(device)


def _other_denoiser(loader: Any, name: str, dtype: torch.dtype) -> nn.Module:
    try:
        return loader.from_pretrained(local_or_hub(name), dtype=dtype)
    except LOADING as error:
        raise ModelError(
            f"model.denoiser_name_or_path: no weights of a {loader.__name__} in '{name}': "
            f"{str(error).splitlines()[0]}",
            "give the unet/ or transformer/ folder that a full fine-tuning run exported",
        ) from error


def vae_config(folder: Path | None) -> dict[str, Any]:
    """The VAE's config; empty if it is not here, which the families read as their usual VAE."""
    config = None if folder is None else folder / "vae" / "config.json"
    return {} if config is None or not config.is_file() else read_json(config)


def describe(
    options: DiffusersOptions,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Path | None]:
    """``(model_index, denoiser config, scheduler config, folder)`` without downloading anything.

    Hub ids that are not on this machine fall back on the table of known architectures.

    Raises:
        ModelError: an unknown hub id that is not on this machine, or a network that is told more
            than a noise level.
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
    index = read_index(folder)
    component = family(index, options)[1].denoiser
    denoiser = read_json(folder / component / "config.json")
    meanflow = meanflow_reason(index, denoiser)
    if meanflow is not None:
        raise ModelError(f"model.name_or_path: {meanflow}", MEANFLOW_FIX)
    return (
        index,
        denoiser,
        read_json(folder / "scheduler" / "scheduler_config.json"),
        folder,
    )
