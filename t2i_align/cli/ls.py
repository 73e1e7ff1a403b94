"""``t2i-align ls``: what there is to put into a recipe."""

from __future__ import annotations

from typing import Annotated

import typer


def ls(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="recipes, objectives, generators, sources, judges, datasets or benchmarks; "
            "all of them when left out."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects with name.")] = False,
) -> None:
    """List recipes, objectives, generators, sources, judges, data sets and benchmarks."""
    from t2i_align.cli.show import print_json, print_rows
    from t2i_align.errors import UserError
    from t2i_align.listing import LISTS
    from t2i_align.registry import nearest

    if kind is not None and kind not in LISTS:
        error = UserError(f"nothing called '{kind}' to list", nearest(kind, list(LISTS)))
        error.exit_code = 2
        raise error
    found = {name: LISTS[name]() for name in ([kind] if kind else LISTS)}
    if as_json:
        print_json(
            [row if kind else {"kind": k, **row} for k, rows in found.items() for row in rows]
        )
        return
    for name, rows in found.items():
        print_rows(name, rows)
