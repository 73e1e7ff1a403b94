"""Randomness as a function of (run seed, record id, draw index, stream).

No generator state lives anywhere: the noise of a record's k-th draw is the same on every rank, at
    every batch size,
before and after a resume. Everything is drawn on the CPU, so every machine draws the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive(run_seed: int, record_id: str, draw: int, stream: str) -> int:
    """A seed for one stream of one draw of one record, in [0, 2**63).

    torch's CPU generator uses its low 32 bits, so among millions of records a few share noise.
    """
    text = f"{run_seed}\x00{record_id}\x00{draw}\x00{stream}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def uniform01(run_seed: int, record_id: str, draw: int, stream: str) -> float:
    """A number in [0, 1) for yes/no decisions such as flips and caption dropout."""
    return derive(run_seed, record_id, draw, stream) / 2.0**63


def generator(seed: int) -> torch.Generator:
    """A fresh CPU generator."""
    return torch.Generator().manual_seed(seed)


def normals(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 ``(B, *shape)``; row i depends on ``seeds[i]`` and ``shape`` only."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(s)) for s in seeds.tolist()])


def uniforms(seeds: Tensor, num: int) -> Tensor:
    """Uniform float64 ``(B, num)`` in [0, 1); row i depends on ``seeds[i]`` only."""
    rows = [torch.rand(num, generator=generator(s), dtype=torch.float64) for s in seeds.tolist()]
    return torch.stack(rows)
