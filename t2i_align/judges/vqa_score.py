r"""VQAScore (Lin et al. 2024, arXiv:2404.01291): ask a model whether the picture shows the prompt.

    q = 'Does this figure show "{prompt}"? Please answer yes or no.'

    (1)  s = P(yes | picture, q)                                  normalise: vocabulary
    (2)  s = P(yes | picture, q) / (P(yes | ...) + P(no | ...))   normalise: yes_no

P is the model's distribution of the first token of its answer. Eq. (1) is what t2v_metrics 3.1
computes for image-text models; earlier releases took exp of the mean log-likelihood of "Yes</s>"
instead. Eq. (2) does not punish a model that would rather say "Certainly". Any folder or hub id
that AutoModelForImageTextToText loads will do.

Prompts of different length are padded on the left, so that every answer starts at the last place,
and read through ``generate``, which builds each architecture's own position ids from the attention
mask. A sample's number therefore does not depend on its neighbours. Raw logits are read, before any
repetition penalty or temperature that a model's generation config asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from t2i_align.contract import Media
from t2i_align.errors import ModelError
from t2i_align.judges.base import Scores, rgb, score_each
from t2i_align.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

TEMPLATE = 'Does this figure show "{prompt}"? Please answer yes or no.'


class VQAScoreOptions(Options):
    """Options of the ``vqa_score`` judge."""

    name_or_path: str | None = Field(
        default=None,
        description="folder or hub id of an image-text-to-text model; null: the card's folder",
    )
    revision: str | None = Field(default=None, description="commit of a hub id")
    template: str = Field(
        default=TEMPLATE, description="the question; {prompt} stands for the prompt"
    )
    yes: tuple[str, ...] = Field(
        default=("Yes",),
        min_length=1,
        strict=False,
        description="answers that count, by their first token",
    )
    no: tuple[str, ...] = Field(
        default=("No",), min_length=1, strict=False, description="answers that count against"
    )
    normalise: Literal["yes_no", "vocabulary"] = Field(
        default="yes_no", description="P(yes) among yes and no, or among all tokens"
    )
    batch_size: int = Field(default=32, ge=1, description="pictures at once")

    @field_validator("template")
    @classmethod
    def _has_prompt(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError(f"a template holds {{prompt}} exactly once, got {value!r}")
        return value


class VQAScore:
    """P(yes) of an image-text-to-text model; see the module."""

    Options: ClassVar[type[Options]] = VQAScoreOptions

    def __init__(
        self, folder: Path, options: VQAScoreOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load model and processor.

        Raises:
            ModelError: nothing to load there, no chat template, or yes and no start alike.
        """
        self.options, self.device = options, device
        name = options.name_or_path or str(folder)
        self.model, self.processor = load_pair(name, options.revision, dtype)
        self.model.to(device).eval()
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.processor.chat_template is None:
            raise ModelError(
                f"'{name}' has no chat template, so its questions cannot be put",
                "use an instruction-tuned model",
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.yes, self.no = self.first_tokens(options.yes), self.first_tokens(options.no)
        if set(self.yes) & set(self.no):
            raise ModelError(
                f"yes {options.yes} and no {options.no} start with the same token of '{name}'",
                "give answers that its tokenizer tells apart",
            )

    def first_tokens(self, answers: Sequence[str]) -> list[int]:
        """Distinct ids of the first tokens of some answers."""
        ids = [self.tokenizer(a, add_special_tokens=False).input_ids[0] for a in answers]
        return list(dict.fromkeys(ids))

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """P(yes) ``(B,)`` in [0, 1], Eq. (1) or (2).

        Args:
            media: B images.
            prompts: B prompts, put into the template.
        """

        def compute(images: list[PILImage], texts: list[str]) -> Tensor:
            return self.ask(images, [self.options.template.replace("{prompt}", t) for t in texts])

        return score_each(media, prompts, lambda m, _: rgb(m), compute, self.options.batch_size)

    @torch.inference_mode()
    def ask(self, images: Sequence[PILImage], questions: Sequence[str]) -> Tensor:
        """P(yes) ``(B,)`` float32 of questions as they are, one a picture.

        Args:
            images: B RGB pictures.
            questions: B questions.
        """
        inputs = self.inputs(images, questions)
        out = self.model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.read(out.logits[0])

    def inputs(self, images: Sequence[PILImage], questions: Sequence[str]) -> Any:
        """Model inputs of a batch, padded on the left, on the device."""
        talks = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": i}, {"type": "text", "text": q}],
                }
            ]
            for i, q in zip(images, questions, strict=True)
        ]
        made = self.processor.apply_chat_template(
            talks,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        return made.to(self.device, dtype=self.model.dtype)

    def read(self, logits: Tensor) -> Tensor:
        """P(yes) ``(B,)`` from first-token logits ``(B, vocabulary)``, in float32."""
        log = logits.float().log_softmax(-1)
        yes, no = (log[:, ids].logsumexp(-1) for ids in (self.yes, self.no))
        return yes.exp() if self.options.normalise == "vocabulary" else (yes - no).sigmoid()


def load_pair(name: str, revision: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and processor of a folder or hub id; code of the repository is never run.

    Raises:
        ModelError: there is none, or not of this kind.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **where)
        return model, AutoProcessor.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no image-text-to-text model at '{name}': {str(error).splitlines()[0]}",
            "give a folder or hub id that AutoModelForImageTextToText loads",
        ) from error
