"""``t2i-align score``: judges on pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from t2i_align.evaluate.score_compare import Side
    from t2i_align.evaluate.score_store import ScoreStore

SHOWN = 50


def score(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Pictures, folders (metadata.jsonl, GenEval's layout, or .txt sidecars), "
            "parquet / jsonl tables, WebDataset shards (.tar), or quoted globs of them."
        ),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="Name of a judge; may be repeated. See `ls judges`."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt a line, in the pictures' order.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write all rows as CSV.")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="Write all rows as JSON lines.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Write all rows as parquet.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write an HTML file: correlations, best and worst pictures."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Win rates of two scored files, or of two sets that are scored first."),
    ] = None,
    band: Annotated[float, typer.Option(min=0, help="With --compare: this near is a tie.")] = 0.0,
    normalized: Annotated[
        bool, typer.Option("--normalized", help="(score - mean) / std by each judge's card.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="A GPU if there is one when left out.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of a judge's weights.")
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Rows and totals on stdout.")] = False,
) -> None:
    """Score pictures with one or more judges; what cannot be scored is NaN with its reason.

    A call that writes a file may be stopped and run again: it goes on where it was.
    """
    from rich.console import Console

    from t2i_align.errors import UserError
    from t2i_align.evaluate.scoring import with_held_out
    from t2i_align.quiet import hush

    hush()
    console = Console(stderr=True)
    judge = with_held_out(judge or [])
    how = {"device": device, "dtype": dtype, "normalized": normalized}
    files = {"csv": csv, "jsonl": jsonl, "parquet": parquet}
    outputs = {kind: path for kind, path in files.items() if path is not None}
    if compare is not None:
        if paths or outputs or prompt is not None or prompts is not None:
            raise UserError("--compare takes its two sets alone", "score each into a file first")
        _compare(compare, judge, band, how, report, as_json, console)
        return
    if not paths or not judge:
        missing = "pictures" if not paths else "--judge"
        raise UserError(f"score needs {missing}", "e.g. t2i-align score FOLDER --judge saturation")
    _score(paths, judge, (prompt, prompts), outputs, report, how, as_json, console)


def _score(
    paths: list[Path],
    judges: list[str],
    prompts: tuple[str | None, Path | None],
    outputs: dict[str, Path],
    report: Path | None,
    how: dict[str, Any],
    as_json: bool,
    console: Console,
) -> None:
    from t2i_align.evaluate import scoring
    from t2i_align.evaluate.score_source import Pictures

    pictures = Pictures(paths, *prompts)
    total = pictures.survey()
    members = scoring.panel(judges, **how)
    identity = scoring.identify(
        pictures.fingerprint(), members, device=how["device"], dtype=how["dtype"]
    )
    files = [*outputs.values(), *([report] if report else [])]
    with scoring.working_store(identity, files) as store:
        scoring.score_into(store, pictures, members, total=total, console=console)
        scoring.write(store, outputs)
        if report is not None:
            from t2i_align.evaluate.score_report import build_score_report

            build_score_report(store, pictures, report)
        _print(store, as_json, bool(outputs))


def _print(store: ScoreStore, as_json: bool, written: bool) -> None:
    from t2i_align.cli.show import print_pairs, print_rows
    from t2i_align.evaluate import scoring

    totals = scoring.totals(store)
    if as_json:
        for text in json_lines(store.rows(), totals):
            typer.echo(text)
        return
    shown = scoring.shown(itertools.islice(store.rows(), SHOWN), store.identity.names)
    how = "" if written else "; --csv, --jsonl or --parquet writes all"
    more = "" if len(shown) == len(store) else f" (first {len(shown)}{how})"
    print_rows(f"{len(store)} pictures{more}", shown)
    print_pairs(
        "mean",
        [
            (name, f"{scoring.number(t['mean'])}  ({t['scored']} scored, {t['failed']} failed)")
            for name, t in totals.items()
        ],
    )


def json_lines(rows: Iterator[dict[str, Any]], totals: dict[str, Any]) -> Iterator[str]:
    """``{"rows": [...], "judges": {...}}`` a row at a time."""
    import json

    yield '{\n"rows": ['
    behind = next(rows, None)
    while behind is not None:
        row, behind = behind, next(rows, None)
        yield "  " + json.dumps(row, ensure_ascii=False) + ("," if behind is not None else "")
    yield '],\n"judges": ' + json.dumps(totals, indent=2, ensure_ascii=False) + "\n}"


def _compare(
    sides: tuple[Path, Path],
    judges: list[str],
    band: float,
    how: dict[str, Any],
    report: Path | None,
    as_json: bool,
    console: Console,
) -> None:
    from t2i_align.cli.show import print_json, print_rows
    from t2i_align.evaluate.score_compare import compare_sides, table

    before, after = (_side(path, judges, how, console) for path in sides)
    result = compare_sides(before, after, judges, band)
    if report is not None:
        from t2i_align.evaluate.score_report import build_comparison_report

        build_comparison_report((before.name, after.name), result, report)
    if as_json:
        print_json(result)
        return
    print_rows(f"{before.name} -> {after.name}", table(result))


def _side(path: Path, judges: list[str], how: dict[str, Any], console: Console) -> Side:
    """A scored file, or a set of pictures that is scored now."""
    from t2i_align.errors import UserError
    from t2i_align.evaluate import scoring
    from t2i_align.evaluate.score_compare import is_scored, read_side, side_of
    from t2i_align.evaluate.score_source import Pictures

    if is_scored(path):
        return read_side(path)
    if not judges:
        raise UserError(f"{path} is no scored file, and no --judge says how to score it")
    pictures = Pictures([path])
    total = pictures.survey()
    members = scoring.panel(judges, **how)
    identity = scoring.identify(
        pictures.fingerprint(), members, device=how["device"], dtype=how["dtype"]
    )
    with scoring.working_store(identity, ()) as store:
        scoring.score_into(store, pictures, members, total=total, console=console, what=str(path))
        return side_of(str(path), store.rows())
