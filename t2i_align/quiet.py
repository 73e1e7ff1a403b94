"""Silences third-party chatter, and keeps what is optional from being loaded at every start."""

from __future__ import annotations

import logging
from collections.abc import Callable

from t2i_align.later import hide, import_later, importing

_HUSHED: list[bool] = []  # not empty once it was called


def hushing() -> Callable[[], None] | None:
    """What starts a process of this one's: :func:`hush` where it was called here."""
    return hush if _HUSHED else None


def hush() -> None:
    """Only warnings and errors of libraries; no bars but our own. Downloads keep theirs.

    Called before the first import of diffusers, so optional libraries can wait for their use.
    """
    _HUSHED.append(True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import_later()
    hide()
    with importing():
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
