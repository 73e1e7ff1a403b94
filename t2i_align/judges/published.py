"""What judges of one published file share: it is found at first use and hashed on request."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from t2i_align.judges.weights import locate, sha256_of


class Published:
    """Base of a judge whose options are WeightsOptions."""

    def __init__(
        self, folder: Path, options: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load nothing yet."""
        self.folder, self.options, self.device, self.dtype = folder, options, device, dtype

    @cached_property
    def file(self) -> Path:
        """The weights.

        Links are kept: in the hub's cache only they have names, and a config beside them.
        """
        return locate(self.options, self.folder, self.folder.name, "model.safetensors").absolute()

    @property
    def weights_sha256(self) -> str | None:
        """Hash of the file of weights."""
        return sha256_of(self.file)
