"""Pictures and prompts as HPSv3 reads them: Qwen2-VL's patches and chat, and a reading place.

A picture keeps its shape. Its sides become the multiples of 28 that are nearest to it in aspect
with at most ``num_pixels`` pixels (256 x 28 x 28 as released, so small pictures grow and every
picture costs the same), then it is cut into patches, each repeated for the two frames of the
video-shaped encoder. The chat holds one place-holder token for every 2 x 2 patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_align.contract import MediaError
from t2i_align.errors import ModelError, UserError
from t2i_align.judges.preprocess import CLIP_MEAN, CLIP_STD
from t2i_align.judges.vlm_common import refuse_control

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

REWARD, IMAGE = "<|Reward|>", "<|image_pad|>"
PLACES = ("{prompt}", "{text_prompt}")  # ours, and the name in the released template


@dataclass(frozen=True)
class Patches:
    """The patches of one picture.

    Args:
        values: ``(N, 3 * frames * patch * patch)``.
        grid: rows and columns of patches, N of them.
    """

    values: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Patcher:
    """Cuts pictures for a vision encoder.

    Args:
        patch: side of a patch.
        merge: patches a side that the encoder joins to one token.
        frames: copies of the picture.
        num_pixels: least and most pixels.
    """

    patch: int
    merge: int
    frames: int
    num_pixels: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture is brought to.

        Raises:
            MediaError: one side is over 200 times the other.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        limit = self.num_pixels
        try:
            return smart_resize(height, width, self.patch * self.merge, limit, limit)
        except ValueError as error:
            raise MediaError(f"{width} x {height} pixels: {error}") from error

    def image(self, image: PILImage) -> Patches:
        """Patches of an RGB picture, resized on bytes: the released path."""
        from PIL import Image

        height, width = self.size(image.height, image.width)
        sized = image.resize((width, height), Image.Resampling.BICUBIC)
        return self.cut(torch.from_numpy(np.array(sized)).permute(2, 0, 1).float() / 255)

    def tensor(self, pixels: Tensor) -> list[Patches]:
        """The same of ``(B, 3, h, w)`` in [0, 1], with gradient."""
        size = self.size(*pixels.shape[-2:])
        sized = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True)
        return [self.cut(x) for x in sized.clamp(0, 1)]

    def cut(self, pixels: Tensor) -> Patches:
        """Normalise ``(3, H, W)`` in [0, 1] and order its patches as the encoder merges them."""
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        p, m = self.patch, self.merge
        rows, columns = pixels.shape[1] // p, pixels.shape[2] // p
        x = ((pixels - mean) / std).reshape(3, rows // m, m, p, columns // m, m, p)
        x = x.permute(1, 4, 2, 5, 0, 3, 6)  # (row, column) of the token, of the patch; then inside
        x = x.unsqueeze(5).expand(*x.shape[:5], self.frames, p, p)
        return Patches(x.reshape(rows * columns, -1), (rows, columns))


class Chat:
    """Turns prompts into token ids.

    Args:
        tokenizer: the base model's, with its chat template.
        template: the question; ``{prompt}`` stands for the prompt.
        merge: see :class:`Patcher`.
    """

    def __init__(self, tokenizer: Any, template: str, merge: int) -> None:
        """Add the reading place to the vocabulary, as its last token.

        Raises:
            ModelError: the tokenizer has no chat template.
        """
        if tokenizer.chat_template is None:
            raise ModelError(
                "the base model's tokenizer has no chat template",
                "bring the whole folder of Qwen2-VL-7B-Instruct, tokenizer_config.json included",
            )
        tokenizer.add_tokens([REWARD], special_tokens=True)
        tokenizer.padding_side = "right"
        self.tokenizer, self.template, self.merge = tokenizer, template, merge
        self.reward_id, self.image_id = tokenizer.convert_tokens_to_ids([REWARD, IMAGE])
        self.control = [t for t in tokenizer.get_added_vocab() if t.startswith("<|")]

    def check(self, prompt: str) -> None:
        """Refuse a prompt that would be read as structure.

        Raises:
            MediaError: it holds a control token.
        """
        refuse_control(prompt, self.control)

    def text(self, prompt: str, grid: tuple[int, int]) -> str:
        """The chat about a picture of ``grid`` patches."""
        place = next(p for p in PLACES if p in self.template)
        question = self.template.replace(place, prompt)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        talk = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        head, pad, tail = str(talk).partition(IMAGE)
        return head + pad * (grid[0] * grid[1] // self.merge**2) + tail

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask ``(B, L)``, padded on the right."""
        made = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        return made.input_ids, made.attention_mask


def read_template(path: Path) -> str:
    """The text of a question.

    Raises:
        UserError: no such file, or it lacks the prompt's or the reading place.
    """
    try:
        text = path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the template {path} cannot be read: {error}", "see template_file"
        ) from error
    if sum(text.count(place) for place in PLACES) != 1 or text.count(REWARD) != 1:
        raise UserError(
            f"the template {path} must hold {' or '.join(PLACES)} once and {REWARD} once",
            "the prompt goes where the first stands; the score is read at the second",
        )
    return text
