r"""ImageReward (Xu et al. 2023, arXiv:2304.05977), on the BLIP parts of transformers.

    V = ViT-L/16(x) of the picture, h = BERT(tokens of the prompt, cross-attention to V)

    (1)  s = (w . h_[CLS] + b - 0.16717...) / 1.03333...

The text model is a decoder by construction (only so has it cross-attention) and runs
bidirectionally. Its first token stays ``[CLS]``, where BLIP's own matching head would put
``[ENC]``. The published head of five linear layers has no activations, so it is the one affine map
of Eq. (1). Prompts are cut after 35 tokens, two of them special.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.judges.imagereward_model import load_model
from t2i_align.judges.preprocess import PRESETS, Preprocess
from t2i_align.judges.published import PictureJudge, Published
from t2i_align.judges.weights import WeightsOptions, load_tensors
from t2i_align.options import Options

MAX_LENGTH = 35


class ImageRewardOptions(WeightsOptions):
    """Weights, tokenizer, and how many pictures at once."""

    name_or_path: str | None = Field("zai-org/ImageReward", description="folder, file or hub id")
    filename: str | None = Field("ImageReward.pt", description="the published file")
    tokenizer: str = Field(
        "google-bert/bert-base-uncased",
        description="folder (absolute, or relative to the card's) or hub id of BERT's tokenizer",
    )
    tokenizer_revision: str | None = Field(None, description="commit of a hub id")
    batch_size: int = Field(32, ge=1, description="pictures at once")


class ImageReward(PictureJudge, Published):
    """Eq. (1) of pictures and prompts."""

    Options: ClassVar[type[Options]] = ImageRewardOptions

    def __init__(
        self, folder: Path, options: ImageRewardOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load weights and tokenizer.

        Raises:
            ModelError: they are not there, or not in the published layout.
        """
        super().__init__(folder, options, device, dtype)
        _ = self.tokenizer  # which looks at the model too

    @cached_property
    def model(self) -> Any:
        """The network.

        Raises:
            ModelError: the weights are not there, or not in the published layout.
        """
        model = load_model(load_tensors(self.file, self.options.sha256))
        head, model.head = model.head, nn.Sequential()  # which stays float32
        model.to(self.device, self.dtype)
        model.head = head.to(self.device)
        return model

    @cached_property
    def tokenizer(self) -> Any:
        """BERT's tokenizer.

        Raises:
            ModelError: it is not there, or is another one.
        """
        name = self.options.tokenizer
        made = bert_tokenizer(name, self.options.tokenizer_revision, self.folder)
        if len(made) > self.model.text.config.vocab_size:
            raise ModelError(
                f"the tokenizer '{name}' has {len(made)} tokens, the weights "
                f"{self.model.text.config.vocab_size}",
                "options.tokenizer must be bert-base-uncased",
            )
        return made

    @cached_property
    def prepare(self) -> Preprocess:
        """From a picture to the network's input."""
        return PRESETS["clip"].sized(self.model.image_size)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask ``(B, 35)`` on the device."""
        made = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        return made.input_ids.to(self.device), made.attention_mask.to(self.device)

    def value(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        """Eq. (1) ``(B,)`` of prepared pictures."""
        return self.model(inputs.to(self.device, self.dtype), *self.tokens(prompts))


def bert_tokenizer(name: str, revision: str | None, folder: Path) -> Any:
    """BERT's tokenizer with BLIP's two extra tokens, which take the last two ids.

    Raises:
        ModelError: there is none at that folder or hub id.
    """
    from transformers import AutoTokenizer

    where = folder / name
    try:
        tok = AutoTokenizer.from_pretrained(
            where if where.is_dir() else name, revision=revision or "main"
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no tokenizer at '{name}': {str(error).splitlines()[0]}",
            "ImageReward reads bert-base-uncased: bring its folder (vocab.txt, "
            "tokenizer_config.json) and give it as options.tokenizer",
        ) from error
    tok.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tok
