"""Silences third-party chatter: loading bars and hints about optional kernels."""

from __future__ import annotations

import logging


def hush() -> None:
    """Only warnings and errors of libraries; no bars but our own. Downloads keep theirs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
