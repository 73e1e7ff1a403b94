"""Why no usable reply came from an endpoint, and what that says of the server."""

from __future__ import annotations

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
GONE = frozenset({502, 503, 504})  # a gateway without its server
REFUSED = frozenset({401, 404})  # no such key, no such model: whatever is asked


class Unreachable(str):
    """A reason that may say nothing of what was asked.

    A server that is down or too slow, or one that chokes on this very picture.
    """

    status: int | None

    def __new__(cls, text: str, status: int | None) -> Unreachable:
        """Keep the status beside the text."""
        made = super().__new__(cls, text)
        made.status = status
        return made


class EndpointError(Exception):
    """No usable reply.

    Args:
        reason: in words.
        status: of HTTP, 200 for a reply that made no sense, None where none came.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        """Keep the status beside the reason."""
        super().__init__(reason)
        self.status = status

    @property
    def reason(self) -> str:
        """Why, as an :class:`Unreachable` where other questions may have failed as well."""
        suspect = self.status is None or self.status in AGAIN | REFUSED
        return Unreachable(str(self), self.status) if suspect else str(self)
