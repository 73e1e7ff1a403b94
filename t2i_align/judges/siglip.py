"""SigLIP's vision tower as judges share it: loaded once a process, device and dtype."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.judges.clip_layout import plain
from t2i_align.judges.trunks import frozen
from t2i_align.judges.weights import load_tensors
from t2i_align.plain_json import load_object

# google/siglip-so400m-patch14-384; a config.json beside the weights overrides it
SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


class SiglipTrunk:
    """SigLIP's vision tower with its attention pooling, frozen, in evaluation mode."""

    def __init__(self, model: Any) -> None:
        """Keep the model."""
        self.model = model
        self.size: int = model.config.image_size

    def images(self, inputs: Tensor) -> Tensor:
        """Pooled embeddings ``(B, E)`` float32 of ``(B, 3, s, s)``, not normalised."""
        weight = self.model.post_layernorm.weight
        return self.model(inputs.to(weight.device, weight.dtype)).pooler_output.float()


@cache
def siglip_trunk(
    file: Path, device: torch.device, dtype: torch.dtype, sha256: str | None = None
) -> SiglipTrunk:
    """SigLIP's vision tower from the file of a whole SigLIP; its text tower is left out.

    Args:
        file: in transformers' layout.
        device: where it goes.
        dtype: of its weights.
        sha256: of the file, see :func:`load_tensors`.

    Raises:
        ModelError: unreadable, or not a SigLIP of that shape.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    beside, given = file.with_name("config.json"), SIGLIP_SO400M
    if beside.is_file():
        told = load_object(beside.read_bytes(), str(beside), ModelError)
        given = told.get("vision_config", told)
    try:
        config = SiglipVisionConfig.from_dict(dict(given))
    except Exception as error:  # a config of wrong types fails anywhere inside the library
        raise ModelError(f"{beside} is not SigLIP's configuration: {error}") from error
    tower = "vision_model."
    tensors = {
        k.removeprefix(tower): v
        for k, v in plain(load_tensors(file, sha256)).items()
        if k.startswith(tower)
    }
    return SiglipTrunk(
        frozen(lambda: SiglipVisionModel(config), tensors, "SigLIP's vision tower", device, dtype)
    )
