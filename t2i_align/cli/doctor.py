"""``t2i-align doctor``: what this machine can do, tried for real."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    compile: Annotated[
        bool, typer.Option("--compile", help="Also try torch.compile (about a minute).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one object.")] = False,
) -> None:
    """Versions, devices, and each optional backend tried with a real forward and backward."""
    from t2i_align.cli.show import print_json, print_pairs
    from t2i_align.quiet import hush
    from t2i_align.train.doctor import examine

    hush()
    found = examine(with_compile=compile)
    if as_json:
        print_json(found.to_dict())
        return
    for title, pairs in found.tables():
        print_pairs(title, pairs)
