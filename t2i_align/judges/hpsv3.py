r"""HPSv3 (Ma et al. 2025, arXiv:2508.03789): a vision-language model with a head that rates.

    h = Qwen2-VL(picture, question) at the token <|Reward|>

    (1)  (mu, a) = W_3 relu(W_2 relu(W_1 h)),   score = mu,   sigma = exp(a)

The released model was trained with one position for all three axes of the rotary embedding: its
forward pass went round the function that would have counted rows and columns. ``positions:
released`` does the same and is what its numbers mean; ``mrope`` gives the positions of Qwen2-VL, a
different function that some ports compute. The head works in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.contract import Media
from t2i_align.judges.base import Scores, rgb, score_each
from t2i_align.judges.hpsv3_inputs import Chat, Patcher, Patches, read_template
from t2i_align.judges.hpsv3_model import load_base, load_model
from t2i_align.judges.published import Published
from t2i_align.judges.weights import WeightsOptions, load_tensors
from t2i_align.options import Options


class HPSv3Options(WeightsOptions):
    """Weights, base model, and how it is asked."""

    name_or_path: str | None = Field("MizzenAI/HPSv3", description="folder, file or hub id")
    filename: str | None = Field("HPSv3.safetensors", description="the published file")
    base: str = Field(
        "Qwen/Qwen2-VL-7B-Instruct",
        description="folder (absolute, or relative to the card's) or hub id of the base model's "
        "config and tokenizer; its weights are not read",
    )
    base_revision: str | None = Field(None, description="commit of a hub id")
    positions: Literal["released", "mrope"] = Field(
        "released", description="1-D positions as trained, or Qwen2-VL's own; see the module"
    )
    template_file: str = Field(
        "template.txt",
        description="text of the question, absolute or relative to the card's folder",
    )
    num_pixels: int = Field(256 * 28 * 28, ge=784, description="pixels of a resized picture")
    batch_size: int = Field(4, ge=1, description="pictures at once")


class HPSv3(Published):
    """mu of Eq. (1), and sigma where it is asked for."""

    Options: ClassVar[type[Options]] = HPSv3Options

    def __init__(
        self, folder: Path, options: HPSv3Options, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load weights, config and tokenizer.

        Raises:
            ModelError: they are not there, or not in the published layout.
        """
        super().__init__(folder, options, device, dtype)
        template = read_template(folder / options.template_file)
        config, tokenizer = load_base(options.base, options.base_revision, folder)
        vision = config.vision_config
        self.patcher = Patcher(
            vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size,
            options.num_pixels,
        )  # fmt: skip
        self.chat = Chat(tokenizer, template, vision.spatial_merge_size)
        self.model = load_model(
            load_tensors(self.file, options.sha256), config, len(tokenizer), dtype
        ).to(device)

    @property
    def depends_on(self) -> dict[str, Any]:
        """The question's text."""
        return {"template": self.chat.template}

    def inputs(self, patches: Sequence[Patches], prompts: Sequence[str]) -> tuple[dict, Tensor]:
        """The model's inputs, and the place of the reading token in each row."""
        texts = [self.chat.text(t, p.grid) for t, p in zip(prompts, patches, strict=True)]
        ids, mask = (x.to(self.device) for x in self.chat.tokens(texts))
        grids = torch.tensor([[1, *p.grid] for p in patches], device=self.device)
        made = {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": torch.cat([p.values for p in patches]).to(self.device),
            "image_grid_thw": grids,
        }
        if self.options.positions == "mrope":  # without the types transformers 5 refuses to count
            made["mm_token_type_ids"] = (ids == self.chat.image_id).int()
        else:
            places = torch.arange(ids.shape[1], device=self.device)
            made["position_ids"] = places.expand(3, len(ids), -1)
        return made, (ids == self.chat.reward_id).int().argmax(1)

    def gaussian(self, patches: Sequence[Patches], prompts: Sequence[str]) -> Tensor:
        """Mu and sigma ``(B, 2)`` float32 of cut pictures (:class:`Patcher`) and prompts."""
        return self.model(*self.inputs(patches, prompts))

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mu ``(B,)`` float32 with gradient.

        Args:
            pixels: ``(B, 3, h, w)`` in [0, 1].
            prompts: B prompts.

        Raises:
            MediaError: a prompt holds a control token.
        """
        for prompt in prompts:
            self.chat.check(prompt)
        return self.gaussian(self.patcher.tensor(pixels.to(self.device)), prompts)[:, 0]

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """Mu of each picture."""

        def read(medium: Media, prompt: str) -> Patches:
            self.chat.check(prompt)
            return self.patcher.image(rgb(medium))

        @torch.inference_mode()
        def compute(patches: list[Patches], texts: list[str]) -> Tensor:
            return self.gaussian(patches, texts)[:, 0]

        return score_each(media, prompts, read, compute, self.options.batch_size)
