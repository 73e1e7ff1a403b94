"""MPS (Zhang et al. 2024, CVPR): a preference under a condition; the network is in mps_model.py.

Only the model for overall preference was released; its condition is a list of words for all that a
picture is judged by. The network reads all 77 places of a prompt, also those behind its end, so the
padding matters: the end token again, as transformers' tokenizer of this CLIP pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.judges.clip_config import clip_config
from t2i_align.judges.key_map import renamed
from t2i_align.judges.mps_model import COUNTERS, KEYS, MPSModel
from t2i_align.judges.preprocess import PRESETS, Preprocess
from t2i_align.judges.published import PictureJudge, Published
from t2i_align.judges.trunks import clip_tokens, frozen
from t2i_align.judges.weights import WeightsOptions, load_tensors
from t2i_align.options import Options

END = 49407  # of CLIP's tokenizer
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


class MPS(PictureJudge, Published):
    """Eq. (3) of pictures and prompts."""

    Options: ClassVar[type[Options]] = MPSOptions

    def __init__(
        self, folder: Path, options: MPSOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load the weights.

        Raises:
            ModelError: they are not there, or not in the published layout.
        """
        super().__init__(folder, options, device, dtype)
        _ = self.model

    @cached_property
    def config(self) -> Any:
        """Of the trunk; the end of text is the tokenizer's, whatever a config says."""
        made = clip_config(self.file, self.options.architecture, "laion")
        made.text_config.eos_token_id = END
        return made

    @cached_property
    def model(self) -> MPSModel:
        """The network.

        Raises:
            ModelError: the weights are not there, or not in the published layout.
        """
        published = load_tensors(self.file, self.options.sha256)
        return load_model(published, self.config, self.device, self.dtype)

    @cached_property
    def prepare(self) -> Preprocess:
        """From a picture to the network's input."""
        return PRESETS["clip_transformers"].sized(self.config.vision_config.image_size)

    @cached_property
    def condition(self) -> Tensor:
        """Ids ``(1, 77)`` of what pictures are judged by."""
        return self.tokens([self.options.condition])

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Ids ``(B, 77)`` on the device, the end token from the end on."""
        ids = clip_tokens(prompts, "plain").to(self.device)
        behind = (ids == END).cumsum(-1) > 0
        return ids.masked_fill(behind, END)

    def value(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        """Eq. (3) ``(B,)`` of prepared pictures."""
        ids, threshold = self.tokens(prompts), self.options.threshold
        return self.model(inputs.to(self.device, self.dtype), ids, self.condition, threshold)


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
        build = partial(MPSModel, config, published)
        return frozen(build, ours, "MPS", device, dtype, ("clip.logit_scale",))
    except KeyError as error:
        raise ModelError(
            f"MPS: the weights lack {error}",
            "bring the state dict of the whole model; the published pickle holds a module, which "
            "is not read",
        ) from error
