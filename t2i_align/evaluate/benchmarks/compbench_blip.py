r"""Yes or no from BLIP (Li et al. 2022, arXiv:2201.12086), asked as T2I-CompBench does.

    (1)  p = P(yes) / (P(yes) + P(no))      P: distribution of the decoder's first token

The picture is stretched to 480 x 480 (bicubic, CLIP's mean and deviation); the question's first
token is [ENC]; the decoder starts from [DEC] and attends to the question's own tokens only.
transformers' BlipForQuestionAnswering has the network, but its ``generate`` keeps [CLS], and the
cross-attention of 5.23 drops the mask it is given, so that padding of a batch changes answers. So
its parts are called one by one here, for one question at a time. It was also converted with 384 x
384 pictures: position embeddings are interpolated from 24 x 24 to 30 x 30 patches, where the
released weights have their own; that is the one remaining deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.evaluate.metrics.compbench_marks import asked

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
MAX_TOKENS = 35


def prepared(image: PILImage, side: int) -> Tensor:
    """A picture ``(3, side, side)`` as BLIP sees it."""
    from PIL import Image

    small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


class Blip:
    """BlipForQuestionAnswering with its tokenizer; see the module."""

    def __init__(self, name: str, device: str, side: int = 480) -> None:
        """Load both.

        Args:
            name: folder.
            device: for the model.
            side: of the pictures it is shown, a multiple of its patches.

        Raises:
            ModelError: nothing to load there, or not BLIP's vocabulary.
        """
        from transformers import AutoTokenizer, BlipForQuestionAnswering

        try:
            model: Any = BlipForQuestionAnswering.from_pretrained(name)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"no BLIP at '{name}': {(str(error).splitlines() or ['?'])[0]}",
                "name a folder with --set blip_path=FOLDER",
            ) from error
        self.model = model.to(device).eval()
        self.side, self.device = side, device
        text = model.config.text_config
        self.start, self.enc = text.bos_token_id, text.bos_token_id + 1
        self.yes, self.no = self._token("yes"), self._token("no")
        patch = model.config.vision_config.patch_size
        if self.enc >= text.vocab_size or side % patch:
            raise ModelError(
                f"'{name}' has {text.vocab_size} tokens and patches of {patch}: it needs [DEC] and "
                f"[ENC] at {self.start} and {self.enc}, and {side} a multiple of its patches",
                "use Salesforce/blip-vqa-capfilt-large, or set blip_size",
            )

    def _token(self, word: str) -> int:
        found = self.tokenizer(word, add_special_tokens=False).input_ids
        if len(found) != 1 or found[0] == self.tokenizer.unk_token_id:
            raise ModelError(f"BLIP's tokenizer has no single token for '{word}'", "bring another")
        return found[0]

    @torch.inference_mode()
    def see(self, image: PILImage) -> Tensor:
        """A picture's patches ``(1, P, D)``."""
        pixels = prepared(image, self.side)[None].to(self.device)
        return self.model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state

    @torch.inference_mode()
    def ask(self, image: PILImage, questions: Sequence[str]) -> list[float]:
        """Eq. (1) of each question about one picture; none depends on the others.

        Args:
            image: RGB.
            questions: as they are; cleaned here.
        """
        if not questions:
            return []
        patches = self.see(image)
        return [self._answer(patches, question) for question in questions]

    def _answer(self, patches: Tensor, question: str) -> float:
        """Eq. (1) of one question; alone, since padding would be attended to."""
        text = self.tokenizer(
            asked(question), truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        text.input_ids[:, 0] = self.enc
        states = self.model.text_encoder(
            input_ids=text.input_ids,
            attention_mask=text.attention_mask,
            encoder_hidden_states=patches,
        )[0]
        logits = self.model.text_decoder(
            input_ids=torch.full((1, 1), self.start, device=self.device),
            encoder_hidden_states=states,
            use_cache=False,
        ).logits[0, 0]
        return logits[[self.yes, self.no]].float().softmax(-1)[0].item()  # (1)
