"""JSON that strangers wrote: what cannot be read is a ValueError, however it fails.

The standard library answers a value nested some thousand deep with RecursionError, which no reader
of a broken file expects.
"""

from __future__ import annotations

import json
from typing import Any

from t2i_align.errors import UserError


def loads(text: str | bytes) -> Any:
    """The value of a text.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deep.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def load_object(text: str | bytes, name: str, error: type[UserError]) -> dict[str, Any]:
    """The object of a text.

    Args:
        text: JSON.
        name: what it was read from, for the message.
        error: that is raised for anything else.
    """
    try:
        found = loads(text)
    except ValueError as problem:
        raise error(f"{name} is not JSON: {problem}") from problem
    if not isinstance(found, dict):
        raise error(f"{name} holds no JSON object, got {type(found).__name__}")
    return found
