r"""Does the picture show the text its prompt quotes?

With target t (the quoted text) and r (everything the recogniser reads, top to bottom), both after
Unicode, case and space normalisation,

    (1)  s = max(0, 1 - d(r, t) / |t|)        d: Levenshtein's edit distance, |t|: its length

The reward of Flow-GRPO (arXiv:2505.05470) is (1) with d = 0 wherever t is a substring of r, so a
picture that prints the text many times, or inside other text, keeps the full reward. Here it does
not: every surplus character costs as much as a missing one. A picture without any text scores 0; a
prompt without quotes, an empty quote and a recogniser that breaks are NaN with the reason.

The recogniser is RapidOCR's: PP-OCRv4 detection, direction and recognition networks (Chinese and
English), run by ONNX Runtime on the CPU. The weights are files of its wheel: nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from t2i_align.contract import Media, MediaError
from t2i_align.judges.base import Scores, rgb, score_each
from t2i_align.optional import require
from t2i_align.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

STRAIGHT = str.maketrans(dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"'))
APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b", "'"))
DASHES = str.maketrans(dict.fromkeys("\u2013\u2014\u2212", "-"))
QUOTED = re.compile(r'"([^"]*)"')


class OcrOptions(Options):
    """Which text is asked for, and how sure the recogniser must be."""

    target: Literal["quotes", "first_quote", "prompt"] = Field(
        "quotes",
        description="all quoted texts in their order, the first one only, or the whole prompt",
    )
    text_score: float = Field(
        0.5, ge=0, le=1, description="recognised text under this confidence is not read"
    )
    side: int = Field(
        736, ge=32, description="smaller pictures are enlarged until the shorter side is this"
    )
    num_threads: int = Field(-1, ge=-1, description="threads of ONNX Runtime; -1: its own choice")


def target_text(prompt: str, target: Literal["quotes", "first_quote", "prompt"]) -> str:
    """The text a prompt asks for, as written.

    Quotation marks may be straight or typographic (“ ”, „ “, « »); single ones are apostrophes.

    Raises:
        MediaError: no quotes, one that is not closed, or nothing inside.
    """
    if target == "prompt":
        text = prompt
    else:
        straight = prompt.translate(STRAIGHT)
        if '"' not in straight:
            raise MediaError(f"'{prompt}' quotes no text; write it as \"...\", or target: prompt")
        if straight.count('"') % 2:
            raise MediaError(f"a quotation mark of '{prompt}' is not closed")
        found = QUOTED.findall(straight)
        text = " ".join(found[:1] if target == "first_quote" else found)
    if not normalised(text):
        raise MediaError(f"the text to look for in '{prompt}' is empty")
    return text


def normalised(text: str) -> str:
    """Text as it is compared: compatibility form, one case, straight marks, no spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(text.translate(STRAIGHT).translate(APOSTROPHES).translate(DASHES).split())


def text_score(read: str, target: str) -> float:
    """Eq. (1), in [0, 1].

    Args:
        read: what the recogniser found.
        target: what was asked for, not empty.
    """
    from rapidfuzz.distance import Levenshtein

    wanted = normalised(target)
    return max(0.0, 1 - Levenshtein.distance(normalised(read), wanted) / len(wanted))


class OcrJudge:
    """Eq. (1) of a picture and the text its prompt quotes."""

    Options: ClassVar[type[Options]] = OcrOptions

    def __init__(
        self, folder: Path, options: OcrOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load nothing yet; the networks run on the CPU in float32, whatever is asked for.

        Raises:
            MissingDependencyError: the recogniser is not installed.
        """
        self.options = options
        require("rapidocr-onnxruntime", "ocr", "the judge ocr")
        require("rapidfuzz", "ocr", "the judge ocr")

    @cached_property
    def engine(self) -> Any:
        """The recogniser, loaded once."""
        from rapidocr_onnxruntime import RapidOCR

        threads = self.options.num_threads
        return RapidOCR(
            text_score=self.options.text_score,
            det_limit_side_len=self.options.side,
            intra_op_num_threads=threads,
            inter_op_num_threads=threads,
        )

    @property
    def weights_sha256(self) -> str:
        """Over the networks of the wheel, by name."""
        import rapidocr_onnxruntime

        digest = hashlib.sha256()
        folder = Path(str(rapidocr_onnxruntime.__file__)).parent / "models"
        for path in sorted(folder.glob("*.onnx")):
            digest.update(path.name.encode() + b"\x00" + path.read_bytes())
        return digest.hexdigest()

    def score(self, media: Sequence[Media], prompts: Sequence[str]) -> Scores:
        """Eq. (1) of each picture, one after another.

        Args:
            media: B images.
            prompts: B prompts that quote a text.
        """
        return score_each(media, prompts, self._value, lambda values, _: values)

    def _value(self, medium: Media, prompt: str) -> float:
        target = target_text(prompt, self.options.target)
        return text_score(self.read(rgb(medium)), target)

    def read(self, image: PILImage) -> str:
        """All text of an RGB picture, a space between its parts; empty where there is none.

        Raises:
            MediaError: the recogniser broke.
        """
        bgr = np.ascontiguousarray(np.asarray(image)[..., ::-1])
        try:
            parts, _ = self.engine(bgr)
        except Exception as error:  # the engine has no common base class for its errors
            what = str(error) or type(error).__name__
            raise MediaError(f"the text recogniser broke: {what}") from error
        return " ".join(str(part[1]) for part in parts or ())
