r"""Several judges as one, with at least one more held out to watch it.

A policy finds what its judge likes by mistake; judges of different make share fewer mistakes. With
s_k the number of member k, d_k = +1 or -1 its direction, m_k and c_k the mean and standard
deviation frozen on this card, f the least standard deviation,

    (1)  z_k = d_k (s_k - m_k) / max(c_k, f)

and one of the rules of ensemble_rules.py makes a number of the z_k: ``z_score`` (weighted mean),
``product`` (soft "and", with gates), ``quantile`` (0: the minimum), or ``rank`` of the d_k s_k
among the samples of the same prompt.

``rank`` is the one rule whose number depends on the samples beside it (groups are equal prompts);
the others keep the contract. Statistics are frozen so that a number means the same tomorrow. A
failing member makes the sample NaN with the member's name. :meth:`Ensemble.members` gives the
columns of members and held-out judges; reports show them all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from t2i_align.contract import Media
from t2i_align.errors import UserError
from t2i_align.judges import ensemble_rules as rules
from t2i_align.judges.base import Judge, Scores, judge_card, load
from t2i_align.judges.ensemble_options import EnsembleOptions, Member
from t2i_align.judges.facts import facts_of
from t2i_align.options import Options

SIGNS = {"higher is better": 1, "lower is better": -1}


class Ensemble:
    """A rule over judges of the catalogue."""

    Options: ClassVar[type[Options]] = EnsembleOptions

    def __init__(
        self, folder: Path, options: EnsembleOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Look the judges up; load none yet.

        Raises:
            UserError: an unknown judge, a member without a direction, or an ensemble inside this.
        """
        self.options, self.device, self.dtype = options, device, dtype
        names = (*(m.judge for m in options.members), *options.held_out)
        known = {name: judge_card(name) for name in names}
        for name, card in known.items():
            if (card.implementation or "").startswith(__name__):
                raise UserError(f"'{name}' is an ensemble; name its judges instead")
        self.signs = [_sign(m, known[m.judge].direction) for m in options.members]

    @cached_property
    def judges(self) -> dict[str, Judge]:
        """Members and held-out judges by name, shared with the rest of the process."""
        names = [*(m.judge for m in self.options.members), *self.options.held_out]
        return {name: load(name, str(self.device), self.dtype) for name in names}

    @property
    def weights_sha256(self) -> str | None:
        """Over the members' own hashes; None where no member has weights."""
        known = [
            f"{m.judge}:{found}"
            for m in self.options.members
            if (found := getattr(self.judges[m.judge], "weights_sha256", None))
        ]
        return hashlib.sha256("\n".join(known).encode()).hexdigest() if known else None

    @property
    def depends_on(self) -> dict[str, Any]:
        """The facts of its members."""
        return {
            m.judge: facts_of(m.judge, self.judges[m.judge]).to_dict() for m in self.options.members
        }

    def members(self, media: Sequence[Media], prompts: Sequence[str]) -> dict[str, Scores]:
        """What every member and then every held-out judge says, on its own scale."""
        return {name: judge.score(media, prompts) for name, judge in self.judges.items()}

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """One number a sample; held-out judges are not asked.

        Args:
            media: B media.
            prompts: B prompts.
        """
        names = [m.judge for m in self.options.members]
        return self.combine({n: self.judges[n].score(media, prompts) for n in names}, prompts)

    def combine(self, columns: Mapping[str, Scores], prompts: Sequence[str]) -> Scores:
        """The rule on columns that are already there, those of :meth:`members` for instance."""
        own = {m.judge: columns[m.judge] for m in self.options.members}
        raw = torch.stack([c.values.double().cpu() for c in own.values()])  # (K, B)
        reasons = [
            next((f"{n}: {c.reasons[i]}" for n, c in own.items() if c.reasons[i]), None)
            for i in range(raw.shape[1])
        ]
        failed = torch.tensor([r is not None for r in reasons], dtype=torch.bool)
        values = self._rule(raw.masked_fill(failed, math.nan), prompts)
        gone = any(c.unreachable for c in own.values())
        values = values.float().masked_fill(failed, math.nan)
        return Scores(values, tuple(reasons), unreachable=gone)

    def _rule(self, raw: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw numbers ``(K, B)`` to one each ``(B,)``."""
        own = self.options.members
        voting = [k for k, m in enumerate(own) if m.weight]
        weights = torch.tensor([own[k].weight for k in voting], dtype=torch.float64)
        if self.options.rule == "rank":
            signed = torch.stack([self.signs[k] * raw[k] for k in voting])
            return rules.rank(signed, weights, prompts)
        z = torch.stack([self._z(own[k], raw[k], self.signs[k]) for k in voting])
        if self.options.rule == "quantile":
            return z.quantile(self.options.quantile, dim=0)
        if self.options.rule == "z_score":
            return rules.z_score(z, weights)
        return rules.product(z, weights).masked_fill(self._closed(raw), 0.0)

    def _z(self, member: Member, values: Tensor, sign: int) -> Tensor:
        """Eq. (1)."""
        assert member.mean is not None and member.std is not None
        return sign * (values - member.mean) / max(member.std, self.options.std_floor)

    def _closed(self, raw: Tensor) -> Tensor:
        """Where a gated member is worse than its gate ``(B,)``."""
        closed = torch.zeros(raw.shape[1], dtype=torch.bool)
        for member, sign, values in zip(self.options.members, self.signs, raw, strict=True):
            if member.gate is not None:
                gate = torch.tensor(member.gate, dtype=torch.float32)  # scores are float32 too
                closed |= sign * values < sign * gate
        return closed


def _sign(member: Member, direction: str | None) -> int:
    """Which end of a member is better.

    Raises:
        UserError: neither the member nor its card says.
    """
    if member.direction is not None:
        return member.direction
    if direction not in SIGNS:
        raise UserError(
            f"judge '{member.judge}' has no better end (its card says '{direction}')",
            "give the member direction: 1 or -1",
        )
    return SIGNS[direction]
