"""What a request must be before a judge sees it: from here, allowed, JSON, not too large."""

from __future__ import annotations

import hmac
import io
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from t2i_align.contract import Media
from t2i_align.data.images import FORMATS, MAX_PIXELS

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
MAX_IMAGES = 256  # of a request
MAX_TOTAL = 2 * MAX_PIXELS  # of a request, all its pictures together
DRAINED = 4  # times the limit that is read and dropped, so that the refusal reaches the sender


class BadRequest(Exception):
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        """Keep the status beside the message."""
        super().__init__(message)
        self.status = status


def pictures(data: Sequence[bytes]) -> list[Media]:
    """Pictures, not decoded yet; a broken one is found later, by the judge.

    Raises:
        BadRequest: too many, or too many pixels by their headers together.
    """
    from PIL import Image

    if len(data) > MAX_IMAGES:
        raise BadRequest(f"{len(data)} pictures; a request holds {MAX_IMAGES} at most", 413)
    total = 0
    for each in data:
        try:
            width, height = Image.open(io.BytesIO(each), formats=FORMATS).size
        except Exception:  # broken headers raise anything; such a picture is never decoded
            continue
        total += width * height
    if total > MAX_TOTAL:
        raise BadRequest(
            f"{total / 1e6:.0f} megapixels by the headers; a request holds "
            f"{MAX_TOTAL / 1e6:.0f} at most",
            413,
        )
    return [Media("image", each) for each in data]


class Gate:
    """ASGI middleware that refuses.

    Args:
        app: what stands behind it.
        max_bytes: of a request's body, declared or counted.
        hosts: names in the Host header that are let in, None for any: a page in a browser that had
            its own name resolve to this machine is not.
        key: the bearer token everything but /health needs, None for none.
    """

    def __init__(
        self, app: Any, max_bytes: int, hosts: frozenset[str] | None, key: str | None
    ) -> None:
        """Keep them."""
        self.app, self.max_bytes, self.hosts, self.key = app, max_bytes, hosts, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on a body read within the limit."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        refusal = self.refusal(scope["method"], scope["path"], headers)
        body = bytearray() if refusal is None else None
        seen, more = 0, True
        while more and seen <= DRAINED * self.max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            part, more = message.get("body", b""), message.get("more_body", False)
            seen += len(part)
            if seen > self.max_bytes:
                body, refusal = None, refusal or self.too_large(seen)
            elif body is not None:
                body += part
        if refusal is not None or body is None:
            await refuse(send, *(refusal or self.too_large(seen)))
            return
        await self.app(scope, replay(bytes(body), receive), send)

    def too_large(self, size: int) -> tuple[int, str]:
        """Status and message."""
        return 413, f"a request of {size} bytes or more; the limit is {self.max_bytes}"

    def refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and message of a request that is not let in.

        Args:
            method: ``POST`` must bring JSON.
            path: ``/health`` needs no key.
            headers: names in lower case.
        """
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if self.hosts is not None and host not in self.hosts:
            return 421, "this server answers to its loopback address only"
        given = headers.get("authorization", "").encode()
        if self.key is not None and path != "/health":
            if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                return 401, "the key is missing or wrong (Authorization: Bearer ...)"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            return 415, f"send application/json, got {kind or 'no content type'}"
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > self.max_bytes:
            return 413, f"a request of {size} bytes; the limit is {self.max_bytes}"
        return None


def replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the whole body first, then whatever comes."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def refuse(send: Send, status: int, message: str) -> None:
    """An error in OpenAI's form."""
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
