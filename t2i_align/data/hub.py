"""Rows of a data set of the Hugging Face hub, streamed by HF's ``datasets`` (the hub extra)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from t2i_align.data.options import FileOptions
from t2i_align.errors import DataError


def hub_rows(options: FileOptions) -> Iterator[dict[str, Any]]:
    """Rows of ``hub_id``; image and video columns stay undecoded ``{bytes, path}``.

    Raises:
        DataError: the data set, its revision or split cannot be loaded.
    """
    from t2i_align import optional

    optional.require("datasets", "hub", "data.hub_id")
    import datasets

    try:
        stream = datasets.load_dataset(
            str(options.hub_id), split=options.split, revision=options.revision, streaming=True
        )
        for name, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Image | datasets.Video):
                stream = stream.cast_column(name, type(feature)(decode=False))
        yield from stream
    except Exception as error:  # network, permission, repository or format: many types, one remedy
        raise DataError(
            f"data.hub_id: cannot read '{options.hub_id}' (split {options.split}, revision "
            f"{options.revision or 'latest'}): {error}",
            "check name, split, network and `hf auth login`; or download it and use data.path",
        ) from error
