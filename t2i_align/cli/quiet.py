"""Silences third-party chatter, and keeps what is optional from being loaded at every start."""

from __future__ import annotations

import logging

from t2i_align.later import hide, import_later, importing


def hush() -> None:
    """Only warnings and errors of libraries; no bars but our own. Downloads keep theirs.

    Called before the first import of diffusers, so optional libraries can wait for their use.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import_later()
    hide()
    with importing():
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
