"""What every judge promises, and how one is found by name.

A judge maps media and prompts to float32 numbers. The number of a sample does not depend on the
samples beside it, equal inputs give equal numbers, and a medium that cannot be read or judged gets
NaN with the reason, never 0. The scale and direction are the published ones; ``normalized`` puts
them on a common scale with the mean and standard deviation of the card,

    (1)  z = direction (s - mean) / std

A judge is a folder ``reward_models/<name>`` with a card that names its implementation, its options
(``details.options``) and, where published, its statistics (``details.normalize``). So a judge that
fits an existing implementation is a new folder and no Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from t2i_align.catalog import Card, find_root, read_card
from t2i_align.contract import Media, MediaError
from t2i_align.data.images import open_image
from t2i_align.data.media import resolve as resolve_media
from t2i_align.data.media_io import to_image
from t2i_align.errors import RecipeError, UserError
from t2i_align.explain import validate
from t2i_align.judges.scores import Normalize, Scores
from t2i_align.options import Options
from t2i_align.registry import nearest, resolve
from t2i_align.yaml_source import read

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


class Judge(Protocol):
    """Scores media under prompts; built from (card folder, options, device, dtype)."""

    Options: ClassVar[type[Options]]

    def __init__(
        self, folder: Path, options: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Read what the card's folder holds."""
        ...

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a medium.

        Args:
            media: B media of a kind the judge takes.
            prompts: B prompts.
        """
        ...


def rgb(media: Media) -> PILImage:
    """An image medium as RGB PIL: bytes decoded (bounded, EXIF applied), tensors rounded to 8 bits.

    Raises:
        MediaError: not an image, or a broken one.
    """
    if media.kind != "image":
        raise MediaError(f"this judge looks at images, got {media.kind}")
    media = resolve_media(media)
    return to_image(media) if isinstance(media.data, Tensor) else open_image(media.data)


def score_each(
    media: Sequence[Media],
    prompts: Sequence[str],
    read: Callable[[Media, str], Any],
    compute: Callable[[list[Any], list[str]], Sequence[float] | Tensor],
    batch_size: int = 32,
) -> Scores:
    """Read every medium, score those that could be read in batches, NaN and reason for the others.

    Args:
        media: B media.
        prompts: B prompts.
        read: makes an input of one medium and prompt; raises MediaError where it cannot.
        compute: n inputs and prompts to n numbers.
        batch_size: the largest n.

    Raises:
        ValueError: media and prompts are not equally many.
    """
    if len(media) != len(prompts):
        raise ValueError(f"{len(media)} media and {len(prompts)} prompts; give one prompt each")
    values = torch.full((len(media),), math.nan)
    reasons: list[str | None] = [None] * len(media)
    ready: list[tuple[int, Any]] = []
    for i, (medium, prompt) in enumerate(zip(media, prompts, strict=True)):
        try:
            ready.append((i, read(medium, prompt)))
        except MediaError as error:
            reasons[i] = str(error)
    for start in range(0, len(ready), batch_size):
        part = ready[start : start + batch_size]
        found = torch.as_tensor(compute([x for _, x in part], [prompts[i] for i, _ in part]))
        for (i, _), value in zip(part, found.float().cpu(), strict=True):
            values[i] = value
            if not torch.isfinite(value):
                values[i], reasons[i] = math.nan, f"the judge answered {float(value)}"
    return Scores(values, tuple(reasons))


def judge_card(name: str) -> Card:
    """The card of a judge.

    Raises:
        UserError: no such judge; lists what there is and the nearest match.
    """
    folder = find_root() / "reward_models"
    found = sorted(path.parent.name for path in folder.glob("*/card.yaml"))
    if name not in found:
        hint = nearest(name, found) or "see `t2i-align ls judges`"
        raise UserError(f"unknown judge '{name}'; known: {', '.join(found)}", hint)
    return read_card(folder / name / "card.yaml")


def normalizer(card: Card) -> Normalize:
    """The statistics of a card.

    Raises:
        UserError: the card has none.
    """
    stats = card.details.get("normalize")
    if stats is None:
        raise UserError(
            f"judge '{card.name}' has no statistics to normalise with",
            f"add details.normalize {{mean, std}} to reward_models/{card.name}/card.yaml",
        )
    sign = -1 if card.direction == "lower is better" else 1
    return Normalize(float(stats["mean"]), float(stats["std"]), sign)


@cache
def load(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Judge:
    """A judge by the name of its card; loaded once a process, device and dtype.

    Raises:
        UserError: unknown name, or a card without implementation.
        RecipeError: the card's options do not fit the implementation.
    """
    card = judge_card(name)
    if card.implementation is None:
        raise UserError(f"judge '{name}' has no implementation here", "see its card")
    cls = resolve(card.implementation)
    folder = find_root() / "reward_models" / name
    given = card.details.get("options", {})
    where = read(folder / "card.yaml").where
    options, problems = validate(cls.Options, given, ("details", "options"), where)
    if options is None:
        raise RecipeError(problems, f"judge {name}")
    return cls(folder, options, torch.device(device), dtype)
