"""HPSv3's network, its published names, and the base model's config and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.errors import ModelError
from t2i_align.judges.key_map import renamed

EMBEDDING = "model.language_model.embed_tokens.weight"
UNUSED = ("lm_head.weight",)  # the score reads hidden states
KEYS = (  # the released names are those of transformers before 4.52
    ("visual.{rest}", "model.visual.{rest}"),
    ("model.{rest}", "model.language_model.{rest}"),
    ("rm_head.{rest}", "rm_head.{rest}"),
)


class HPSv3Model(nn.Module):
    """Qwen2-VL without its language head, and the rating head of Eq. (1)."""

    def __init__(self, config: Any) -> None:
        """Build without loading."""
        from transformers import Qwen2VLModel

        super().__init__()
        self.model = Qwen2VLModel(config)
        self.rm_head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )

    def forward(self, inputs: Mapping[str, Tensor], at: Tensor) -> Tensor:
        """Mu and sigma ``(B, 2)`` float32, read at the places ``at (B,)``."""
        hidden = self.model(use_cache=False, **inputs).last_hidden_state
        read = hidden[torch.arange(len(at), device=at.device), at]
        mu, a = self.rm_head(read.float()).unbind(-1)
        return torch.stack([mu, a.exp()], -1)


def load_model(
    published: Mapping[str, Tensor], config: Any, vocabulary: int, dtype: torch.dtype
) -> HPSv3Model:
    """The model of published weights, frozen; each tensor is converted once and never copied.

    Raises:
        ModelError: names or shapes do not fit, or another vocabulary.
    """
    from accelerate import init_empty_weights

    weights = {k: v for k, v in published.items() if k not in UNUSED}
    if EMBEDDING not in weights:
        weights = renamed(weights, KEYS, "HPSv3")
    rows = len(weights.get(EMBEDDING, ()))
    if rows != vocabulary:
        raise ModelError(
            f"HPSv3's weights have {rows} words, the base model's tokenizer with <|Reward|> "
            f"{vocabulary}",
            "base must be Qwen2-VL-7B-Instruct, and the weights the published file",
        )
    config.text_config.vocab_size = rows
    with torch.inference_mode(False), init_empty_weights():
        model = HPSv3Model(config)
    ready = {k: v.to(torch.float32 if "rm_head" in k else dtype) for k, v in weights.items()}
    try:
        model.load_state_dict(ready, assign=True)
    except RuntimeError as error:
        told = " ".join(str(error).split())[:400]
        raise ModelError(
            f"the weights do not fit HPSv3: {told}", "is it the right file?"
        ) from error
    return model.eval().requires_grad_(False)


def load_base(name: str, revision: str | None, folder: Path) -> tuple[Any, Any]:
    """Config and tokenizer of the base model.

    Raises:
        ModelError: missing, of another kind, or with other activations than the released one.
    """
    from transformers import AutoTokenizer, Qwen2VLConfig

    where: Any = folder / name if (folder / name).is_dir() else name
    try:
        config: Any = Qwen2VLConfig.from_pretrained(where, revision=revision or "main")
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no config and tokenizer at '{name}': {str(error).splitlines()[0]}",
            "bring the folder of Qwen2-VL-7B-Instruct (config.json and the tokenizer's files; no "
            "weights) and give it as options.base",
        ) from error
    used = (config.vision_config.hidden_act, config.text_config.hidden_act)
    if used != ("quick_gelu", "silu"):
        raise ModelError(
            f"the config at '{name}' has activations {used}; HPSv3 was trained with quick_gelu in "
            "the vision encoder and silu in the language model",
            "bring the config of Qwen2-VL-7B-Instruct",
        )
    return config, tokenizer
