"""``t2i-align score``: judges on pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def score(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Pictures, folders (metadata.jsonl, GenEval's layout, or .txt sidecars), or "
            "parquet / jsonl tables."
        ),
    ],
    judge: Annotated[
        list[str], typer.Option(help="Name of a judge; may be repeated. See `ls judges`.")
    ],
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt a line, in the pictures' order.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write all rows as CSV.")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="Write all rows as JSON lines.")] = None,
    normalized: Annotated[
        bool, typer.Option("--normalized", help="(score - mean) / std by each judge's card.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="A GPU if there is one when left out.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of a judge's weights.")
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Rows and totals on stdout.")] = False,
) -> None:
    """Score pictures with one or more judges; what cannot be scored is NaN with its reason."""
    from rich.console import Console

    from t2i_align.cli.quiet import hush
    from t2i_align.cli.show import print_json, print_pairs, print_rows
    from t2i_align.evaluate import scoring

    hush()
    entries = scoring.collect(paths, prompt, prompts)
    columns = scoring.score_entries(
        entries, judge, Console(stderr=True), device=device, dtype=dtype, normalized=normalized
    )
    rows, totals = scoring.table(entries, columns), scoring.totals(columns)
    if csv is not None:
        scoring.write_csv(csv, rows)
    if jsonl is not None:
        scoring.write_jsonl(jsonl, rows)
    if as_json:
        print_json({"rows": rows, "judges": totals})
        return
    shown = scoring.shown(rows)
    more = "" if len(shown) == len(rows) else f" (first {len(shown)}; --csv or --jsonl writes all)"
    print_rows(f"{len(rows)} pictures{more}", shown)
    print_pairs(
        "mean",
        [
            (name, f"{scoring.number(t['mean'])}  ({t['scored']} scored, {t['failed']} failed)")
            for name, t in totals.items()
        ],
    )
