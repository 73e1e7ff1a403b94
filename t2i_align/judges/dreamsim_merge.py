"""Published DreamSim files into one file of plain weights.

The release holds, for each of three ViT-B/16 in DINO's layout, the pretrained weights and a LoRA of
the attention's joint query-key-value matrix,

    (1)  W = W_0 + (alpha / r) B A

A folder for the merge holds the release unzipped, and DINO's own backbone file:

    dino_vitbase16_pretrain.pth          of DINO; the release has only its projection head
    clip_vitb16_pretrain.pth.tar         {"state_dict": ...} with ``proj``
    open_clip_vitb16_pretrain.pth.tar    the same
    {dino,clip,open_clip}_vitb16_lora/   adapter_config.json, adapter_model.bin or .safetensors

``pos_drop`` of the CLIPs is their layer norm before the blocks. Their patch bias must be 0, since
CLIP has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.judges.key_map import renamed
from t2i_align.judges.weights import combined, load_tensors, sha256_of
from t2i_align.plain_json import load_object

BASES = {
    "dino": "dino_vitbase16_pretrain.pth",
    "clip": "clip_vitb16_pretrain.pth.tar",
    "open_clip": "open_clip_vitb16_pretrain.pth.tar",
}
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
LORA = re.compile(r"blocks\.(?P<n>\d+)\.attn\.qkv\.lora_(?P<side>[AB])(\.\w+)?\.weight$")

BLOCKS = (
    ("norm1.{rest}", "layernorm_before.{rest}", "layer_norm1.{rest}"),
    ("norm2.{rest}", "layernorm_after.{rest}", "layer_norm2.{rest}"),
    ("attn.q.{rest}", "attention.q_proj.{rest}", "self_attn.q_proj.{rest}"),
    ("attn.k.{rest}", "attention.k_proj.{rest}", "self_attn.k_proj.{rest}"),
    ("attn.v.{rest}", "attention.v_proj.{rest}", "self_attn.v_proj.{rest}"),
    ("attn.proj.{rest}", "attention.o_proj.{rest}", "self_attn.out_proj.{rest}"),
    ("mlp.fc1.{rest}", "mlp.fc1.{rest}", "mlp.fc1.{rest}"),
    ("mlp.fc2.{rest}", "mlp.fc2.{rest}", "mlp.fc2.{rest}"),
)
DINO = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.{rest}", "embeddings.patch_embeddings.projection.{rest}"),
    *((f"blocks.{{n}}.{a}", f"layers.{{n}}.{b}") for a, b, _ in BLOCKS),
)
CLIP = (
    ("cls_token", "vision_model.embeddings.class_embedding"),
    ("pos_embed", "vision_model.embeddings.position_embedding.weight"),
    ("patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("pos_drop.{rest}", "vision_model.pre_layrnorm.{rest}"),  # their spelling
    ("norm.{rest}", "vision_model.post_layernorm.{rest}"),
    ("proj", "visual_projection.weight"),
    *((f"blocks.{{n}}.{a}", f"vision_model.encoder.layers.{{n}}.{c}") for a, _, c in BLOCKS),
)


def needed(folder: Path) -> list[Path]:
    """The files of a merge, in a fixed order.

    Raises:
        ModelError: some are missing; names them all.
    """
    found, missing = [], []
    for name, base in BASES.items():
        adapter = folder / f"{name}_vitb16_lora"
        either = next((p for a in ADAPTERS if (p := adapter / a).is_file()), None)
        wanted = [folder / base, adapter / "adapter_config.json", either or adapter / ADAPTERS[1]]
        found += wanted
        missing += [str(p.relative_to(folder)) for p in wanted if not p.is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing)}",
            "unzip DreamSim's release there (v0.1.0, dreamsim_checkpoint.zip) and add DINO's "
            f"{BASES['dino']}",
        )
    return found


def folder_hash(folder: Path) -> str:
    """SHA-256 over names and contents of the files of a merge."""
    files = needed(folder)
    return combined(f"{p.relative_to(folder).as_posix()}\0{sha256_of(p)}" for p in files)


def merge(folder: Path, sha256: str | None) -> dict[str, Tensor]:
    """Eq. (1) for all three, under the names of :class:`t2i_align.judges.dreamsim.Ensemble`.

    Args:
        folder: see the module.
        sha256: what :func:`folder_hash` must give; pickles are not read without it.

    Raises:
        ModelError: files missing, changed, or not as published.
    """
    found = folder_hash(folder)
    if sha256 is None:
        raise ModelError(
            "DreamSim's files are pickles, which may run code, and no sha256 is known for them",
            f"compare their own hashes with the publisher's, then give --sha256 {found}",
        )
    if sha256 != found:
        raise ModelError(
            f"the files of {folder} have the joint sha256 {found}, not {sha256}", "bring them again"
        )
    made: dict[str, Tensor] = {}
    for name, base in BASES.items():
        weights = _checked(folder / base)
        for number, change in _lora(folder / f"{name}_vitb16_lora").items():
            key = f"blocks.{number}.attn.qkv.weight"
            if key not in weights or weights[key].shape != change.shape:
                raise ModelError(f"the LoRA of {name} changes {key}, which {base} does not have so")
            weights[key] = weights[key] + change
        part = _dino(weights) if name == "dino" else _clip(weights, base)
        made |= {f"{name}.{k}": v.contiguous() for k, v in part.items()}
    return made


def _checked(path: Path) -> dict[str, Tensor]:
    return {k: v.float() for k, v in load_tensors(path, sha256_of(path)).items()}


def _lora(folder: Path) -> dict[str, Tensor]:
    """Changes by block number; a matrix that is stored under two names must be one matrix."""
    told = folder / "adapter_config.json"
    config = load_object(told.read_bytes(), str(told), ModelError)
    path = next(p for a in ADAPTERS if (p := folder / a).is_file())
    sides: dict[tuple[str, str], Tensor] = {}
    for key, value in _checked(path).items():
        match = LORA.search(key)
        if match is None:
            raise ModelError(f"{path} holds {key}, which is no LoRA of a joint attention matrix")
        place = (match["n"], match["side"])
        if not torch.equal(sides.setdefault(place, value), value):
            raise ModelError(f"{path} holds two different matrices for block {match['n']}")
    numbers = {n for n, _ in sides}
    if len(sides) != 2 * len(numbers):
        raise ModelError(f"{path} has matrices without their other half")
    try:
        scale = float(config["lora_alpha"]) / int(config["r"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"{told} tells no scale: {error!r}", "bring it again") from error
    return {n: scale * sides[n, "B"] @ sides[n, "A"] for n in numbers}


def _split(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The joint attention matrices cut into query, key and value."""
    made: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        head, found, kind = name.partition("attn.qkv.")
        parts = zip("qkv", tensor.chunk(3), strict=True) if found else ()
        made |= {f"{head}attn.{p}.{kind}": rows for p, rows in parts} or {name: tensor}
    return made


def _dino(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {k: v for k, v in weights.items() if not k.startswith("norm.")}  # not applied
    return renamed(_split(kept), DINO, BASES["dino"])


def _clip(weights: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    bias = weights.pop("patch_embed.proj.bias", torch.zeros(1))
    if bool(bias.any()):
        raise ModelError(f"{what} has a patch bias that is not 0; CLIP has none")
    made = renamed(_split(weights), CLIP, what)
    return made | {
        "vision_model.embeddings.class_embedding": weights["cls_token"].flatten(),
        "vision_model.embeddings.position_embedding.weight": weights["pos_embed"][0],
        "visual_projection.weight": weights["proj"].T,
    }
