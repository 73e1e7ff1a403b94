"""CLIP's weights under two sets of names: open_clip's and transformers'.

The names differ line by line (:data:`TABLE`). Beyond names, open_clip keeps query, key and value of
an attention in one matrix (rows in that order) and multiplies by its two projections from the left,
so transformers' are their transposes. Published files of either layout load into one network
(transformers' ``CLIPModel``), and back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from t2i_align.judges.key_map import renamed

BLOCK = (
    ("ln_1.{rest}", "layer_norm1.{rest}"),
    ("ln_2.{rest}", "layer_norm2.{rest}"),
    ("attn.q.{rest}", "self_attn.q_proj.{rest}"),
    ("attn.k.{rest}", "self_attn.k_proj.{rest}"),
    ("attn.v.{rest}", "self_attn.v_proj.{rest}"),
    ("attn.out_proj.{rest}", "self_attn.out_proj.{rest}"),
    ("mlp.c_fc.{rest}", "mlp.fc1.{rest}"),
    ("mlp.c_proj.{rest}", "mlp.fc2.{rest}"),
)
TABLE = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.{rest}", "vision_model.pre_layrnorm.{rest}"),  # their spelling
    ("visual.ln_post.{rest}", "vision_model.post_layernorm.{rest}"),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.{rest}", "text_model.final_layer_norm.{rest}"),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
    *((f"visual.transformer.resblocks.{{n}}.{a}", f"vision_model.encoder.layers.{{n}}.{b}")
      for a, b in BLOCK),
    *((f"transformer.resblocks.{{n}}.{a}", f"text_model.encoder.layers.{{n}}.{b}")
      for a, b in BLOCK),
)  # fmt: skip
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
BUFFERS = ("position_ids", "attn_mask")  # constants that older files carry


def is_open_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are open_clip's."""
    return "visual.conv1.weight" in tensors


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without constants, and without the prefix ``model.`` or ``module.`` of a wrapper."""
    kept = {k: v for k, v in tensors.items() if not k.endswith(BUFFERS)}
    for prefix in ("model.", "module."):
        if kept and all(k.startswith(prefix) for k in kept):
            kept = {k.removeprefix(prefix): v for k, v in kept.items()}
    return kept


def to_transformers(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Weights of either layout under transformers' names.

    Args:
        tensors: a published file.
        what: the checkpoint, as messages call it.

    Raises:
        ModelError: names of neither layout.
    """
    tensors = plain(tensors)
    if not is_open_clip(tensors):
        return renamed(renamed(tensors, TABLE, what, back=True), TABLE, what)
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, found, kind = name.partition("attn.in_proj_")
        if not found:
            split[name] = tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            split[f"{head}attn.{part}.{kind}"] = rows
    made = renamed(split, TABLE, what)
    return made | {k: made[k].T.contiguous() for k in TRANSPOSED if k in made}


def to_open_clip(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The inverse, from transformers' names to open_clip's.

    Raises:
        ModelError: names that transformers' CLIPModel does not have.
    """
    tensors = plain(tensors)
    turned = {k: v.T.contiguous() if k in TRANSPOSED else v for k, v in tensors.items()}
    made = renamed(turned, TABLE, what, back=True)
    for name in [n for n in made if ".attn.q." in n]:
        head, _, kind = name.partition("attn.q.")
        rows = [made.pop(f"{head}attn.{part}.{kind}") for part in "qkv"]
        made[f"{head}attn.in_proj_{kind}"] = torch.cat(rows)
    return made
