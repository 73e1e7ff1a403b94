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

    def said(self) -> set[str]:
        """Keys that were given and do not repeat their defaults.

        A recipe that is written out, every default in it, says no more than the one it came from.
        """
        fields = type(self).model_fields
        return {
            key
            for key in self.model_fields_set
            if getattr(self, key) != fields[key].get_default(call_default_factory=True)
        }
