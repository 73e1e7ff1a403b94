"""Cases of FLUX.1 and Chroma."""

from __future__ import annotations

from tests.backbones import Case
from tests.tiny_flux import chroma, flux

SHORT = {"max_sequence_length": 32}
CASES: tuple[Case, ...] = (
    Case("flux", flux, {"resolution": 64, **SHORT}, (64, 96), 3.5, SHORT),
    Case("chroma", chroma, {"resolution": 64, **SHORT}, (64, 96), 4.0, SHORT),
)
