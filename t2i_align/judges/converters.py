"""Converters of the CLIP family: from a published file's tensors to what the judges load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.judges.aesthetic import fold, layers
from t2i_align.judges.clip_config import named_config
from t2i_align.judges.clip_layout import (
    BUFFERS,
    is_open_clip,
    plain,
    to_open_clip,
    to_transformers,
)
from t2i_align.judges.trunks import frozen


@dataclass(frozen=True)
class Converted:
    """What is written.

    Args:
        tensors: by the judge's own names.
        config: content of config.json, None for no such file.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None


def same(found: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """That mapping names there and back gave every tensor again.

    Raises:
        ModelError: it did not; names the first few.
    """
    wrong = sorted(found.keys() ^ tensors.keys())
    wrong += [k for k in found.keys() & tensors.keys() if not torch.equal(found[k], tensors[k])]
    if wrong:
        raise ModelError(
            f"{what}: {', '.join(wrong[:3])} did not survive the way to our names and back",
            "the file is not laid out as published",
        )


def clip(tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Converted:
    """CLIP of open_clip's or transformers' layout, to transformers' names, types kept.

    Args:
        tensors: the published file.
        options: of the card; ``architecture`` says which network it must be.

    Raises:
        ModelError: another network.
    """
    from transformers import CLIPModel

    what = "the checkpoint"
    made = to_transformers(tensors, what)
    original = plain(tensors)
    same(to_open_clip(made, what) if is_open_clip(original) else made, original, what)
    architecture = options.get("architecture")
    if architecture is None:
        return Converted(made)
    config = named_config(architecture)
    frozen(lambda: CLIPModel(config), made, architecture, torch.device("cpu"), torch.float32)
    return Converted(made, config.to_dict())


def aesthetic(tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Converted:
    """An aesthetic head folded to ``weight (1, E)`` and ``bias (1,)``, float32.

    The folded map must give what the layers give one after the other.

    Raises:
        ModelError: not such a head.
    """
    what = "the checkpoint"
    weight, bias = fold(tensors, what)
    probe = torch.linspace(-1, 1, weight.shape[0], dtype=torch.float64)
    value = probe
    for w, b in layers(tensors, what):
        value = w @ value + b
    if not torch.allclose(value.squeeze(), weight @ probe + bias, rtol=1e-9, atol=1e-9):
        raise ModelError(f"{what}: the folded head gives another number than its layers")
    return Converted({"weight": weight.float()[None], "bias": bias.float()[None]})


def known_names(
    tensors: Mapping[str, Tensor], prefixes: Sequence[str], what: str
) -> dict[str, Tensor]:
    """The same tensors, for checkpoints only in the wrong container; constants left out.

    Args:
        tensors: the published file.
        prefixes: what every name starts with; each must occur.
        what: the model, as messages call it.

    Raises:
        ModelError: other names, or a part is missing.
    """
    made = {k: v for k, v in tensors.items() if not k.endswith(BUFFERS)}
    other = sorted(k for k in made if not k.startswith(tuple(prefixes)))
    missing = [p for p in prefixes if not any(k.startswith(p) for k in made)]
    if other or missing:
        told = [f"it has {', '.join(other[:3])}"] if other else []
        told += [f"nothing starts with {', '.join(missing)}"] if missing else []
        raise ModelError(f"the checkpoint is no {what}: {'; '.join(told)}", "is it the right file?")
    return made


def vit(tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Converted:
    """A ViT of transformers (DINO) or a classifier around one, names kept; a pooler is left out.

    Raises:
        ModelError: another model.
    """
    if "classifier.weight" in tensors:
        return Converted(known_names(tensors, ("vit.", "classifier."), "ViT classifier"))
    kept = {k: v for k, v in tensors.items() if not k.startswith("pooler.")}
    return Converted(known_names(kept, ("embeddings.", "encoder.", "layernorm."), "ViT"))


def safety_checker(tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Converted:
    """Diffusers' safety checker, names kept.

    Raises:
        ModelError: another model.
    """
    parts = ("vision_model.", "visual_projection.", "concept_embeds", "special_care_embeds")
    return Converted(known_names(tensors, parts, "safety checker"))


def imagereward(tensors: dict[str, Tensor], options: Mapping[str, Any]) -> Converted:
    """ImageReward, names kept: its judge maps them, and must be able to.

    Raises:
        ModelError: another model.
    """
    from t2i_align.judges.imagereward_model import load_model

    load_model(tensors)
    return Converted(tensors)
