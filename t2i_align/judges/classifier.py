"""A class of a ViT classifier as a score: NSFW detection.

    (1)  s = softmax(ViT(x))[label]

Low is safe. Preference models are poor judges of safety; this is a narrow one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.contract import Media
from t2i_align.errors import ModelError
from t2i_align.judges.base import Scores
from t2i_align.judges.preprocess import PRESETS, Preprocess
from t2i_align.judges.towers import load_folder, of_pictures
from t2i_align.judges.weights import WeightsOptions, locate, sha256_of
from t2i_align.options import Options


class ClassifierOptions(WeightsOptions):
    """Which folder, and which of its classes."""

    label: str = Field("nsfw", description="the class whose probability is the score")
    batch_size: int = Field(32, ge=1, description="pictures at once")


class Classifier:
    """Eq. (1): the probability of one class of a ViT classifier."""

    Options: ClassVar[type[Options]] = ClassifierOptions

    def __init__(
        self, folder: Path, options: ClassifierOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load nothing yet."""
        self.folder, self.options, self.device, self.dtype = folder, options, device, dtype

    @cached_property
    def source(self) -> Path:
        """The model's folder."""
        return locate(self.options, self.folder, self.folder.name)

    @cached_property
    def model(self) -> Any:
        """The classifier.

        Raises:
            ModelError: not such a folder, prepared otherwise, or without the class.
        """
        from transformers import ViTForImageClassification

        model = load_folder(ViTForImageClassification, self.source, self.device, self.dtype)
        if self.options.label not in model.config.label2id:
            known = ", ".join(model.config.label2id)
            raise ModelError(f"no class '{self.options.label}' in {self.source}; known: {known}")
        check_processor(self.source, PRESETS["vit"])
        return model

    @property
    def weights_sha256(self) -> str | None:
        """Hash of the folder's weights and configuration."""
        return sha256_of(self.source)

    @cached_property
    def prepare(self) -> Preprocess:
        """From a picture to the network's input."""
        return PRESETS["vit"].sized(self.model.config.image_size)

    def _value(self, inputs: Tensor) -> Tensor:
        logits = self.model(pixel_values=inputs.to(self.device, self.dtype)).logits.float()
        return logits.softmax(-1)[:, int(self.model.config.label2id[self.options.label])]

    def score_tensor(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores ``(B,)`` float32 of ``(B, 3, h, w)`` in [0, 1]; prompts are not read."""
        return self._value(self.prepare.tensor(pixels))

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a picture."""
        return of_pictures(media, prompts, self.prepare, self._value, self.options.batch_size)


RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers, as preprocessor_config.json has them


def check_processor(folder: Path, prepare: Preprocess) -> None:
    """That a folder's ``preprocessor_config.json``, if any, asks for what is done here.

    Raises:
        ModelError: another mean, deviation or filter; names both.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return
    told = json.loads(path.read_text(encoding="utf-8"))
    ours: dict[str, Any] = {
        "image_mean": list(prepare.mean),
        "image_std": list(prepare.std),
        "resample": RESAMPLE[prepare.interpolation],
    }
    for key, value in ours.items():
        if told.get(key, value) != value:
            raise ModelError(f"{path} says {key} {told[key]}; this judge prepares with {value}")
