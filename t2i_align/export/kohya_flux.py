"""FLUX adapters in the names of the original checkpoint, where several layers are one.

The original computes query, key and value of a double block in one layer, and query, key, value
and the MLP's first half of a single block in one. Adapters of the parts p with factors A_p
(r_p, in) and B_p (out_p, r_p) and scales s_p become one adapter of the whole,

    (1)  A = [A_1; A_2; ...]     B = diag(s_1 B_1, s_2 B_2, ...)

whose product stacks the parts' updates. A part that is not adapted has rows of zeros in B. Scales
are inside B, so alpha is the rank of the whole. The last layer's modulation has its halves (shift,
scale) in the other order than diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.export.adapter import LowRank

DOUBLE = {
    "attn.to_out.0": "img_attn_proj",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp_0",
    "ff.net.2": "img_mlp_2",
    "ff_context.net.0.proj": "txt_mlp_0",
    "ff_context.net.2": "txt_mlp_2",
    "norm1.linear": "img_mod_lin",
    "norm1_context.linear": "txt_mod_lin",
}
SINGLE = {"proj_out": "linear2", "norm.linear": "modulation_lin"}
WHOLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in_in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in_out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in_in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in_out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in_in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in_out_layer",
    "norm_out.linear": "final_layer_adaLN_modulation_1",
    "proj_out": "final_layer_linear",
}
SWAPPED = "final_layer_adaLN_modulation_1"
# fused layer -> its parts in order, each with its rows in units of the model's width
DOUBLE_FUSED = {
    "img_attn_qkv": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1},
    "txt_attn_qkv": {"attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1},
}
MLP_RATIO = 4
SINGLE_FUSED = {"linear1": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": MLP_RATIO}}
BLOCK = re.compile(r"(?P<kind>single_)?transformer_blocks\.(?P<i>\d+)\.(?P<rest>.+)")


def flux_tensors(layers: dict[str, LowRank], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every layer, fused where the original is."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    fused: dict[str, dict[str, LowRank]] = {}
    orders: dict[str, dict[str, int]] = {}
    out: dict[str, Tensor] = {}
    for name, layer in layers.items():
        key, part, order = original_name(name)
        if order:
            fused.setdefault(key, {})[part] = layer
            orders[key] = order
        else:
            out |= triple(key, layer.down, _up(key, layer))
    for key, parts in fused.items():
        out |= triple(key, *fuse(parts, {p: rows * width for p, rows in orders[key].items()}))
    return out


def original_name(name: str) -> tuple[str, str, dict[str, int]]:
    """The original layer, which part of it this is, and its parts (none where it is the whole).

    Raises:
        ModelError: the original has no such layer.
    """
    if name in WHOLE:
        return WHOLE[name], "", {}
    found = BLOCK.fullmatch(name)
    if found is not None:
        single, rest = bool(found["kind"]), found["rest"]
        block = f"{'single' if single else 'double'}_blocks_{found['i']}"
        plain = (SINGLE if single else DOUBLE).get(rest)
        if plain is not None:
            return f"{block}_{plain}", "", {}
        for fused, parts in (SINGLE_FUSED if single else DOUBLE_FUSED).items():
            if rest in parts:
                return f"{block}_{fused}", rest, parts
    raise ModelError(
        f"layer {name} has no name in kohya's FLUX format", "use --format peft or merged"
    )


def fuse(parts: Mapping[str, LowRank], rows: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Eq. (1): A ``(sum r, in)`` and B ``(sum out, sum r)``.

    Args:
        parts: the adapted ones, by name.
        rows: all parts of the layer in order, with their outputs.
    """
    down = torch.cat([parts[p].down for p in rows if p in parts])
    blocks, column = [], 0
    for part, num_rows in rows.items():
        block = down.new_zeros(num_rows, down.shape[0])
        if part in parts:
            up, rank = parts[part].up * parts[part].scale, parts[part].rank
            if up.shape[0] != num_rows:
                raise ModelError(f"layer {part} has {up.shape[0]} outputs, not {num_rows}")
            block[:, column : column + rank] = up
            column += rank
        blocks.append(block)
    return down, torch.cat(blocks)


def _up(key: str, layer: LowRank) -> Tensor:
    up = layer.up * layer.scale
    if key != SWAPPED:
        return up
    scale, shift = up.chunk(2)
    return torch.cat([shift, scale])


def triple(key: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The three tensors of a layer whose scale is inside B."""
    name = f"lora_unet_{key}"
    alpha = down.new_tensor(float(down.shape[0]))
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
