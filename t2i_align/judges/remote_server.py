"""What a remote judge asks of its server besides pictures: which model, and whether it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from t2i_align.errors import ModelError
from t2i_align.judges.endpoint import Endpoint
from t2i_align.judges.endpoint_error import GONE, REFUSED, EndpointError, Unreachable

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """A coroutine's result, whether or not this thread runs an event loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def listed(endpoint: Endpoint) -> dict[str, Any]:
    """What an endpoint tells of its first model; see :func:`first_model`."""
    async with endpoint.open() as client:
        return await first_model(endpoint, client)


async def first_model(endpoint: Endpoint, client: httpx2.AsyncClient) -> dict[str, Any]:
    """The first entry of an endpoint's list of models, with its ``id``.

    Raises:
        ModelError: there is none, or no answer.
    """
    try:
        first = (await endpoint.ask(client, "models"))["data"][0]
        return dict(first) | {"id": str(first["id"])}
    except (EndpointError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"no model is listed at {endpoint.url}/models: {error}",
            "is the server up? else name its model with the option model",
        ) from error


def is_gone(endpoint: Endpoint, reasons: Sequence[Unreachable]) -> bool:
    """Whether failures are the server's; in doubt it is asked something that has no picture.

    Args:
        endpoint: the server.
        reasons: why some pictures have no number.
    """
    statuses = {reason.status for reason in reasons}
    if not statuses or REFUSED & statuses:
        return bool(statuses)
    try:
        run(_alive(endpoint))
    except EndpointError as error:
        return error.status is None or error.status in GONE
    return False


async def _alive(endpoint: Endpoint) -> None:
    async with endpoint.open() as client:
        await endpoint.ask(client, "models")
