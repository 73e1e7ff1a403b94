"""``t2i-align judges serve``: a judge behind HTTP."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def serve(
    judge: Annotated[str, typer.Argument(help="Name of a judge; see `ls judges`.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is reachable from here only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    device: Annotated[str | None, typer.Option(help="A GPU if there is one when left out.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the judge's weights.")
    ] = "float32",
    max_request_mib: Annotated[
        int, typer.Option(min=1, max=1024, help="Larger requests are refused.")
    ] = 32,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with a key clients must send.")
    ] = None,
) -> None:
    """Serve a judge: chat completions and /v1/score, for the judge `remote` and other clients."""
    import torch
    from rich.console import Console

    from t2i_align.evaluate.scoring import device_of
    from t2i_align.judges import serve as server
    from t2i_align.judges.base import judge_card, load
    from t2i_align.judges.endpoint import is_loopback, key_from
    from t2i_align.quiet import hush

    hush()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    card, key = judge_card(judge), key_from(api_key_env)
    at = server.bind(host, port)
    app = server.build_app(
        load(judge, device_of(device), getattr(torch, dtype)),
        judge,
        card.version,
        max_bytes=max_request_mib * 2**20,
        host=host,
        key=key,
    )
    if not is_loopback(host) and key is None:
        console.print(f"warning: anyone who reaches {host} may use this judge; see --api-key-env")
    shown = f"[{host}]" if ":" in host else host
    console.print(
        f"{judge} at http://{shown}:{at.getsockname()[1]}/v1 (Ctrl-C stops)", markup=False
    )
    server.run(app, at)
