r"""Sentence embeddings: which of some texts says nearly the same as another.

    (1)  e = sum_t m_t h_t / sum_t m_t,  normalised       h: last hidden states, m: attention mask
    (2)  nearest = argmax_c  e_c . e_text                 the first of equally near ones

That is how sentence-transformers/all-mpnet-base-v2 and its like are used. Texts are embedded one by
one, so that padding plays no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.judges.vlm_model import WEIGHTS
from t2i_align.judges.weights import combined, sha256_of


class Sentences:
    """A text encoder of transformers with mean pooling."""

    def __init__(self, name: str, revision: str | None = None, device: str = "cpu") -> None:
        """Load nothing yet.

        Args:
            name: folder or hub id.
            revision: commit of a hub id.
            device: for the model.
        """
        self.name, self.revision, self.device = name, revision, device
        self._known: dict[str, Tensor] = {}

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """Model and tokenizer.

        Raises:
            ModelError: nothing to load there.
        """
        from transformers import AutoModel, AutoTokenizer

        try:
            model: Any = AutoModel.from_pretrained(self.name, revision=self.revision)
            tokenizer: Any = AutoTokenizer.from_pretrained(self.name, revision=self.revision)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"no text encoder at '{self.name}': {str(error).splitlines()[0]}",
                "--set matcher=FOLDER, or matcher=exact to look for no nearest choice",
            ) from error
        return model.to(self.device).eval(), tokenizer

    @torch.inference_mode()
    def embed(self, text: str) -> Tensor:
        """Eq. (1) ``(D,)`` float32."""
        if text not in self._known:
            model, tokenizer = self.parts
            inputs = tokenizer(text, truncation=True, return_tensors="pt").to(self.device)
            states = model(**inputs).last_hidden_state[0].float()
            mask = inputs["attention_mask"][0, :, None].float()
            mean = (states * mask).sum(0) / mask.sum().clamp(min=1e-9)
            self._known[text] = torch.nn.functional.normalize(mean, dim=0).cpu()
        return self._known[text]

    def nearest(self, text: str, choices: Sequence[str]) -> str:
        """Eq. (2)."""
        own = self.embed(text)
        return choices[int(torch.stack([self.embed(c) @ own for c in choices]).argmax())]

    @property
    def weights_sha256(self) -> str:
        """See :func:`weights_of`."""
        assert self.parts is not None  # so that a hub id is fetched
        return weights_of(self.name, self.revision)


def weights_of(name: str, revision: str | None) -> str:
    """SHA-256 over names and contents of the weight files of a model that was loaded."""
    from transformers.utils.hub import cached_file

    config = cached_file(name, "config.json", revision=revision)
    assert config is not None
    files = sorted(p for p in Path(config).parent.iterdir() if p.suffix in WEIGHTS)
    return combined(f"{p.name}\0{sha256_of(p)}" for p in files)
