"""Adapters folded into the weights, and whole pipeline folders.

Each layer is merged in float32 and rounded once: W + dW, or for DoRA m (W + dW) / |W + dW|; the
formulas are peft's own (``merge``), the layers around the weights are then taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2i_align.errors import ModelError
from t2i_align.generators.diffusers_export import refuse_empty
from t2i_align.generators.quantize import Rounded

SHARD = "5GB"


def fold(module: nn.Module) -> int:
    """Replace every LoRA layer by its base layer with the adapter merged; returns how many.

    Raises:
        ModelError: there are none, or a merged weight is not finite.
    """
    from peft.tuners.lora import LoraLayer

    found = {name: m for name, m in module.named_modules() if isinstance(m, LoraLayer)}
    refuse_empty(found, type(module).__name__)
    for name, layer in found.items():
        parent_name, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent_name), own, _merged(layer, name))
    if hasattr(module, "peft_config"):
        del module.peft_config
    if hasattr(module, "_hf_peft_config_loaded"):
        module._hf_peft_config_loaded = False  # type: ignore[assignment]
    return len(found)


def _merged(layer: Any, name: str) -> nn.Module:
    base = layer.get_base_layer()
    rounded = isinstance(base, Rounded)  # its weight is rebuilt at each look, a merge would be lost
    if rounded or not base.weight.is_floating_point() or hasattr(base.weight, "quant_state"):
        raise ModelError(
            f"layer {name} is quantised, so nothing can be folded into it",
            "merge into the unquantised base model",
        )
    dtype = base.weight.dtype
    base.float()
    try:
        layer.float().merge(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"layer {name} cannot be merged: {error}") from error
    return base.to(dtype)


def save_pipeline(
    generator: Any, denoiser: nn.Module, folder: Path, dtype: torch.dtype, shard: str = SHARD
) -> list[str]:
    """Write a whole pipeline around a denoiser, as ``DiffusionPipeline.from_pretrained`` reads it.

    The other parts are the base model's, the VAE the recipe's; all are written in ``dtype``.

    Args:
        generator: a loaded :class:`DiffusersGenerator`.
        denoiser: without LoRA layers.
        folder: to write.
        dtype: of every part.
        shard: largest file.

    Returns:
        Names of what was written, relative to ``folder``.
    """
    import diffusers

    from t2i_align.generators import diffusers_folder as folders

    options, parts = generator.options, {}
    if options.vae_name_or_path:
        vae = folders.local_or_hub(options.vae_name_or_path)
        vae_class: Any = folders.denoiser_class(generator.index, "vae")
        parts["vae"] = vae_class.from_pretrained(vae, dtype=dtype)
    parts[generator.layout.denoiser] = denoiser.to(dtype)
    parts |= absent(generator.index)
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
        generator.folder, dtype=dtype, variant=options.variant, **parts
    )
    if options.prediction_type in ("epsilon", "sample", "v_prediction"):
        pipe.scheduler.register_to_config(prediction_type=options.prediction_type)
    pipe.save_pretrained(folder, safe_serialization=True, max_shard_size=shard)
    return sorted(p.name for p in folder.iterdir())


def absent(index: Mapping[str, Any]) -> dict[str, None]:
    """Parts a pipeline was saved without, e.g. SD3 without T5; its loader wants to be told so."""
    return {name: None for name, value in index.items() if value == [None, None]}


def merge_adapter(
    pipeline: str, adapter: Path, folder: Path, dtype: torch.dtype, shard: str = SHARD
) -> list[str]:
    """Fold an adapter file into a base model and write the pipeline.

    Args:
        pipeline: folder or hub id of the base model.
        adapter: file that ``load_lora_weights`` reads, or a peft folder.
        folder: to write.
        dtype: of every part.
        shard: largest file.

    Raises:
        ModelError: the adapter is not of this model.
    """
    import diffusers

    from t2i_align.generators.diffusers_export import load_adapter
    from t2i_align.generators.diffusers_folder import find_folder, read_json

    found = find_folder(pipeline, None, None, download=True)
    assert found is not None, "downloads or raises"
    parts = absent(read_json(found / "model_index.json"))
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(found, dtype=torch.float32, **parts)
    component = "unet" if "unet" in pipe.components else "transformer"
    load_adapter(pipe, component, getattr(pipe, component), str(adapter))
    for name in pipe.components:
        part = getattr(pipe, name)
        if isinstance(part, nn.Module) and hasattr(part, "peft_config"):
            fold(part)
    pipe.to(dtype=dtype)
    pipe.save_pretrained(folder, safe_serialization=True, max_shard_size=shard)
    return sorted(p.name for p in folder.iterdir())
