"""Options of the ``remote`` judge, and the address it may ask."""

from __future__ import annotations

import os
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field

from t2i_align.errors import ModelError
from t2i_align.judges.scale import ScaleOptions
from t2i_align.judges.vqa_score import YesNoOptions
from t2i_align.judges.wire import MAX_TOP

VARIABLE = "T2I_ALIGN_REMOTE_URL"


class RemoteOptions(ScaleOptions, YesNoOptions):
    """Options of the ``remote`` judge."""

    url: str | None = Field(
        default=None, description=f"address up to /v1; null: the environment variable {VARIABLE}"
    )
    model: str | None = Field(default=None, description="null: the first the endpoint lists")
    protocol: Literal["chat", "score"] = Field(default="chat", description="see the module")
    read: Literal["yes_no", "likert", "text"] = Field(
        default="yes_no", description="what is read off an answer, with protocol chat"
    )
    logprobs: Literal["when_offered", "required", "never"] = Field(
        default="when_offered", description="whether read: yes_no and likert use them"
    )
    top_logprobs: int = Field(
        default=20, ge=2, le=MAX_TOP, description="likely tokens to ask for; most servers cap at 20"
    )
    max_missing: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of the scale that answers beyond the likely tokens may hold at most",
    )
    api_key_env: str | None = Field(
        default=None, description="environment variable that holds the API key"
    )
    concurrency: int = Field(default=8, ge=1, description="requests under way at once")
    batch_size: int = Field(default=16, ge=1, description="pictures a request, protocol score")
    timeout: float = Field(default=60.0, gt=0, description="seconds, for each read")
    retries: int = Field(default=4, ge=0, description="on 408, 429, 5xx and lost connections")
    backoff: float = Field(default=0.5, ge=0, description="seconds before the first, then doubled")
    max_response_bytes: int = Field(default=2**20, ge=1, description="a larger reply is refused")
    max_pixels: int | None = Field(default=None, ge=1, description="larger pictures are shrunk")


def checked_url(given: str | None) -> str:
    """The address of an endpoint.

    Raises:
        ModelError: none, not http(s), or with a password in it.
    """
    url = given or os.environ.get(VARIABLE, "")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ModelError(
            f"a remote judge needs an address, got {url!r}" if url else "no address was given",
            f"set {VARIABLE}=http://127.0.0.1:8000/v1, or the option url",
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ModelError(
            f"the address of {parts.hostname} carries more than host and path",
            "put a key into an environment variable and name it with api_key_env",
        )
    return url
