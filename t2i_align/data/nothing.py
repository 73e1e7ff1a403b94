"""No records: objectives on trajectories train on samples of the policy and read none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from t2i_align.data.options import RecordOptions
from t2i_align.data.records import Record
from t2i_align.data.source import Stats
from t2i_align.errors import DataError
from t2i_align.options import Options


class NothingOptions(RecordOptions):
    """Options of ``data: {type: none}``."""

    type: Literal["none"] = "none"

    @model_validator(mode="after")
    def _says_nothing_else(self) -> NothingOptions:
        more = sorted(self.said() - {"type"})
        if more:
            raise ValueError(f"type none has no records, so {', '.join(more)} would do nothing")
        return self


class Nothing:
    """No stored records, for objectives on the policy's own trajectories (prompts: rollout)."""

    Options: ClassVar[type[Options]] = NothingOptions

    def __init__(self, options: NothingOptions) -> None:
        """Keep the options."""
        self.options = options
        self.stats = Stats()

    @staticmethod
    def check(options: NothingOptions) -> list[str]:
        """Nothing can be wrong."""
        return []

    def __iter__(self) -> Iterator[Record]:
        """Refuse.

        Raises:
            DataError: always.
        """
        raise DataError(
            "data.type none has no records",
            "name a source of records, or an objective on trajectories: t2i-align ls objectives",
        )

    def fingerprint(self) -> dict[str, Any]:
        """Always the same."""
        return {"type": "none"}

    def count(self) -> int | None:
        """None that could be counted."""
        return None
