"""What goes over the wire between ``remote`` and a server: JSON and PNG, nothing that can run code.

Two protocols. ``chat`` is the part of OpenAI's chat completions that vLLM, SGLang and
``t2i-align judges serve`` share; pictures are PNG data URLs. ``score`` is ours:

    POST /v1/score  {"prompts": [...], "images": ["<base64 PNG>", ...], "references": null or [...]}
              200   {"judge": ..., "version": ..., "values": [0.7, null], "reasons": [null, "..."]}

Requests are read strictly (an unknown key is an error that names it), replies of other people's
servers leniently: only what is used must be there.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from t2i_align.contract import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

PREFIX = "data:image/"
MAX_TOP = 1000  # OpenAI and vLLM give 20 unless told otherwise


class Asked(BaseModel):
    """Base of requests: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class ImageUrl(Asked):
    """A picture of a message."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class Part(Asked):
    """A text or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _what_it_says(self) -> Part:
        held = [k for k in ("text", "image_url") if getattr(self, k) is not None]
        if held != [self.type]:
            raise ValueError(f"a part of type {self.type} holds {self.type} and nothing else")
        return self


class Message(Asked):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class ChatRequest(Asked):
    """A chat completion; ``continue_final_message`` as vLLM and SGLang have it."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    seed: int | None = None
    n: Literal[1] = 1
    stream: Literal[False] = False
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    continue_final_message: bool = False
    add_generation_prompt: bool = True


class ScoreRequest(Asked):
    """Pictures for any judge; ``references`` where the judge compares."""

    prompts: list[str] = Field(min_length=1)
    images: list[str] = Field(min_length=1)
    references: list[str | None] | None = None


class ScoreReply(BaseModel):
    """A number or a reason each."""

    judge: str = ""
    version: int | None = None
    values: list[float | None]
    reasons: list[str | None]


class Top(BaseModel):
    """A likely token."""

    token: str
    logprob: float


class Step(Top):
    """The token that was said, and the likely ones."""

    top_logprobs: list[Top] = []


class Logprobs(BaseModel):
    """Of the answer's tokens."""

    content: list[Step] | None = None


class Said(BaseModel):
    """The answer's text."""

    content: str | None = None


class Choice(BaseModel):
    """One answer."""

    message: Said
    logprobs: Logprobs | None = None

    def top(self) -> list[Top]:
        """The likeliest first tokens; empty where the server offers none."""
        steps = (self.logprobs.content if self.logprobs else None) or []
        return steps[0].top_logprobs if steps else []


class ChatReply(BaseModel):
    """A chat completion."""

    choices: list[Choice] = Field(min_length=1)


def to_base64(image: PILImage) -> str:
    """A picture as base64 of a PNG, which loses nothing."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def to_url(image: PILImage) -> str:
    """A picture as a data URL."""
    return f"{PREFIX}png;base64,{to_base64(image)}"


def from_base64(text: str) -> bytes:
    """The bytes of strict base64.

    Raises:
        MediaError: it is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"not base64: {error}") from error


def from_url(url: str) -> bytes:
    """The bytes of a data URL; nothing is ever fetched.

    Raises:
        MediaError: another kind of URL, or not base64.
    """
    head, comma, body = url.partition(",")
    if not (head.startswith(PREFIX) and head.endswith(";base64") and comma):
        raise MediaError(
            f"an image is a data URL (data:image/png;base64,...), got {url[:32]!r}; "
            "URLs are not fetched"
        )
    return from_base64(body)
