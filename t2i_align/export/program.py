"""The verb ``export``: from a run or an adapter file to a folder with a card.

    run      -> checkpoint -> adapter -> peft | kohya file        no weights of the base are read
    run      -> checkpoint -> network -> folded -> merged pipeline
    adapter file + base model         -> the same three

A folder is built under a temporary name, so it exists wholly or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from t2i_align.cite import citations
from t2i_align.errors import ModelError, OutputError
from t2i_align.export import kohya, merge
from t2i_align.export.adapter import (
    FILE,
    PEFT_FILE,
    Adapter,
    find_file,
    from_module,
    read_adapter,
    write_adapter,
)
from t2i_align.export.card import CARD, Facts, is_hub_id, read_summary, render, run_facts, shorten
from t2i_align.export.trained import Trained, last_round, open_run, put
from t2i_align.train.checkpoint import atomic_folder
from t2i_align.train.output import RUN_FILE

Form = Literal["peft", "kohya", "merged"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        source: a run's ``output_dir``, or an adapter file or folder.
        form: format.
        out: folder to write; must not exist or be empty.
        dtype: precision; None keeps the adapter's float32, or the recipe's ``model.dtype``.
        checkpoint: ``latest`` or a step.
        averaged: see :func:`open_run`.
        model: base model of an adapter file, or where a run's base model is now.
        scores: results of ``t2i-align eval`` for the card.
        shard: largest file of a merged pipeline.
    """

    source: Path
    form: Form
    out: Path
    dtype: str | None = None
    checkpoint: str = "latest"
    averaged: bool | None = None
    model: str | None = None
    scores: Sequence[Path] = field(default_factory=tuple)
    shard: str = merge.SHARD


def export(request: Request) -> list[str]:
    """Write the folder; returns the names in it.

    Raises:
        ModelError: nothing to export, or not in this format.
        OutputError: ``out`` is in use.
        DataError: ``scores`` cannot be read.
    """
    out = request.out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"--out: {out} exists", "choose a new folder; nothing was touched")
    scores = [read_summary(path) for path in request.scores]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as folder:
        facts = _from_file(request, folder) if is_adapter(request) else _from_run(request, folder)
        card = replace(facts, scores=scores, usage=usage(facts, out.name), title=out.name)
        (folder / CARD).write_text(render(card), encoding="utf-8")
    return sorted(p.name for p in out.iterdir())


def is_adapter(request: Request) -> bool:
    """Whether the source is an adapter and no run, which takes a base model beside it.

    Raises:
        ModelError: it is, and there is no ``--model``.
    """
    path = request.source.expanduser()
    is_run = (last_round(path) / RUN_FILE).is_file()
    alone = path.is_file() or (not is_run and any((path / f).is_file() for f in (FILE, PEFT_FILE)))
    if alone and request.model is None:
        raise ModelError(
            f"{path} is an adapter, which does not say what it was trained on",
            "name the base model with --model",
        )
    return alone


# -- a run


def _from_run(request: Request, folder: Path) -> Facts:
    run = open_run(request.source, request.checkpoint, request.averaged, request.model)
    if run.options.lora is None and request.form != "merged":
        raise ModelError(
            f"--format {request.form}: this run trained all weights, so it has no adapter",
            "use --format merged",
        )
    if request.form == "merged":
        write = _merged
    else:
        write = _adapter_file if is_pipeline_with_lora(run) else _own_format
    write(run, request, folder)
    return facts_of(run, request)


def is_pipeline_with_lora(run: Trained) -> bool:
    """Whether a stock pipeline loads the run's adapters; PixArt's, for one, loads none."""
    import diffusers

    if run.type != "diffusers":
        return False
    generator = run.recipe.chosen("model")(run.options, "meta")
    return hasattr(getattr(diffusers, generator.index["_class_name"]), "load_lora_weights")


def _adapter_file(run: Trained, request: Request, folder: Path) -> None:
    """The peft or kohya file of a diffusers run; its network is built without weights."""
    generator = run.generator("meta")
    adapter = from_module(generator.module, run.weights, generator.layout.denoiser)
    if request.form == "peft":
        write_adapter(adapter.to(DTYPES[request.dtype or "float32"]), folder / FILE)
        return
    options = run.options.model_dump()
    size = options["resolution"]
    facts = {
        "ss_seed": run.recipe.seed,
        "ss_learning_rate": run.recipe.train.learning_rate,
        "ss_steps": int(run.checkpoint.name.removeprefix("step-")),
        "ss_sd_model_name": shorten(options["name_or_path"]),
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(
            generator.prediction, generator.prediction
        ),
    }
    write_kohya(adapter, generator.index["_class_name"], generator.config, request, folder, facts)


def _own_format(run: Trained, request: Request, folder: Path) -> None:
    """The adapter of a generator that is no diffusers pipeline, as it writes it itself."""
    if request.form == "kohya":
        made = run.recipe.chosen("model")(run.options, "meta") if run.type == "diffusers" else None
        kohya.format_of(made.index["_class_name"] if made else f"model.type {run.type}")
    generator = run.generator("cpu")
    put(generator.module, run.weights)
    if request.dtype is not None:
        generator.module.to(DTYPES[request.dtype])
    generator.export(str(folder))


def _merged(run: Trained, request: Request, folder: Path) -> None:
    generator = run.generator("cpu")
    module = generator.module
    put(module, run.weights)
    if run.options.lora is not None:
        merge.fold(module)
    dtype = DTYPES[request.dtype or run.options.dtype]
    if run.type == "diffusers":
        merge.save_pipeline(generator, module, folder, dtype, request.shard)
        return
    module.to(dtype)
    generator.options = generator.options.model_copy(update={"lora": None})
    generator.export(str(folder))


def library_of(run: Trained, request: Request) -> str | None:
    """The hub's name of what loads the export, where it has one."""
    if request.form == "merged":
        return "diffusers" if run.type == "diffusers" else None
    return "diffusers" if is_pipeline_with_lora(run) else "peft"


def facts_of(run: Trained, request: Request) -> Facts:
    """What the card says of a run."""
    recipe, options = run.recipe.to_dict(), run.options
    objective, bits = recipe["objective"]["type"], recipe["model"].get("quantization")
    rows = {
        "objective": f"`{objective}`",
        "data": f"`{recipe['data'].get('hub_id') or recipe['data']['type']}`",
        "checkpoint": run.checkpoint.name + (" (averaged weights)" if run.averaged else ""),
        "trained": "all weights" if options.lora is None else f"LoRA, rank {options.lora.r}",
        **({"precision": request.dtype} if request.dtype else {}),
        **({"base weights in training": bits["type"]} if bits else {}),
        **run_facts(run.folder),
    }
    tags = ["t2i-align", objective, *(["lora"] if request.form != "merged" else [])]
    return Facts(
        title=request.out.name,
        form=request.form,
        base=options.name_or_path,
        library=library_of(run, request),
        usage=(),
        tags=tags,
        recipe=recipe,
        facts=rows,
        citations=citations(run.recipe),
    )


# -- an adapter file


def _from_file(request: Request, folder: Path) -> Facts:
    from t2i_align.generators.diffusers_folder import find_folder, read_json

    assert request.model is not None
    adapter, dtype = read_adapter(request.source), DTYPES[request.dtype or "float32"]
    if request.form == "merged":
        file = find_file(request.source)
        source = file.parent if file.name == PEFT_FILE else file  # peft reads folders
        merge.merge_adapter(request.model, source, folder, dtype, request.shard)
    elif request.form == "peft":
        write_adapter(adapter.to(dtype), folder / adapter.file)
    else:
        found = find_folder(request.model, None, None, download=True)
        assert found is not None
        name = read_json(found / "model_index.json")["_class_name"]
        config = read_json(found / kohya.format_of(name).component / "config.json")
        facts = {"ss_sd_model_name": shorten(request.model)}
        write_kohya(adapter, name, config, request, folder, facts)
    rows = {"adapter": f"`{request.source.name}`", "layers": len(adapter.layers)}
    tags = ["t2i-align", *(["lora"] if request.form != "merged" else [])]
    library = "peft" if request.form == "peft" and adapter.file == PEFT_FILE else "diffusers"
    return Facts(request.out.name, request.form, request.model, library, (), tags, facts=rows)


def write_kohya(
    adapter: Adapter,
    pipeline_class: str,
    config: Mapping[str, Any],
    request: Request,
    folder: Path,
    facts: Mapping[str, Any],
) -> None:
    """One ``.safetensors`` called like the export, with kohya's metadata."""
    from safetensors.torch import save_file

    form = kohya.versioned(kohya.format_of(pipeline_class), config)
    tensors = kohya.convert(adapter, pipeline_class, config)
    if request.dtype is not None:
        tensors = {k: v.to(DTYPES[request.dtype]) for k, v in tensors.items()}
    known = {"title": request.out.name, "date": datetime.now(UTC).isoformat("T", "seconds")}
    metadata = kohya.metadata(adapter, form, known | dict(facts))
    save_file(tensors, folder / f"{request.out.name}.safetensors", metadata=metadata)


def usage(facts: Facts, name: str) -> list[str]:
    """Python that loads the export; the base model by its hub id, or a placeholder."""
    if facts.library == "peft":
        return [
            "from peft import PeftModel",
            "",
            f'model = PeftModel.from_pretrained(model, "{name}")',
        ]
    if facts.library != "diffusers":
        return []
    load = "pipe = DiffusionPipeline.from_pretrained"
    head = "from diffusers import DiffusionPipeline"
    if facts.form == "merged":
        return [head, "", f'{load}("{name}")']
    base = facts.base if is_hub_id(facts.base) else "BASE_MODEL"
    weight = f', weight_name="{name}.safetensors"' if facts.form == "kohya" else ""
    return [head, "", f'{load}("{base}")', f'pipe.load_lora_weights("{name}"{weight})']
