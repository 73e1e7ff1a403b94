"""Numbers of a judge, with what went wrong, and the common scale they can be put on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from t2i_align.errors import UserError


@dataclass(frozen=True)
class Scores:
    """Numbers of one judge.

    Args:
        values: ``(B,)`` float32, NaN where the judge failed.
        reasons: B entries, why a value is NaN, None elsewhere.
        unreachable: some failed for want of a server, so that asking again later makes sense.
    """

    values: Tensor
    reasons: tuple[str | None, ...]
    unreachable: bool = field(default=False, kw_only=True)

    @property
    def num_failed(self) -> int:
        """How many are NaN."""
        return sum(r is not None for r in self.reasons)

    def kept(self, name: str) -> Scores:
        """These, to be stored.

        Args:
            name: of the judge.

        Raises:
            UserError: its server is not there, so that numbers are missing that another try gives.
        """
        if not self.unreachable:
            return self
        why = next(reason for reason in self.reasons if reason is not None)
        raise UserError(
            f"judge '{name}' cannot be reached: {why}",
            "start its server and run the same command again",
        )


@dataclass(frozen=True)
class Normalize:
    """Statistics of a judge on its own reference data, Eq. (1)."""

    mean: float
    std: float
    direction: int = 1

    def __call__(self, values: Tensor) -> Tensor:
        """Numbers on the common scale, shape kept; NaN stays NaN."""
        return self.direction * (values - self.mean) / self.std
