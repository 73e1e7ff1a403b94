"""Vision towers of judges that read no text: CLIP, SigLIP or a ViT, with its preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.judges.preprocess import PRESETS, Preprocess
from t2i_align.judges.siglip import siglip_trunk
from t2i_align.judges.trunks import clip_trunk
from t2i_align.judges.weights import WeightsOptions, check_hash, hub_id, locate, sha256_of


class Trunk(Protocol):
    """Embeds prepared pictures."""

    size: int

    def images(self, inputs: Tensor) -> Tensor:
        """Embeddings ``(B, E)`` float32 of ``(B, 3, s, s)``."""
        ...


class TowerOptions(WeightsOptions):
    """Which tower, and how pictures are prepared for it."""

    tower: Literal["clip", "siglip", "vit"] = Field("clip", description="kind of network")
    architecture: str | None = Field(
        None,
        description="clip only: open_clip's name, OpenAI's weights need one ending in -quickgelu; "
        "null: config.json beside the weights",
    )
    preprocess: Literal["clip", "clip_transformers", "siglip", "dino", "vit"] = Field(
        "clip", description="a preset of t2i_align/judges/preprocess.py"
    )


@dataclass(frozen=True)
class Tower:
    """A network with its input.

    Args:
        trunk: embeds.
        prepare: makes its input of a picture.
        source: the file or folder of its weights.
    """

    trunk: Trunk
    prepare: Preprocess
    source: Path

    @property
    def sha256(self) -> str:
        """Hash of the weights."""
        return sha256_of(self.source)


def load_tower(
    options: TowerOptions, folder: Path, judge: str, device: torch.device, dtype: torch.dtype
) -> Tower:
    """The tower of some options; networks of the same weights are shared.

    Raises:
        ModelError: missing, or of another kind.
    """
    file = None if options.tower == "vit" else "model.safetensors"
    source = locate(options, folder, judge, file)
    if options.tower == "clip":
        known = hub_id(options, folder)
        trunk: Trunk = clip_trunk(
            source, options.architecture, device, dtype, options.sha256, known
        )
    elif options.tower == "siglip":
        trunk = siglip_trunk(source.absolute(), device, dtype, options.sha256)
    else:
        trunk = vit_trunk(source.absolute(), device, dtype, options.sha256)
    return Tower(trunk, PRESETS[options.preprocess].sized(trunk.size), source)


class VitTrunk:
    """A ViT read at its first token, after the last layer norm."""

    def __init__(self, model: Any) -> None:
        """Keep the model."""
        self.model = model
        self.size: int = model.config.image_size

    def images(self, inputs: Tensor) -> Tensor:
        """Embeddings ``(B, E)`` float32 of ``(B, 3, s, s)``."""
        inputs = inputs.to(self.model.device, self.model.dtype)
        return self.model(pixel_values=inputs).last_hidden_state[:, 0].float()


@cache
def vit_trunk(
    folder: Path, device: torch.device, dtype: torch.dtype, sha256: str | None = None
) -> VitTrunk:
    """The ViT of a transformers folder, without pooler.

    Raises:
        ModelError: not such a folder.
    """
    from transformers import ViTModel

    return VitTrunk(load_folder(ViTModel, folder, device, dtype, sha256, pooling=False))


def load_folder(
    cls: Any,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    sha256: str | None = None,
    *,
    pooling: bool = True,
) -> Any:
    """A transformers model from its folder, frozen; no pickle is read, every weight is there.

    Args:
        cls: the model's class.
        folder: config.json and safetensors.
        device: where it goes.
        dtype: of its weights.
        sha256: that model.safetensors must have.
        pooling: False leaves the pooler out, where the class has that choice.

    Raises:
        ModelError: unreadable, another hash, or keys that do not fit.
    """
    if sha256 is not None:
        check_hash(folder / "model.safetensors", sha256)
    extra: dict[str, Any] = {} if pooling else {"add_pooling_layer": False}
    try:
        with torch.inference_mode(False):  # weights made in it would refuse gradients later
            model, told = cls.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **extra
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"no {cls.__name__} in {folder}: {str(error).splitlines()[0]}",
            "a folder holds config.json and model.safetensors; turn pytorch_model.bin into the "
            "latter with `t2i-align judges convert`",
        ) from error
    _complete(told, cls.__name__, folder, () if pooling else ("pooler.",))
    return model.to(device).eval().requires_grad_(False)


def _complete(told: Any, name: str, folder: Path, ignored: Sequence[str]) -> None:
    bad = {
        kind: [
            str(k) for k in told.get(f"{kind}_keys", ()) if not str(k).startswith(tuple(ignored))
        ]
        for kind in ("missing", "unexpected", "mismatched")
    }
    if any(bad.values()):
        parts = "; ".join(f"{', '.join(sorted(k)[:3])} {kind}" for kind, k in bad.items() if k)
        raise ModelError(f"{folder} does not fit a {name}: {parts}", "is it the right model?")
