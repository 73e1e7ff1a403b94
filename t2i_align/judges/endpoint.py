"""Posting JSON to a server that may be busy, slow, wrong or hostile.

A request is sent again on 408, 429 and 5xx, on timeouts and on broken connections, ``retries``
times at most. Waits double from ``backoff`` seconds up to a minute; a Retry-After in seconds is
kept to, up to the same minute. Replies are read up to ``max_bytes`` and no further; redirects are
not followed, since they would carry the key elsewhere. The key stands in one header and nowhere
else: it is cut out of anything that is reported.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from t2i_align.errors import ModelError
from t2i_align.judges.endpoint_error import AGAIN, EndpointError
from t2i_align.optional import require

if TYPE_CHECKING:
    import httpx2

LONGEST_WAIT = 60.0


def key_from(variable: str | None) -> str | None:
    """The API key an environment variable holds; None where no variable is named.

    Raises:
        ModelError: the variable is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ModelError(
            f"api_key_env names the environment variable {variable}, which is not set",
            f"export {variable}=..., or drop api_key_env for a server without a key",
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether a host can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass
class Endpoint:
    """A server's base address and how patient to be with it.

    Args:
        url: ``http(s)://host/v1``.
        key: sent as a bearer token.
        timeout: seconds, for connecting and for each read.
        retries: times a request is sent again.
        backoff: seconds before the first of them.
        max_bytes: of a reply.
        transport: in place of the network, for tests.
        sleep: waits so many seconds.
    """

    url: str
    key: str | None = None
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 0.5
    max_bytes: int = 2**20
    transport: httpx2.AsyncBaseTransport | None = None
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep

    @asynccontextmanager
    async def open(self) -> AsyncIterator[httpx2.AsyncClient]:
        """A client of this address, closed at the end.

        Raises:
            MissingDependencyError: the HTTP library is not installed.
        """
        require("httpx2", "serve", "a remote judge")
        import httpx2

        headers = {"Accept-Encoding": "identity"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        async with httpx2.AsyncClient(
            base_url=self.url.rstrip("/") + "/",
            headers=headers,
            timeout=self.timeout,
            transport=self.transport,
            trust_env=not is_loopback(urlsplit(self.url).hostname or ""),
        ) as client:
            yield client

    async def ask(self, client: httpx2.AsyncClient, path: str, payload: Any = None) -> Any:
        """The JSON reply to a POST, or to a GET where there is no payload.

        Raises:
            EndpointError: none came in all tries, or not JSON.
        """
        import httpx2

        wait = self.backoff
        for left in range(self.retries, -1, -1):
            pause = wait
            try:
                return await self._once(client, path, payload)
            except httpx2.TimeoutException as error:
                failure = EndpointError(f"no reply in {self.timeout:g} s ({_kind(error)})")
            except httpx2.HTTPError as error:
                failure = EndpointError(self.safe(f"no connection: {error or _kind(error)}"))
            except _Busy as busy:
                failure, pause = busy.failure, max(wait, busy.after)
            if left == 0:
                break
            await self.sleep(min(pause, LONGEST_WAIT))
            wait *= 2
        tries = f" after {self.retries + 1} tries" if self.retries else ""
        raise EndpointError(f"{failure}{tries}", failure.status)

    async def _once(self, client: httpx2.AsyncClient, path: str, payload: Any) -> Any:
        method = "GET" if payload is None else "POST"
        async with client.stream(method, path, json=payload) as reply:
            body = bytearray()
            async for chunk in reply.aiter_bytes():
                body += chunk
                if len(body) > self.max_bytes:
                    raise EndpointError(f"a reply of more than {self.max_bytes} bytes", 200)
        if reply.status_code != 200:
            failure = EndpointError(
                self.safe(f"HTTP {reply.status_code}: {_message(bytes(body))}"), reply.status_code
            )
            if reply.status_code in AGAIN:
                raise _Busy(failure, _seconds(reply.headers.get("Retry-After")))
            raise failure
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise EndpointError(f"the reply is not JSON: {error}", 200) from error

    def safe(self, text: str) -> str:
        """A text without the key, cut to a line."""
        if self.key is not None:
            text = text.replace(self.key, "***")
        line = " ".join(text.split())
        return line if len(line) <= 300 else f"{line[:297]}..."


class _Busy(Exception):
    """Worth another try after so many seconds."""

    def __init__(self, failure: EndpointError, after: float) -> None:
        super().__init__(str(failure))
        self.failure, self.after = failure, after


def _kind(error: Exception) -> str:
    return type(error).__name__


def _seconds(text: str | None) -> float:
    """A Retry-After in seconds; 0 for a date or nothing."""
    return float(text) if text is not None and text.isdecimal() else 0.0


def _message(body: bytes) -> str:
    """What an error reply says: OpenAI's ``error.message``, else its text."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        return str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text
