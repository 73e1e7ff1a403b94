"""A class of a ViT classifier as a score: NSFW detection.

    (1)  s = softmax(ViT(x))[label]

Low is safe. Preference models are poor judges of safety; this is a narrow one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.judges.preprocess import PRESETS, Preprocess
from t2i_align.judges.published import PictureJudge, Published
from t2i_align.judges.towers import load_folder
from t2i_align.judges.weights import WeightsOptions
from t2i_align.options import Options
from t2i_align.plain_json import load_object


class ClassifierOptions(WeightsOptions):
    """Which folder, and which of its classes."""

    label: str = Field("nsfw", description="the class whose probability is the score")
    batch_size: int = Field(32, ge=1, description="pictures at once")


class Classifier(PictureJudge, Published):
    """Eq. (1): the probability of one class of a ViT classifier."""

    Options: ClassVar[type[Options]] = ClassifierOptions

    filename = None  # a folder

    @cached_property
    def model(self) -> Any:
        """The classifier.

        Raises:
            ModelError: not such a folder, prepared otherwise, or without the class.
        """
        from transformers import ViTForImageClassification

        model = load_folder(
            ViTForImageClassification, self.file, self.device, self.dtype, self.options.sha256
        )
        if self.options.label not in model.config.label2id:
            known = ", ".join(model.config.label2id)
            raise ModelError(f"no class '{self.options.label}' in {self.file}; known: {known}")
        check_processor(self.file, PRESETS["vit"])
        return model

    @cached_property
    def prepare(self) -> Preprocess:
        """From a picture to the network's input."""
        return PRESETS["vit"].sized(self.model.config.image_size)

    def value(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        """Eq. (1) ``(B,)`` of prepared pictures; prompts are not read."""
        logits = self.model(pixel_values=inputs.to(self.device, self.dtype)).logits.float()
        return logits.softmax(-1)[:, int(self.model.config.label2id[self.options.label])]


RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers, as preprocessor_config.json has them


def check_processor(folder: Path, prepare: Preprocess) -> None:
    """That a folder's ``preprocessor_config.json``, if any, asks for what is done here.

    Raises:
        ModelError: another mean, deviation or filter; names both.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return
    told = load_object(path.read_bytes(), str(path), ModelError)
    ours: dict[str, Any] = {
        "image_mean": list(prepare.mean),
        "image_std": list(prepare.std),
        "resample": RESAMPLE[prepare.interpolation],
    }
    for key, value in ours.items():
        if told.get(key, value) != value:
            raise ModelError(f"{path} says {key} {told[key]}; this judge prepares with {value}")
