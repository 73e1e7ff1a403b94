"""DreamSim (Fu et al. 2023, arXiv:2306.09344): how far apart two pictures look.

    (1)  e = [DINO(x), CLIP(x), OpenCLIP(x)]      three ViT-B/16, tuned with LoRA, concatenated
    (2)  d = 1 - cos(e - mean(e), e_r - mean(e_r))

DINO gives its first token after the last block and **before** the last layer norm (768 numbers),
the two CLIPs their projected embeddings (512 each). The mean is over the 1,792 numbers of one
picture, so d is one minus a correlation. Lower is more alike. Both pictures are squashed to
224 x 224; each network normalises with its own mean and deviation.

The weights are one safetensors file with the LoRA merged in, made from the published files by
``t2i-align judges convert dreamsim`` (dreamsim_merge.py). The reference is ``meta["reference"]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from t2i_align.contract import Media
from t2i_align.errors import ModelError
from t2i_align.judges.base import Scores
from t2i_align.judges.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, PRESETS
from t2i_align.judges.published import Published
from t2i_align.judges.reference import compared
from t2i_align.judges.trunks import frozen
from t2i_align.judges.weights import WeightsOptions, load_tensors
from t2i_align.options import Options

PARTS = ("dino", "clip", "open_clip")
HEAD_WIDTH = 64


class DreamSimOptions(WeightsOptions):
    """Which merged weights."""

    batch_size: int = Field(32, ge=1, description="pictures at once, each with its reference")


class Ensemble(nn.Module):
    """Eq. (1) with the merged networks of a file."""

    def __init__(self, configs: dict[str, Any]) -> None:
        """Build the three.

        Args:
            configs: transformers' configuration of each of :data:`PARTS`.
        """
        from transformers import CLIPVisionModelWithProjection, ViTModel

        super().__init__()
        self.dino: Any = ViTModel(configs["dino"], add_pooling_layer=False)
        self.dino.layernorm = nn.Identity()
        self.clip = CLIPVisionModelWithProjection(configs["clip"])
        self.open_clip = CLIPVisionModelWithProjection(configs["open_clip"])
        self.size: int = configs["dino"].image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings ``(B, 768 + 512 + 512)`` float32, Eq. (1).

        Args:
            pixels: ``(B, 3, s, s)`` in [0, 1].
        """
        first = self.dino.embeddings.cls_token

        def normal(mean: Sequence[float], std: Sequence[float]) -> Tensor:
            m, s = (torch.tensor(v, device=first.device)[:, None, None] for v in (mean, std))
            return ((pixels.to(first.device) - m) / s).to(first.dtype)

        seen = normal(CLIP_MEAN, CLIP_STD)
        dino = self.dino(normal(IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0]
        parts = (dino, self.clip(seen).image_embeds, self.open_clip(seen).image_embeds)
        return torch.cat([p.float() for p in parts], dim=-1)


def configs_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The three configurations, read off the shapes of merged weights; heads have 64 numbers.

    Raises:
        ModelError: not merged weights.
    """
    from transformers import CLIPVisionConfig, ViTConfig

    try:
        dino = tensors["dino.embeddings.patch_embeddings.projection.weight"]
        clip = tensors["clip.vision_model.embeddings.patch_embedding.weight"]
        made: dict[str, Any] = {"dino": ViTConfig(layer_norm_eps=1e-6, **_shape(tensors, dino))}
        for name, activation in (("clip", "quick_gelu"), ("open_clip", "gelu")):
            out = tensors[f"{name}.visual_projection.weight"].shape[0]
            made[name] = CLIPVisionConfig(
                hidden_act=activation, projection_dim=out, **_shape(tensors, clip)
            )
    except KeyError as error:
        raise ModelError(
            f"these are no merged DreamSim weights: {error} is not there",
            "make them with `t2i-align judges convert dreamsim FOLDER OUT --sha256 HASH`",
        ) from error
    return made


def _shape(tensors: dict[str, Tensor], patches: Tensor) -> dict[str, Any]:
    places = tensors["dino.embeddings.position_embeddings"].shape[1] - 1
    width, side = patches.shape[0], patches.shape[-1]
    layers = {k.split(".")[2] for k in tensors if k.startswith("dino.layers.")}
    return {
        "hidden_size": width,
        "intermediate_size": tensors["dino.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "image_size": side * round(places**0.5),
        "patch_size": side,
    }


@cache
def ensemble(
    file: Path, device: torch.device, dtype: torch.dtype, sha256: str | None = None
) -> Ensemble:
    """The networks of a file of merged weights.

    Raises:
        ModelError: unreadable, or not merged DreamSim weights.
    """
    tensors = load_tensors(file, sha256)
    configs = configs_of(tensors)
    return frozen(lambda: Ensemble(configs), tensors, "a merged DreamSim", device, dtype)


class DreamSim(Published):
    """Eq. (2); see the module."""

    Options: ClassVar[type[Options]] = DreamSimOptions

    @cached_property
    def model(self) -> Ensemble:
        """The three networks."""
        return ensemble(self.file, self.device, self.dtype, self.options.sha256)

    def _apart(self, first: Tensor, second: Tensor) -> Tensor:
        seen = self.model(torch.cat([first, second]))
        seen = seen - seen.mean(-1, keepdim=True)
        return 1 - F.cosine_similarity(*seen.chunk(2), dim=-1)

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str], references: Tensor) -> Tensor:
        """Distances ``(B,)`` float32, differentiable in pixels and references.

        Args:
            pixels: ``(B, 3, h, w)`` in [0, 1].
            prompts: B prompts, not read.
            references: ``(B, 3, h', w')`` in [0, 1].
        """
        prepare = PRESETS["unit"].sized(self.model.size)
        return self._apart(prepare.tensor(pixels), prepare.tensor(references))

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One distance a picture; NaN where ``meta["reference"]`` is missing."""
        prepare = PRESETS["unit"].sized(self.model.size)
        return compared(media, prompts, prepare, self._apart, self.options.batch_size)
