"""A CLIP judge that knows how noisy the sample was: SPO's step-aware preference model.

Step-aware training (Liang et al., arXiv:2406.04314) compares predictions of the clean picture made
in the middle of sampling, which are blurred the more the earlier the step. A judge trained on clean
pictures has never seen them; this one is told the level and trained on such pictures
(t2i_align/judges/fit.py). The text tower is not conditioned. How the level enters is in
timed_model.py; before training every score equals the base judge's at every level.

A level is canonical: 0 is a finished picture, 1 is pure noise. SPO's timestep t is 1000 level.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from t2i_align.contract import Media
from t2i_align.errors import UserError
from t2i_align.judges.base import Scores, load, rgb, score_each
from t2i_align.judges.dual_encoder import DualEncoder, DualEncoderOptions
from t2i_align.judges.facts import facts_of
from t2i_align.judges.timed_model import FILE, Modulation, load_modulation
from t2i_align.judges.weights import combined, sha256_of
from t2i_align.options import Options


class TimedClipOptions(Options):
    """The base judge, the weights of its conditioning, and the level of pictures without one."""

    path: str | None = Field(
        None, description="open_clip folder, relative to the card's folder; '.' is the folder"
    )
    judge: str | None = Field(
        None, description="name of a CLIP judge instead of a path, e.g. pickscore"
    )
    output: Literal["cosine", "logit"] = Field(
        "logit", description="with path: the cosine, or exp(a) cosine + b"
    )
    timed: str | None = Field(
        None, description=f"file of conditioning weights, as {FILE}; null: untrained, the base"
    )
    width: int = Field(128, ge=1, description="W of the embedding of untrained weights")
    level: float = Field(0.0, ge=0, le=1, description="of pictures whose meta has no 'level'")
    batch_size: int = Field(32, ge=1, description="with path: pictures at once")

    @model_validator(mode="after")
    def _one_base(self) -> TimedClipOptions:
        if (self.path is None) == (self.judge is None):
            raise ValueError("give exactly one of path and judge")
        return self


class TimedClip:
    """A base judge with a conditioned vision tower."""

    Options: ClassVar[type[Options]] = TimedClipOptions

    def __init__(
        self, folder: Path, options: TimedClipOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load nothing yet."""
        self.folder, self.options, self.device, self.dtype = folder, options, device, dtype

    @cached_property
    def base(self) -> Any:
        """The judge whose vision tower is conditioned; like it while no level is set.

        Raises:
            UserError: the judge named is none with a CLIP vision tower.
        """
        options = self.options
        if options.judge is not None:
            return load(options.judge, str(self.device), self.dtype)
        given = {k: getattr(options, k) for k in ("path", "output", "batch_size")}
        made = DualEncoderOptions.model_validate(given)
        return DualEncoder(self.folder, made, self.device, self.dtype)

    @cached_property
    def modulation(self) -> Modulation:
        """The conditioning, frozen.

        Raises:
            ModelError: the file does not fit the tower.
        """
        with torch.inference_mode(False):  # weights made in it would refuse gradients later
            if self.options.timed is None:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    made = Modulation(vision_tower(self.base), self.options.width)
            else:
                made = load_modulation(vision_tower(self.base), self.folder / self.options.timed)
            return made.to(self.device).requires_grad_(False)

    @property
    def depends_on(self) -> dict[str, Any]:
        """The facts of the judge it conditions, where that is one of the catalogue."""
        name = self.options.judge
        return {} if name is None else {"base": facts_of(name, self.base).to_dict()}

    @property
    def weights_sha256(self) -> str | None:
        """Hash over the base's weights and the conditioning's, where both are files."""
        found = [getattr(self.base, "weights_sha256", None)]
        if self.options.path is not None:
            found = [sha256_of(p) for p in sorted(self.place.glob("*.safetensors"))]
        if self.options.timed is not None:
            found.append(sha256_of(self.folder / self.options.timed))
        known = [f for f in found if f is not None]
        return combined(known) if known else None

    @property
    def place(self) -> Path:
        """The open_clip folder."""
        return self.folder / str(self.options.path)

    def levels(self, level: float | Tensor | None) -> Tensor:
        """``(B,)`` or ``(1,)`` float32 on the device."""
        given = self.options.level if level is None else level
        return torch.as_tensor(given, dtype=torch.float32, device=self.device).reshape(-1)

    def score_tensor(
        self, pixels: Tensor, prompts: Sequence[str], level: float | Tensor | None = None
    ) -> Tensor:
        """Scores ``(B,)`` float32, differentiable in pixels and weights.

        Args:
            pixels: ``(B, 3, h, w)`` in [0, 1].
            prompts: B prompts.
            level: noise level of each picture's origin ``(B,)``, or one for all; None: the option.

        Raises:
            ValueError: a level outside [0, 1].
        """
        with self.modulation.at(self.levels(level)):
            return self.base.score_tensor(pixels, prompts)

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a picture; ``meta["level"]`` of a medium is its level, where it has one."""

        def read(medium: Media, _prompt: str) -> tuple[Tensor, float]:
            level = float(medium.meta.get("level", self.options.level))
            return self.base.prepare.image(rgb(medium)), level

        @torch.no_grad()
        def compute(found: list[tuple[Tensor, float]], texts: list[str]) -> Tensor:
            inputs = torch.stack([image for image, _ in found])
            with self.modulation.at(self.levels(torch.tensor([level for _, level in found]))):
                return self.base.value(inputs, texts)

        return score_each(media, prompts, read, compute, self.base.options.batch_size)


def vision_tower(judge: Any) -> torch.nn.Module:
    """The vision tower of a CLIP judge.

    Raises:
        UserError: the judge has none.
    """
    if isinstance(judge, DualEncoder):
        return judge.model.visual
    trunk = getattr(judge, "trunk", None)
    if trunk is None or not hasattr(trunk.model, "vision_model"):
        raise UserError(
            f"a judge of class {type(judge).__name__} has no CLIP vision tower to condition",
            "name a judge that is one CLIP model, such as pickscore, or give an open_clip folder",
        )
    return trunk.model.vision_model
