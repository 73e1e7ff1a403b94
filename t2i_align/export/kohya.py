"""Adapters in the one-file formats of kohya's scripts, A1111 and ComfyUI.

A layer called ``name`` becomes three tensors,

    lora_unet_<name, "." as "_">.lora_down.weight     A
    lora_unet_<name>.lora_up.weight                   B
    lora_unet_<name>.alpha                            alpha: the update is alpha / r B A

and what differs is how a family's layers are called. SD 1.x keeps diffusers' names. SDXL is named
after the original checkpoint (``input_blocks_4_1_...``). FLUX too, and there one original layer is
several of diffusers' (``kohya_flux``). SD3 has no such names that stock diffusers reads: ComfyUI
reads diffusers' own names there (``transformer.<name>.lora_A.weight``, no alpha), so that is what
is written, with the scale folded into B.

Stock diffusers reads alphas that differ between attention layers wrongly, so all layers get one
alpha here and what is left of the scale goes into B; the update stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.export.adapter import Adapter, LowRank, common, exact
from t2i_align.export.kohya_flux import flux_tensors

TensorDict = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """How one pipeline class is written.

    Args:
        convert: layers by name inside the denoiser, and its config, to tensors.
        component: the denoiser's name.
        base: kohya's ``ss_base_model_version``.
        architecture: ``modelspec.architecture``.
        implementation: ``modelspec.implementation``.
    """

    convert: Callable[[dict[str, LowRank], Mapping[str, Any]], TensorDict]
    component: str
    base: str
    architecture: str
    implementation: str


# -- names


def sd_tensors(layers: dict[str, LowRank], config: Mapping[str, Any]) -> TensorDict:
    """SD 1.x: diffusers' names."""
    return spelt({name: name for name in layers}, layers)


def sdxl_tensors(layers: dict[str, LowRank], config: Mapping[str, Any]) -> TensorDict:
    """SDXL: names of the original checkpoint."""
    per_block = config["layers_per_block"]
    if not isinstance(per_block, int):
        raise ModelError("a UNet whose blocks differ in layers_per_block has no kohya names")
    names = {name: sgm_name(name, per_block, config["down_block_types"]) for name in layers}
    return spelt(names, layers)


def spelt(names: Mapping[str, str], layers: Mapping[str, LowRank]) -> TensorDict:
    """Three tensors a layer, all with the commonest alpha."""
    alpha = common(exact(x.scale * x.rank) for x in layers.values()) or 1
    out: TensorDict = {}
    for name, x in layers.items():
        key = f"lora_unet_{names[name].replace('.', '_')}"
        left = x.scale * x.rank / alpha
        out[f"{key}.lora_down.weight"] = x.down
        out[f"{key}.lora_up.weight"] = x.up if left == 1.0 else x.up * left
        out[f"{key}.alpha"] = x.down.new_tensor(float(alpha))
    return out


WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(?P<side>down|up)_blocks\.(?P<i>\d+)\.(?P<part>\w+)\.(?P<j>\d+)\.(?P<rest>.+)")
MIDDLE = re.compile(r"mid_block\.(?P<part>resnets|attentions)\.(?P<j>\d+)\.(?P<rest>.+)")


def sgm_name(name: str, per_block: int, down_types: list[str]) -> str:
    """A UNet layer as the original SDXL checkpoint calls it.

    The original numbers what diffusers nests: input block 0 is ``conv_in``; a level of L resnets
    has the blocks ``1 + i (L + 1) + j``, its downsampler the last of them; a level of the way up
    has ``i (L + 1) + j`` with L + 1 resnets. Inside a block come the resnet, the attention if any,
    then the upsampler.

    Args:
        name: inside the UNet.
        per_block: L.
        down_types: block classes, which tell where attention is.

    Raises:
        ModelError: the original has no such layer.
    """
    if name in WHOLE:
        return WHOLE[name]
    if middle := MIDDLE.fullmatch(name):
        j = int(middle["j"])
        index = 2 * j if middle["part"] == "resnets" else 2 * j + 1
        return f"middle_block.{index}.{_inner(middle['part'], middle['rest'])}"
    found = BLOCK.fullmatch(name)
    if found is None:
        raise ModelError(
            f"layer {name} has no name in kohya's SDXL format", "use --format peft or merged"
        )
    first, j, part = int(found["i"]) * (per_block + 1), int(found["j"]), found["part"]
    inner = _inner(part, found["rest"])
    place = {"resnets": 0, "attentions": 1}.get(part)
    if part == "downsamplers":
        return f"input_blocks.{1 + first + per_block}.0.op"
    if part == "upsamplers":
        attends = "CrossAttn" in down_types[-1 - int(found["i"])]
        return f"output_blocks.{first + per_block}.{2 if attends else 1}.conv"
    if found["side"] == "down":
        return f"input_blocks.{1 + first + j}.{place}.{inner}"
    return f"output_blocks.{first + j}.{place}.{inner}"


def _inner(part: str, rest: str) -> str:
    return RESNET.get(rest, rest) if part == "resnets" else rest


def sd3_tensors(layers: dict[str, LowRank], config: Mapping[str, Any]) -> TensorDict:
    """SD3 as ComfyUI reads it: diffusers' names, no alpha."""
    out: TensorDict = {}
    for name, x in layers.items():
        out[f"transformer.{name}.lora_A.weight"] = x.down
        out[f"transformer.{name}.lora_B.weight"] = x.up * x.scale
    return out


SGM = "https://github.com/Stability-AI/generative-models"
FLUX = "https://github.com/black-forest-labs/flux"
FORMATS = {
    "StableDiffusionPipeline": Format(
        sd_tensors, "unet", "sd_v1", "stable-diffusion-v1/lora", "diffusers"
    ),
    "StableDiffusionXLPipeline": Format(
        sdxl_tensors, "unet", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", SGM
    ),
    "StableDiffusion3Pipeline": Format(
        sd3_tensors, "transformer", "sd3", "stable-diffusion-3/lora", SGM
    ),
    "FluxPipeline": Format(flux_tensors, "transformer", "flux1", "flux-1-dev/lora", FLUX),
}


# -- writing


def convert(adapter: Adapter, pipeline_class: str, config: Mapping[str, Any]) -> TensorDict:
    """An adapter's tensors in kohya's names.

    Args:
        adapter: its layers under the pipeline's denoiser.
        pipeline_class: ``_class_name`` of model_index.json.
        config: the denoiser's config.

    Raises:
        ModelError: the family has no such format, the adapter is DoRA or trains something else.
    """
    form = format_of(pipeline_class)
    if adapter.is_dora:
        raise ModelError(
            "kohya's format of a DoRA adapter is not read by stock diffusers, which drops its "
            "magnitudes without an error",
            "use --format peft or merged",
        )
    prefix = f"{form.component}."
    odd = sorted(name for name in adapter.layers if not name.startswith(prefix))
    if odd:
        raise ModelError(
            f"layer {odd[0]} is not in the {form.component}; only that is converted",
            "use --format peft",
        )
    layers = {name.removeprefix(prefix): x for name, x in adapter.layers.items()}
    tensors = form.convert(layers, config)
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def format_of(pipeline_class: str) -> Format:
    """How a pipeline class is written.

    Raises:
        ModelError: nobody reads its adapters in such a format.
    """
    if pipeline_class not in FORMATS:
        raise ModelError(
            f"--format kohya: there is no kohya format for {pipeline_class}; there is one for "
            f"{', '.join(FORMATS)}",
            "use --format peft, which ComfyUI reads for most newer families, or merged",
        )
    return FORMATS[pipeline_class]


def versioned(form: Format, config: Mapping[str, Any]) -> Format:
    """The version of a family that shares its pipeline class with another, by its config."""
    if form.base == "sd_v1" and config.get("cross_attention_dim") == 1024:
        return replace(form, base="sd_v2", architecture="stable-diffusion-v2-512/lora")
    if form.base == "flux1" and config.get("guidance_embeds") is False:
        return replace(form, architecture="flux-1-schnell/lora")
    return form


def metadata(adapter: Adapter, form: Format, facts: Mapping[str, Any]) -> dict[str, str]:
    """``ss_`` fields of kohya's scripts and the ModelSpec fields, as far as they are known.

    Args:
        adapter: what is written.
        form: its format.
        facts: ``title``, ``date`` (ISO 8601), and what else is known under its full key.
    """
    ranks = [x.rank for x in adapter.layers.values()]
    alphas = [exact(x.scale * x.rank) for x in adapter.layers.values()]
    known = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": common(ranks),
        "ss_network_alpha": common(alphas),
        "ss_base_model_version": form.base,
        "ss_v2": form.base == "sd_v2",
        "ss_output_name": facts["title"],
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": form.architecture,
        "modelspec.implementation": form.implementation,
        "modelspec.title": facts["title"],
        "modelspec.date": facts["date"],
    }
    more = {k: v for k, v in facts.items() if k.startswith(("ss_", "modelspec."))}
    return {k: str(v) for k, v in (known | more).items() if v is not None}
