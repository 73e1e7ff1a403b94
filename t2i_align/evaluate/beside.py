"""What stands beside a score, so that reward hacking shows: diversity, drift, held-out judges.

    beside(folder, base) -> <folder>/beside.json

    {"format": 1, "pictures": 800, "prompts": 200, "embedding": {...}, "perceptual": "ssim",
     "diversity": [{"id": "00000", "pictures": 4, "embedding": 0.31, "perceptual": 0.28,
                    "embedding_base": 0.35, "perceptual_base": 0.29}, ...],
     "drift": [{"statistic": "colorfulness", "base": 41.2, "model": 63.0, ...}, ...],
     "held_out": [{"judge": "hpsv2_1", "win_rate": 0.55, ...}, ...],
     "sections": [{"title", "text", "rows"}, ...]}

``folder`` is an evaluation, or holds pictures in the layout of one; ``base`` those of the base
model for the same prompts and noise, without it there is no drift. Equations are in
metrics/diversity.py and metrics/drift.py. ``sections`` is what pages show: that of the evaluation,
and that of a comparison with ``report --summary beside.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from t2i_align.errors import DataError, UserError
from t2i_align.evaluate.answers import write_whole
from t2i_align.evaluate.compare import read_rows
from t2i_align.evaluate.gallery import picture_root
from t2i_align.evaluate.metrics.diversity import (
    embedding_diversity,
    pairwise_mean,
    ssim_distance,
    viewed,
)
from t2i_align.evaluate.metrics.drift import drift, look
from t2i_align.evaluate.pictures import SUFFIXES, given_folder, read_picture
from t2i_align.options import Options

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FORMAT = 1
FILE = "beside.json"
BATCH = 32
Files = dict[str, dict[int, Path]]  # by prompt id and number
Measure = Callable[[Sequence["Image"]], float]


class BesideOptions(Options):
    """Which networks look at the pictures."""

    embedding: str = Field(
        default="clip_i",
        description="judge whose picture embedding is used: clip_i, dino, clip_score, ...",
    )
    perceptual: Literal["ssim", "dreamsim"] = Field(
        default="ssim", description="distance of two pictures; dreamsim needs its merged weights"
    )


@dataclass(frozen=True)
class Measures:
    """Both kinds of diversity of the pictures of a prompt.

    Args:
        embedding: Eq. (1) of metrics/diversity.py.
        perceptual: mean distance of two pictures.
        facts: what the embedding comes from.
    """

    embedding: Measure
    perceptual: Measure
    facts: dict[str, Any]


def pictures_of(folder: Path) -> Files:
    """Picture files by prompt id and number.

    Args:
        folder: a finished evaluation, wherever its pictures lie and however they are named; or a
            folder with ``<id>/samples/0000.png``, or with ``images`` that holds these.

    Raises:
        DataError: there are none.
    """
    found = _judged(folder) if (folder / "results.jsonl").is_file() else _sampled(folder)
    if not found:
        raise DataError(f"{folder} holds no pictures", "it needs <id>/samples/0000.png, ...")
    return found


def _judged(folder: Path) -> Files:
    """Pictures of an evaluation's rows that are there."""
    root, found = picture_root(folder), {}
    for row in read_rows(folder):
        file = root / row["filename"]
        if file.is_file():
            own = found.setdefault(row["id"], {})
            own[row.get("number", len(own))] = file
    return found


def _sampled(folder: Path) -> Files:
    """Pictures of a folder that holds one folder a prompt."""
    found: Files = {}
    root = given_folder(folder)
    for prompt in sorted(path for path in root.iterdir() if path.is_dir()):
        files = sorted((prompt / "samples").glob("*"))
        own = {int(f.stem): f for f in files if f.suffix in SUFFIXES and f.stem.isdecimal()}
        if own:
            found[prompt.name] = dict(sorted(own.items()))
    return found


def embedder(name: str, device: str = "cpu") -> Callable[[Sequence[Image]], np.ndarray]:
    """The picture half of a judge: pictures to ``(n, E)``.

    Args:
        name: of the judge's card.
        device: for its network.

    Raises:
        UserError: unknown, or a judge without such a half.
        ModelError: its weights are missing.
    """
    import torch

    from t2i_align.judges.base import load
    from t2i_align.judges.clip_family import ClipJudge
    from t2i_align.judges.dual_encoder import DualEncoder
    from t2i_align.judges.reference import ReferenceCosine

    judge = load(name, device)
    if isinstance(judge, ReferenceCosine):
        prepare, images = judge.tower.prepare, judge.tower.trunk.images
    elif isinstance(judge, ClipJudge):
        prepare, images = judge.prepare, judge.trunk.images
    elif isinstance(judge, DualEncoder):
        network, where = judge.model, judge.device
        prepare, images = judge.prepare, lambda x: network.encode_image(x.to(where)).float()
    else:
        raise UserError(f"the judge '{name}' has no embedding of pictures", "e.g. clip_i, dino")

    @torch.inference_mode()
    def embed(pictures: Sequence[Image]) -> np.ndarray:
        inputs = [prepare.image(picture) for picture in pictures]
        parts = [inputs[k : k + BATCH] for k in range(0, len(inputs), BATCH)]
        return torch.cat([images(torch.stack(part)).cpu() for part in parts]).double().numpy()

    return embed


def measures(options: BesideOptions, device: str = "cpu") -> Measures:
    """Both kinds, with their networks."""
    from t2i_align.judges.base import load
    from t2i_align.judges.facts import facts_of

    embed = embedder(options.embedding, device)
    facts = facts_of(options.embedding, load(options.embedding, device)).to_dict()
    perceptual = _dreamsim(device) if options.perceptual == "dreamsim" else _ssim
    return Measures(lambda p: embedding_diversity(embed(p)), perceptual, facts)


def _ssim(pictures: Sequence[Image]) -> float:
    import numpy as np

    return pairwise_mean([viewed(np.asarray(p)) for p in pictures], ssim_distance)


def _dreamsim(device: str) -> Measure:
    """Mean of DreamSim over all pairs."""
    import itertools

    from t2i_align.contract import Media
    from t2i_align.judges.base import load

    judge = load("dreamsim", device)

    def measure(pictures: Sequence[Image]) -> float:
        media = [Media("image", _png(p)) for p in pictures]
        pairs = list(itertools.combinations(media, 2))
        asked = [Media("image", a.data, {"reference": b}) for a, b in pairs]
        found = judge.score(asked, [""] * len(pairs))
        if found.num_failed:
            raise DataError(f"dreamsim has no number: {next(r for r in found.reasons if r)}")
        return float(found.values.double().mean())

    return measure


def _png(picture: Image) -> bytes:
    import io

    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def diversity_rows(files: Files, how: Measures, suffix: str = "") -> dict[str, dict[str, float]]:
    """Both numbers of every prompt with two pictures or more, by prompt id.

    Args:
        files: of the pictures.
        how: they are measured.
        suffix: of the numbers' names.

    Raises:
        DataError: a picture cannot be read, or those of a prompt differ in size.
    """
    found = {}
    for name, numbered in files.items():
        if len(numbered) < 2:
            continue
        pictures = [read_picture(path) for path in numbered.values()]
        try:
            pair = how.embedding(pictures), how.perceptual(pictures)
        except ValueError as error:
            raise DataError(f"pictures of the prompt {name}: {error}") from error
        found[name] = {f"embedding{suffix}": pair[0], f"perceptual{suffix}": pair[1]}
    return found


def drift_rows(files: Files, base: Files) -> list[dict[str, Any]]:
    """Rows of metrics/drift.py.

    Args:
        files: pictures of the model.
        base: of the base model.

    Raises:
        DataError: the two do not hold the same prompts and numbers.
    """
    import numpy as np

    keys = [[(k, n) for k in side for n in side[k]] for side in (files, base)]
    odd = sorted(set(keys[0]) ^ set(keys[1]))
    if odd:
        name, number = odd[0]
        raise DataError(
            f"drift compares picture by picture, and picture {number} of {name} is on one side "
            "only",
            "give the base model's pictures of the same prompts and noise",
        )
    looks = [
        [look(np.asarray(read_picture(side[name][number]))) for name, number in keys[0]]
        for side in (base, files)
    ]
    return drift(looks[0], looks[1], [name for name, _ in keys[0]])


def beside(
    folder: Path,
    base: Path | None = None,
    options: BesideOptions | None = None,
    device: str = "cpu",
    despite: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that stands beside the score of an evaluation.

    Args:
        folder: with the model's pictures.
        base: with the base model's.
        options: which networks.
        device: for them.
        despite: protocol fields in which the two evaluations differ on purpose.

    Returns:
        What :func:`write_beside` writes.

    Raises:
        DataError: pictures are missing, unlike, or cannot be read.
    """
    options = options or BesideOptions.model_validate({})
    files, how = pictures_of(folder), measures(options, device)
    rows = diversity_rows(files, how)
    held_out: list[dict[str, Any]] = []
    moved: list[dict[str, Any]] = []
    if base is not None:
        theirs = pictures_of(base)
        moved = drift_rows(files, theirs)
        for name, numbers in diversity_rows(theirs, how, "_base").items():
            rows[name] |= numbers
        held_out = _held_out(base, folder, despite)
    found = {
        "format": FORMAT,
        "folder": str(folder),
        "base": None if base is None else str(base),
        "pictures": sum(map(len, files.values())),
        "prompts": len(files),
        "embedding": how.facts,
        "perceptual": options.perceptual,
        "diversity": [{"id": k, "pictures": len(files[k])} | v for k, v in rows.items()],
        "drift": moved,
        "held_out": held_out,
    }
    return found | {"sections": sections(found)}


def _held_out(base: Path, folder: Path, despite: Sequence[str]) -> list[dict[str, Any]]:
    """Win rates, where both folders are finished evaluations."""
    from t2i_align.evaluate.win_rates import win_rates

    if not all((f / "results.jsonl").is_file() for f in (base, folder)):
        return []
    return win_rates(base, folder, despite)


def mean_diversity(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean over prompts of both kinds, of the model and of the base, with the difference.

    Args:
        found: what :func:`beside` returns.
    """
    rows, made = found["diversity"], []
    for kind in ("embedding", "perceptual"):
        own = [row[kind] for row in rows]
        if not own:
            continue
        line: dict[str, Any] = {"diversity": kind, "prompts": len(own)}
        line["model"] = math.fsum(own) / len(own)
        if all(f"{kind}_base" in row for row in rows):
            line |= _against([row[f"{kind}_base"] for row in rows], own)
        made.append(line)
    return made


def _against(base: list[float], own: list[float]) -> dict[str, Any]:
    from t2i_align.evaluate.aggregate import paired_difference

    facts: dict[str, Any] = {"base": math.fsum(base) / len(base)}
    if len(own) > 1:
        gain = paired_difference(base, own)
        facts |= {"difference": gain.mean, "low": gain.low, "high": gain.high}
    return facts


def sections(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a report.

    Args:
        found: what :func:`beside` returns, without them.
    """
    judge = found["embedding"]["judge"]
    spread = (
        f"Mean distance of two pictures of one prompt: one minus the cosine of {judge}'s picture "
        f"embeddings, and {found['perceptual']} in pixels. Pictures that became alike lower both."
    )
    if not found["diversity"]:
        spread = "Not known: every prompt has a single picture."
    made = [{"title": "Diversity", "text": spread, "rows": mean_diversity(found)}]
    if found["drift"]:
        text = (
            "Statistics that see no prompt, of the model's pictures and the base's on the same "
            "noise; distances are how far the values must be moved (Wasserstein-1)."
        )
        made.append({"title": "Drift", "text": text, "rows": found["drift"]})
    if found["held_out"]:
        text = (
            "A judge that held out and does not agree with the one that counts is a sign that "
            "the latter was gamed. Win rates count a tie as a half."
        )
        made.append({"title": "Held-out judges", "text": text, "rows": found["held_out"]})
    return made


def write_beside(found: dict[str, Any], folder: Path) -> Path:
    """``beside.json`` of an evaluation, whole or not at all.

    Args:
        found: what :func:`beside` returns.
        folder: of the evaluation.
    """
    write_whole(folder / FILE, [json.dumps(found, indent=1)])
    return folder / FILE
