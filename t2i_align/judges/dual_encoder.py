"""Dual encoders of open_clip: the score is the agreement of a picture and a prompt.

    (1)  cosine = <f(x), g(c)> / (|f(x)| |g(c)|)        (2)  logit = exp(a) cosine + b

``a`` and ``b`` are the model's own learned scale and bias (b = 0 where it has none). Any open_clip
folder (config, weights, tokenizer), hub id or built-in name is a judge by its card alone.
Preprocessing is the model's own; pictures become RGB first, since open_clip converts after the
resize, which turns palettes and transparency into noise. A tag's weights get the activation they
were trained with (open_clip 3 only warns where ``ViT-L-14`` is to hold OpenAI's, which need
x sigmoid(1.702 x)). :meth:`DualEncoder.score_tensor` is the
same number with gradients: resized as floats instead of bytes, hence equal up to rounding only (the
card gives the tolerance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.judges.published import PictureJudge
from t2i_align.optional import require
from t2i_align.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


class DualEncoderOptions(Options):
    """Which model, how pictures are prepared, what comes out."""

    path: str | None = Field(
        None, description="open_clip folder, relative to the card's folder; '.' is the folder"
    )
    model: str | None = Field(
        None, description="open_clip name ('ViT-B-32') or hub id ('hf-hub:org/name')"
    )
    pretrained: str | None = Field(
        None, description="tag or file of weights, with an open_clip name"
    )
    output: Literal["cosine", "logit"] = Field("cosine", description="Eq. (1) or (2)")
    prefix: str = Field("", description="text before every prompt")
    image_size: int | None = Field(None, ge=1, description="side in pixels; null: the model's own")
    mean: tuple[float, float, float] | None = Field(None, description="null: the model's own")
    std: tuple[float, float, float] | None = Field(None, description="null: the model's own")
    batch_size: int = Field(32, ge=1, description="pictures at once")

    @model_validator(mode="after")
    def _one_origin(self) -> DualEncoderOptions:
        if (self.path is None) == (self.model is None):
            raise ValueError("give exactly one of path and model")
        if self.pretrained is not None and self.model is None:
            raise ValueError("pretrained goes with model; a path brings its own weights")
        return self


@dataclass(frozen=True)
class OpenClipTransform:
    """open_clip's evaluation transform for pictures and, with gradients, for float batches.

    Args:
        steps: of the transform.
    """

    steps: Sequence[Any]

    def image(self, image: PILImage) -> Tensor:
        """One picture ``(3, s, s)``."""
        value: Any = image
        for step in self.steps:
            value = step(value)
        return value

    def tensor(self, pixels: Tensor) -> Tensor:
        """A batch: the steps up to the conversion to a tensor, clamped, then normalised."""
        *geometry, _mode, _tensor, normalise = self.steps
        pixels = pixels.float()
        for step in geometry:
            pixels = step(pixels)
        return normalise(pixels.clamp(0, 1))


class DualEncoder(PictureJudge):
    """Cosine or logit of an open_clip model."""

    Options: ClassVar[type[Options]] = DualEncoderOptions

    def __init__(
        self, folder: Path, options: DualEncoderOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load nothing yet."""
        self.folder, self.options, self.device, self.dtype = folder, options, device, dtype

    @property
    def name(self) -> str:
        """What open_clip's loader is given."""
        if self.options.path is not None:
            return f"local-dir:{(self.folder / self.options.path).resolve()}"
        return str(self.options.model)

    @cached_property
    def model(self) -> Any:
        """The model in evaluation mode, frozen.

        Raises:
            ModelError: open_clip cannot load it.
        """
        require("open_clip_torch", "judges", f"the dual encoder {self.name}")
        import open_clip

        if self.options.path is not None and not (self.folder / self.options.path).is_dir():
            raise ModelError(f"no open_clip folder at {self.folder / self.options.path}")
        tag = self.options.pretrained
        quick = trained_with_quick_gelu(self.name, tag)
        try:
            with torch.inference_mode(False):  # weights made in it would refuse gradients later
                model = open_clip.create_model(
                    self.name, pretrained=tag, force_quick_gelu=quick, require_pretrained=True
                ).to(self.device, self.dtype)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"open_clip cannot load {self.name}: {error}",
                "a folder holds open_clip_config.json, weights and tokenizer; "
                "a model that is not a folder needs the network once",
            ) from error
        return model.eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        """Texts to token ids ``(B, L)``."""
        import open_clip

        return open_clip.get_tokenizer(self.name)

    @cached_property
    def steps(self) -> list[Any]:
        """open_clip's evaluation transform, step by step."""
        from open_clip import get_model_preprocess_cfg
        from open_clip.transform import PreprocessCfg, image_transform_v2

        given = {
            "size": self.options.image_size,
            "mean": self.options.mean,
            "std": self.options.std,
        }
        config = get_model_preprocess_cfg(self.model)
        config |= {k: v for k, v in given.items() if v is not None}
        transform: Any = image_transform_v2(PreprocessCfg(**config), is_train=False)
        return transform.transforms

    @cached_property
    def prepare(self) -> OpenClipTransform:
        """From a picture to the network's input."""
        return OpenClipTransform(self.steps)

    def value(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine or logit ``(B,)`` of prepared pictures."""
        ids = self.tokenizer([self.options.prefix + p for p in prompts]).to(self.device)
        seen = self.model.encode_image(inputs.to(self.device, self.dtype)).float()
        said = self.model.encode_text(ids).float()
        cosine = F.cosine_similarity(seen, said, dim=-1)
        if self.options.output == "cosine":
            return cosine
        bias = 0.0 if self.model.logit_bias is None else self.model.logit_bias.float()
        return self.model.logit_scale.float().exp() * cosine + bias


def trained_with_quick_gelu(name: str, tag: str | None) -> bool:
    """Whether a tag's weights want x sigmoid(1.702 x) for GELU; False for what has no tag.

    Args:
        name: of the network in open_clip.
        tag: of its weights; None or a file: the name decides.

    Raises:
        ModelError: the name says so and the weights do not.
    """
    from open_clip import get_pretrained_cfg

    # the loader takes ViT-B/32 for ViT-B-32, the table of weights does not
    known = {} if tag is None else get_pretrained_cfg(name.replace("/", "-"), tag)
    if not known:
        return False
    quick = bool(known.get("quick_gelu"))
    if name.endswith("-quickgelu") and not quick:
        raise ModelError(
            f"'{name}' has the quick GELU, which the weights '{tag}' were not trained with",
            f"name the network '{name.removesuffix('-quickgelu')}'",
        )
    return quick
