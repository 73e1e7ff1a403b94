"""MPS (Zhang et al. 2024, CVPR): a preference under a condition; the network is in mps_model.py.

Only the model for overall preference was released; its condition is a list of words for all that a
picture is judged by. The network reads all 77 places of a prompt, also those behind its end, so the
padding matters: the end token again, as transformers' tokenizer of this CLIP pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.contract import Media
from t2i_align.errors import ModelError
from t2i_align.judges.base import Scores
from t2i_align.judges.clip_config import clip_config
from t2i_align.judges.key_map import renamed
from t2i_align.judges.mps_model import COUNTERS, KEYS, MPSModel
from t2i_align.judges.preprocess import PRESETS, score_pictures
from t2i_align.judges.trunks import clip_tokens, frozen
from t2i_align.judges.weights import WeightsOptions, load_tensors, locate, sha256_of
from t2i_align.options import Options

OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)


class MPSOptions(WeightsOptions):
    """Weights, condition, and how many pictures at once."""

    name_or_path: str | None = Field("RE-N-Y/mpsv1", description="folder, file or hub id")
    filename: str | None = Field("model.safetensors", description="the published file")
    architecture: str | None = Field(
        "ViT-H-14", description="open_clip's name of the trunk; null: config.json beside the file"
    )
    condition: str = Field(OVERALL, min_length=1, description="what pictures are judged by")
    threshold: float = Field(
        0.01,
        description="of Eq. (1); 0.01 in the released model's own forward, 0.3 in its test scripts",
    )
    batch_size: int = Field(16, ge=1, description="pictures at once")


class MPS:
    """Eq. (3) of pictures and prompts."""

    Options: ClassVar[type[Options]] = MPSOptions

    def __init__(
        self, folder: Path, options: MPSOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load the weights.

        Raises:
            ModelError: they are not there, or not in the published layout.
        """
        self.options, self.device, self.dtype = options, device, dtype
        self.path = locate(options, folder, "mps")
        config = clip_config(self.path, options.architecture, "laion")
        self.model = load_model(load_tensors(self.path, options.sha256), config, device, dtype)
        size = config.vision_config.image_size
        self.preprocess = PRESETS["clip_transformers"].sized(size)
        self.end: int = config.text_config.eos_token_id
        self.condition = self.tokens([options.condition])

    @cached_property
    def weights_sha256(self) -> str | None:
        """Hash of the weights' file."""
        return sha256_of(self.path)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Ids ``(B, 77)`` on the device, the end token from the end on."""
        ids = clip_tokens(prompts, "plain").to(self.device)
        behind = (ids == self.end).cumsum(-1) > 0
        return ids.masked_fill(behind, self.end)

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores ``(B,)`` float32 with gradient.

        Args:
            pixels: ``(B, 3, h, w)`` in [0, 1].
            prompts: B prompts.
        """
        return self._scores(self.preprocess.tensor(pixels), prompts)

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a picture."""
        batch = self.options.batch_size
        return score_pictures(media, prompts, self.preprocess, self._scores, batch)

    def _scores(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        ids, threshold = self.tokens(prompts), self.options.threshold
        return self.model(pixels.to(self.device, self.dtype), ids, self.condition, threshold)


def load_model(
    published: dict[str, Tensor], config: object, device: torch.device, dtype: torch.dtype
) -> MPSModel:
    """The model of published weights, frozen, in evaluation mode.

    Raises:
        ModelError: a name is missing or unknown.
    """
    weights = {k: v for k, v in published.items() if not k.endswith(COUNTERS)}
    ours = renamed(weights, KEYS, "MPS")
    try:
        return frozen(lambda: MPSModel(config, published), ours, "MPS", device, dtype)
    except KeyError as error:
        raise ModelError(
            f"MPS: the weights lack {error}",
            "bring the state dict of the whole model; the published pickle holds a module, which "
            "is not read",
        ) from error
