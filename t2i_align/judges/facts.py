"""What a judge's numbers come from: card, options, weights, and what the judge itself knows of.

Two tables of scores belong together if these are equal. What a card does not show (the address a
remote judge asks, the text of a template, the members of an ensemble) a judge tells by
``depends_on``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from t2i_align.catalog import find_root
from t2i_align.judges.base import Judge, judge_card
from t2i_align.judges.weight_files import combined, sha256_of


@runtime_checkable
class HasWeights(Protocol):
    """A judge that says what it loaded."""

    weights_sha256: str | None


@runtime_checkable
class DependsOn(Protocol):
    """A judge whose numbers depend on more than its card and its weights."""

    @property
    def depends_on(self) -> Mapping[str, Any]:
        """JSON-able; equal where numbers are comparable."""
        ...


@dataclass(frozen=True)
class JudgeFacts:
    """What one column of numbers came from.

    Args:
        name: the judge.
        version: of its card.
        weights_sha256: of what it loaded; None for a judge without weights.
        options: of its card.
        depends_on: what the judge tells besides.
    """

    name: str
    version: int
    weights_sha256: str | None
    options: Mapping[str, Any]
    depends_on: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str | None:
        """Short name of what the judge tells besides; None where that is nothing."""
        if not self.depends_on:
            return None
        text = json.dumps(dict(self.depends_on), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "judge": self.name,
            "version": self.version,
            "weights_sha256": self.weights_sha256,
            "options": dict(self.options),
            "depends_on": dict(self.depends_on),
        }


def facts_of(name: str, judge: Judge) -> JudgeFacts:
    """The facts of a loaded judge.

    Args:
        name: of its card.
        judge: built.
    """
    card = judge_card(name)
    more = dict(judge.depends_on) if isinstance(judge, DependsOn) else {}
    options = card.details.get("options", {})
    return JudgeFacts(name, card.version, weights_of(judge, name), options, more)


def weights_of(judge: Judge, name: str) -> str | None:
    """SHA-256 of a judge's weights: as the judge says, else of those beside its card."""
    if isinstance(judge, HasWeights):
        return judge.weights_sha256
    files = sorted((find_root() / "reward_models" / name).glob("*.safetensors"))
    return combined([sha256_of(file) for file in files]) if files else None
