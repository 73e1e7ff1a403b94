"""Aesthetic predictors: an affine map of a picture's unit embedding; no prompt is read.

    (1)  s = <w, e / |e|> + b

LAION's v1 is published like that. Its v2 and the SigLIP-based v2.5 are five linear layers with
dropout between and **no activation**, so without dropout they are Eq. (1) as well, exactly:

    (2)  w^T = W_5 W_4 W_3 W_2 W_1        b = W_5 (... (W_2 b_1 + b_2) ...) + b_5

computed in float64. Published heads of all three layouts and folded ones are read alike. The score
is not bounded: optimisers push it past any value of a real picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.errors import ModelError
from t2i_align.judges.preprocess import Preprocess
from t2i_align.judges.published import PictureJudge, Published
from t2i_align.judges.towers import Tower, TowerOptions, load_tower
from t2i_align.judges.weights import WeightsOptions, combined, load_tensors, sha256_of
from t2i_align.options import Options

HEADS: dict[str, tuple[str, ...]] = {
    "v1 or folded": ("",),
    "v2": tuple(f"layers.{i}." for i in (0, 2, 4, 6, 7)),
    "v2.5": tuple(f"scoring_head.{i}." for i in (0, 2, 4, 6, 8)),
}


def layers(tensors: Mapping[str, Tensor], what: str) -> list[tuple[Tensor, Tensor]]:
    """The linear layers of a published head, ``(out, in)`` and ``(out,)`` float64, in order.

    Args:
        tensors: names of one of :data:`HEADS`, each with weight and bias.
        what: the checkpoint, as messages call it.

    Raises:
        ModelError: other names, or layers that do not fit each other.
    """
    keys = {k: sorted(p + x for p in v for x in ("weight", "bias")) for k, v in HEADS.items()}
    version = next((k for k, names in keys.items() if names == sorted(tensors)), None)
    if version is None:
        raise ModelError(
            f"{what} is no affine aesthetic head: it holds {', '.join(sorted(tensors)[:4])}, ...",
            f"known: weight and bias, or those of {HEADS['v2'][0]}* or {HEADS['v2.5'][0]}*; a "
            "variant with ReLUs (reluMSE) cannot be folded",
        )
    found = []
    for prefix in HEADS[version]:
        weight, bias = (tensors[prefix + x].double() for x in ("weight", "bias"))
        found.append((weight.reshape(-1, weight.shape[-1]), bias.reshape(-1)))
    sizes = [tuple(w.shape) for w, _ in found]
    if sizes[-1][0] != 1 or any(a[0] != b[1] for a, b in pairwise(sizes)):
        raise ModelError(f"{what}: layers of (out, in) {sizes} make no head with one output")
    return found


def fold(tensors: Mapping[str, Tensor], what: str) -> tuple[Tensor, Tensor]:
    """Eq. (2): ``(w (E,), b ())`` float64 of a published head, see :func:`layers`."""
    (weight, bias), *rest = layers(tensors, what)
    for w, b in rest:
        weight, bias = w @ weight, w @ bias + b
    return weight[0], bias[0]


class AestheticOptions(WeightsOptions):
    """Which head, and the tower it reads; the top-level fields are the head's."""

    trunk: TowerOptions = Field(description="the vision tower")
    batch_size: int = Field(32, ge=1, description="pictures at once")


class Aesthetic(PictureJudge, Published):
    """Eq. (1); see the module."""

    Options: ClassVar[type[Options]] = AestheticOptions

    @cached_property
    def head(self) -> tuple[Tensor, Tensor]:
        """``w (E,)`` and ``b ()`` float32 on the device."""
        with torch.inference_mode(False):
            weight, bias = fold(load_tensors(self.file, self.options.sha256), self.file.name)
            return weight.float().to(self.device), bias.float().to(self.device)

    @cached_property
    def tower(self) -> Tower:
        """The vision tower, shared with other judges of the same weights."""
        _ = self.head  # a missing head is told before a large tower is fetched
        name = (self.options.trunk.name_or_path or self.folder.name).rpartition("/")[2]
        return load_tower(self.options.trunk, self.folder, name, self.device, self.dtype)

    @property
    def weights_sha256(self) -> str | None:
        """Hash of the hashes of head and tower."""
        return combined((sha256_of(self.file), self.tower.sha256))

    @property
    def prepare(self) -> Preprocess:
        """From a picture to the tower's input."""
        return self.tower.prepare

    def value(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        """Eq. (1) ``(B,)`` of prepared pictures; prompts are not read."""
        weight, bias = self.head
        seen = self.tower.trunk.images(inputs)
        if seen.shape[1] != weight.shape[0]:
            raise ModelError(
                f"the head {self.file.name} takes embeddings of {weight.shape[0]} numbers, "
                f"{self.tower.source.name} gives {seen.shape[1]}",
                "each head belongs to the tower it was trained on",
            )
        return F.normalize(seen, dim=-1) @ weight + bias
