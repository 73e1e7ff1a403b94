"""Paths of a recipe that cannot even be looked at: too long, of an unknown user, behind a bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from t2i_align.options import Options


def reason(error: Exception) -> str:
    """What the system says."""
    return getattr(error, "strerror", None) or str(error)


def key_of_path(recipe: Any, sections: Iterable[str], path: str) -> str | None:
    """The key whose text a failing path was made of.

    Args:
        recipe: that was checked.
        sections: the check reads.
        path: that failed; ``~`` for one that begins so.
    """
    texts: dict[str, Any] = {}
    for name in sections:
        value = getattr(recipe, name)
        inner = value.model_dump() if isinstance(value, Options) else {}
        texts |= {f"{name}.{k}": v for k, v in inner.items()} | {name: value}
    known = {k: v for k, v in texts.items() if isinstance(v, str) and v}
    found = [k for k, v in known.items() if v in path or v[0] == path]
    return max(found, key=lambda k: len(known[k]), default=None)
