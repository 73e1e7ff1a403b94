"""The base of every Options class: strict, closed, immutable.

An Options class lives beside the code it configures (objective, generator, source, ...). Its fields
carry their own description, which becomes the JSON schema and the documentation.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Strict pydantic model: unknown keys and wrong types are errors, never repaired."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, protected_namespaces=(), validate_default=True
    )
