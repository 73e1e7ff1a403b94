"""The prompts of trajectories, encoded once while the text encoders are there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_align.contract import SamplingInputs, TensorDict, map_dict
from t2i_align.data.batch import prompt_number
from t2i_align.data.rows import local_path, parquet_file
from t2i_align.errors import DataError
from t2i_align.plain_json import loads
from t2i_align.protocols import Generator
from t2i_align.rollout.generate import read_prompts
from t2i_align.rollout.options import RolloutOptions

COLUMNS = ("prompt", "caption")  # of parquet and json; .txt: a prompt a line, .jsonl: key prompt


@dataclass(frozen=True)
class Prompts:
    """N prompts ready to be sampled, on the CPU.

    Args:
        texts: the prompts.
        cond: ``(N, ...)``.
        negative: ``(1, ...)`` the unconditional branch, or None without guidance.
        plan: the family's scheduler, or None.
        shape: of a latent.
        guidance: scale of the two branches, 1 without a second (where the network is told it).
    """

    texts: tuple[str, ...]
    cond: TensorDict
    negative: TensorDict | None
    plan: Any
    shape: tuple[int, ...]
    guidance: float

    def __len__(self) -> int:
        """N."""
        return len(self.texts)

    def identity(self) -> str:
        """Hash of the texts in their order."""
        return hashlib.sha256("\x00".join(self.texts).encode()).hexdigest()

    def numbers(self, index: Tensor) -> Tensor:
        """Hashes of some prompts, ``(n,)`` int64."""
        return torch.tensor([prompt_number(self.texts[i]) for i in index.tolist()])

    def condition(self, index: Tensor) -> TensorDict:
        """Conditioning of some prompts, ``(n, ...)``."""
        return map_dict(self.cond, lambda x: x[index])

    def without(self, num: int, device: torch.device) -> TensorDict | None:
        """The unconditional branch for ``num`` items."""
        if self.negative is None:
            return None
        return map_dict(self.negative, lambda x: x.expand(num, *x.shape[1:]).to(device))


def texts_of(given: str | Sequence[str]) -> list[str]:
    """Prompts of a recipe: a list, or a file of any of the kinds of :data:`COLUMNS`.

    Raises:
        DataError: the file cannot be read, holds none, or has a line without one.
    """
    if not isinstance(given, str):
        return list(given)
    path = local_path(given)
    try:
        if path.suffix == ".parquet":
            return unique(rows_of_parquet(path), path)
        if path.suffix == ".json":
            return unique(loads(path.read_text(encoding="utf-8")), path)
        return read_prompts(path)
    except DataError as error:
        said = error.message.removeprefix("--prompts: ")
        raise DataError(f"rollout.prompts: {said}", error.fix) from error
    except (OSError, ValueError) as error:
        raise DataError(f"rollout.prompts: {path} cannot be read ({error})") from error


def rows_of_parquet(path: Path) -> list[dict[str, Any]]:
    """Rows of a parquet file with the columns that may hold prompts."""
    file = parquet_file(path)
    columns = [name for name in file.schema_arrow.names if name in COLUMNS]
    return file.read(columns=columns).to_pylist()


def unique(rows: Any, path: Path) -> list[str]:
    """Prompts of rows, each once, in their order.

    Raises:
        DataError: a row that is neither text nor has a prompt.
    """
    found: dict[str, None] = {}
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        held = row if isinstance(row, dict) else {}
        texts = [row] if isinstance(row, str) else [held[k] for k in COLUMNS if k in held]
        if not texts or not isinstance(texts[0], str):
            raise DataError(f"{path}: row {number} has no {' or '.join(COLUMNS)}")
        try:
            texts[0].encode()
        except UnicodeError as error:
            raise DataError(f"{path}: the prompt of row {number} is no text: {error}") from error
        found[texts[0]] = None
    if not found:
        raise DataError(f"{path} holds no prompts")
    return list(found)


def encode(generator: Generator, options: RolloutOptions, at_once: int) -> Prompts:
    """Encode a recipe's prompts.

    Args:
        generator: with its text encoders.
        options: the section.
        at_once: prompts encoded at once.
    """
    assert options.prompts is not None
    texts = texts_of(options.prompts)
    parts: list[SamplingInputs] = []
    for start in range(0, len(texts), at_once):
        made = generator.prepare_sampling(
            texts[start : start + at_once],
            num_steps=options.num_inference_steps,
            guidance=options.guidance_scale,
            negative_prompt=options.negative_prompt,
        )
        parts.append(made)
    keys = parts[0].cond
    cond = {k: stacked([p.cond[k] for p in parts]) for k in keys}
    negative = parts[0].negative
    if negative is not None:
        negative = {k: stacked([v[:1]]) for k, v in negative.items()}
    first = parts[0]
    return Prompts(tuple(texts), cond, negative, first.plan, first.shape, first.guidance)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several batches on the CPU; where lengths (dimension 1) differ, padded with zeros."""
    longest = max((p.shape[1] for p in parts if p.dim() > 1), default=0)
    rows = []
    for part in parts:
        if part.dim() > 1 and part.shape[1] < longest:
            more = part.new_zeros(len(part), longest - part.shape[1], *part.shape[2:])
            part = torch.cat([part, more], 1)
        rows.append(part.cpu())
    return torch.cat(rows)
