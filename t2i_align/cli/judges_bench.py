"""``t2i-align judges bench``: how well judges agree with people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="pickapic, hpdv2, imagereward, hpdv3, mjbench, mmrb2 or genai_bench: the layout "
            "of the data."
        ),
    ],
    judge: Annotated[
        list[str], typer.Option(help="Name of a judge; may be repeated. See `ls judges`.")
    ],
    data: Annotated[Path, typer.Option(help="Folder (or file) of the set, as it is published.")],
    split: Annotated[
        str | None,
        typer.Option(help="Part of the set; the test set when left out (MJ-Bench: alignment)."),
    ] = None,
    width: Annotated[
        float, typer.Option(min=0, help="Differences up to this are ties, in the judge's unit.")
    ] = 0.0,
    jsonl: Annotated[Path | None, typer.Option(help="Write every pair as a JSON line.")] = None,
    device: Annotated[str | None, typer.Option(help="A GPU if there is one when left out.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of a judge's weights.")
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="The reports on stdout.")] = False,
) -> None:
    """Pairwise accuracy on published human preferences, by the set's own tie rule and all others.

    Where people rated pictures also Pearson's r, Kendall's tau-b and the accuracy with ties, of
    GenAI-Bench by skill too. The rule is part of the number: see t2i_align/evaluate/tie_rules.py.
    """
    import torch
    from rich.console import Console

    from t2i_align.cli.show import print_json
    from t2i_align.evaluate.human import bench as measure
    from t2i_align.evaluate.human_layouts import layout_of
    from t2i_align.evaluate.scoring import device_of, write_jsonl
    from t2i_align.judges.base import judge_card, load
    from t2i_align.quiet import hush

    hush()
    layout_of(name)
    for one in judge:  # wrong names are reported before any work
        judge_card(one)
    where, console = device_of(device), Console(stderr=True)
    reports, pairs = [], []
    for one in judge:
        done = 0
        with console.status(f"{one}: 0 pictures") as status:

            def advance(num: int, one: str = one, status: Any = status) -> None:
                nonlocal done
                done += num
                status.update(f"{one}: {done} pictures")

            loaded = load(one, where, getattr(torch, dtype))
            found, measured = measure(name, loaded, data, split=split, width=width, advance=advance)
        reports.append({"judge": one} | found)
        pairs += _pair_rows(one, measured)
    if jsonl is not None:
        write_jsonl(jsonl, pairs)
    if as_json:
        print_json(reports)
    else:
        _show(reports)


def _pair_rows(judge: str, measured: Any) -> list[dict[str, Any]]:
    """A row a pair: its place, what people and the judge said."""
    columns = zip(measured.names, measured.prompts, measured.human, measured.margins.T, strict=True)
    return [
        {
            "judge": judge,
            "row": row,
            "prompt": prompt,
            "human": int(human),
            "margins": [None if m != m else float(m) for m in margins],
        }
        for row, prompt, human, margins in columns
    ]


def _show(reports: list[dict[str, Any]]) -> None:
    """Headlines, then every rule, then correlations where people rated."""
    from t2i_align.cli.show import print_rows
    from t2i_align.evaluate.scoring import number

    first = reports[0]
    title = (
        f"{first['benchmark']} ({first['split']}), rule {first['rule']} over {first['averaged']}"
    )
    print_rows(
        title,
        [
            {
                "name": r["judge"],
                "accuracy": number(r["accuracy"]),
                "95 %": f"{number(r['low'])} to {number(r['high'])}",
                **{k: r[k] for k in ("pairs", "failed", "human_ties", "judge_ties")},
            }
            for r in reports
        ],
    )
    rules = [{"name": r["judge"]} | {k: number(v) for k, v in r["rules"].items()} for r in reports]
    best = [f"{number(r['acc_eq']['accuracy'])} at {r['acc_eq']['width']:.4g}" for r in reports]
    print_rows("by every rule", [row | {"acc_eq": b} for row, b in zip(rules, best, strict=True)])
    rated = [r for r in reports if "ratings" in r]
    if rated:
        rows = [{"name": r["judge"]} | _cells(r["ratings"]) for r in rated]
        print_rows("ratings, all pictures", rows)
    for r in rated:
        parts = r.get("ratings_by_part", {})
        if parts:
            rows = [{"name": part} | _cells(found) for part, found in parts.items()]
            print_rows(f"ratings by part, {r['judge']}", rows)


def _cells(found: dict[str, Any]) -> dict[str, Any]:
    from t2i_align.evaluate.scoring import number

    return {k: v if isinstance(v, int) else number(v) for k, v in found.items()}
