"""Any local judge behind HTTP, for ``remote`` and every other client of chat completions.

    POST /v1/chat/completions   a judge that asks a vision-language model: that model itself,
                                greedy, with the log-probabilities of its raw logits; any other
                                judge: the score of the one picture under the text, as the answer
    POST /v1/score              numbers of many pictures by any judge, see wire.py
    GET  /v1/models, /health    the judge's name; its version and the hash of its weights

Made for strangers' mistakes: it listens on the loopback address unless told otherwise, takes JSON
only and no more than ``max_bytes`` a request (gate.py), decodes pictures bounded in bytes and
pixels, fetches nothing (data URLs only), unpickles nothing, and works on one request at a time.
Errors have OpenAI's form, {"error": {"message", "type"}}, and never repeat the request.
"""

from __future__ import annotations

import signal
import socket
import sys
from threading import Lock
from typing import TYPE_CHECKING, Any

from t2i_align.contract import MediaError
from t2i_align.errors import UserError
from t2i_align.judges.base import Judge
from t2i_align.judges.endpoint import is_loopback
from t2i_align.judges.gate import BadRequest, Gate
from t2i_align.judges.served import Served
from t2i_align.judges.wire import ChatRequest, ScoreRequest
from t2i_align.optional import require

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_WAITING = 64  # requests; the next one is told to come back (503)
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def build_app(
    judge: Judge,
    name: str,
    version: int,
    *,
    max_bytes: int = 32 * 2**20,
    host: str = "127.0.0.1",
    key: str | None = None,
) -> FastAPI:
    """The application of one judge.

    Args:
        judge: loaded.
        name: of its card; what clients call the model.
        version: of its card.
        max_bytes: of a request.
        host: where it will listen; if only this machine can reach it, other Host headers fail.
        key: the bearer token clients must send.

    Raises:
        MissingDependencyError: the web framework is not installed.
    """
    require("fastapi", "serve", "judges serve")
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError

    served = Served(name, version, judge, Lock())
    app = FastAPI(title=f"t2i-align judge {name}", docs_url=None, redoc_url=None)
    hosts = LOOPBACK | {host} if is_loopback(host) else None
    app.add_middleware(Gate, max_bytes=max_bytes, hosts=hosts, key=key)  # pyright: ignore

    @app.post("/v1/chat/completions")
    def chat(request: ChatRequest) -> dict[str, Any]:
        return served.chat(request)

    @app.post("/v1/score")
    def score(request: ScoreRequest) -> dict[str, Any]:
        return served.score(request)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return served.models()

    @app.get("/health")
    def health() -> dict[str, Any]:
        return served.health()

    for kind in (BadRequest, MediaError, RequestValidationError):
        app.add_exception_handler(kind, _told)
    return app


def _told(_request: Any, error: Exception) -> Any:
    """A reply in OpenAI's form that does not repeat what was sent."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    status, message = 400, str(error)
    if isinstance(error, BadRequest):
        status = error.status
    if isinstance(error, RequestValidationError):
        found = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()[:5]]
        message = "; ".join(found)
    content = {"error": {"message": message, "type": "invalid_request_error"}}
    return JSONResponse(content, status)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket of this address; port 0 is any free one.

    Raises:
        UserError: the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(MAX_WAITING)
    except OSError as error:
        made.close()
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror}", "choose another with --port"
        ) from error
    return made


def run(app: FastAPI, at: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are finished first.

    Args:
        app: of :func:`build_app`.
        at: of :func:`bind`; who connects before this is called waits.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server(app).run(sockets=[at])
    except KeyboardInterrupt:  # uvicorn passes the signal on once it is done
        return
    finally:
        signal.signal(signal.SIGTERM, before)
        at.close()


def server(app: FastAPI) -> Any:
    """The uvicorn server of an application, not started."""
    require("uvicorn", "serve", "judges serve")
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        limit_concurrency=MAX_WAITING,
        timeout_graceful_shutdown=30,
        server_header=False,
    )
    return uvicorn.Server(config)
