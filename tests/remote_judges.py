"""A remote judge, a server for it on the loopback address, and endpoints that are functions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import torch

from t2i_align.judges import serve
from t2i_align.judges.remote import Remote
from t2i_align.judges.remote_options import RemoteOptions

CPU = torch.device("cpu")
COUNT: dict[str, Any] = {
    "template": "How many {prompt} are there?",
    "low": 1,
    "high": 4,
    "levels": ("one", "two", "three", "four"),
}


def remote(url: str = "http://127.0.0.1:9/v1", **given: Any) -> Remote:
    return Remote(Path(), RemoteOptions(url=url, **given), CPU, torch.float32)


def mocked(handler: Callable[[httpx2.Request], Any], **given: Any) -> tuple[Remote, list[float]]:
    """A judge whose endpoint is a function, and the seconds it would have waited."""
    judge, waits = remote(**({"model": "m"} | given)), []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    judge.endpoint.transport, judge.endpoint.sleep = httpx2.MockTransport(handler), sleep
    return judge, waits


def said(text: str, **logprobs: float) -> httpx2.Response:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if logprobs:
        top = [{"token": t, "logprob": v} for t, v in logprobs.items()]
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
    return httpx2.Response(200, json={"choices": [choice]})


@contextmanager
def served(judge: Any, name: str = "judge", **given: Any) -> Iterator[str]:
    """A real uvicorn on a free port of the loopback address; its base address."""
    at = serve.bind("127.0.0.1", 0)
    server = serve.server(serve.build_app(judge, name, 3, **given))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{at.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(30)
        at.close()
        assert not thread.is_alive()
