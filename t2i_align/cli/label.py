"""``t2i-align label``: pictures to preferences, by judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from t2i_align.data.label_rules import RuleOptions
    from t2i_align.evaluate.score_source import Pictures


def label(
    source: Annotated[
        list[Path],
        typer.Argument(
            help="Pictures with prompts, several a prompt: what `score` reads, pair files included "
            "(their own labels are ignored)."
        ),
    ],
    judges: Annotated[
        list[str], typer.Option(help="Judges that decide; repeat, or separate by commas.")
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    rule: Annotated[
        Literal["best_worst", "all", "pareto", "ranked", "binary"],
        typer.Option(help="Pairs (three ways), ranked lists, or labels of single pictures."),
    ] = "best_worst",
    margin: Annotated[float, typer.Option(min=0, help="Numbers this near tie.")] = 0.0,
    ties: Annotated[
        Literal["drop", "keep"], typer.Option(help="keep: write ties as label 0.5.")
    ] = "drop",
    threshold: Annotated[
        float | None, typer.Option(help="Rule binary: good at or above it, bad below.")
    ] = None,
    gate: Annotated[
        list[str] | None, typer.Option(help="JUDGE=VALUE it must exceed; may be repeated.")
    ] = None,
    report_judge: Annotated[
        list[str] | None, typer.Option(help="Held out: scores and is reported, never decides.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt a line, in the pictures' order.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="A GPU if there is one when left out.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the judges' weights.")
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Counts and the judges' report.")] = False,
) -> None:
    """Score samples and write the preferences among those of a prompt, for training.

    May be stopped and run again: it goes on where it was.
    """
    from t2i_align.evaluate.score_source import Pictures
    from t2i_align.quiet import hush

    hush()
    given = {"judges": _listed(judges), "rule": rule, "margin": margin, "ties": ties}
    given |= {"threshold": threshold, "gates": _gates(gate or [])}
    options = _options(given | {"report_judges": _listed(report_judge or [])})
    pictures = Pictures(source, prompt, prompts)
    _label(pictures, options, out, {"device": device, "dtype": dtype}, as_json)


def _label(
    pictures: Pictures, options: RuleOptions, out: Path, how: dict[str, Any], as_json: bool
) -> None:
    from rich.console import Console

    from t2i_align.cli.show import print_json
    from t2i_align.data import label as labels
    from t2i_align.data.label_files import report, report_lines, write_labels
    from t2i_align.evaluate import scoring

    total = pictures.survey()
    members = scoring.panel(scoring.with_held_out(options.every), **how)
    labels.signs_of([*options.judges, *options.gates])
    identity = scoring.identify(pictures.fingerprint(), members, **how)
    console = Console(stderr=True)
    with scoring.working_store(identity, [out]) as store:
        scoring.score_into(store, pictures, members, total=total, console=console)
        numbers = {name: store.numbers(name) for name in options.every}
        groups = [labels.group_name(prompt) for prompt in store.texts("prompt")]
        decision = labels.decide(groups, numbers, options)
        labels.something(decision, options)
        found = report(store, decision, options)
        written = write_labels(out, pictures, decision, store, options)
    if as_json:
        print_json(found)
        return
    counts = ", ".join(f"{v} {k}" for k, v in decision.counts.items() if v)
    typer.echo(f"{written} rows in {out}: {counts}")
    for line in report_lines(found):
        typer.echo(f"  {line}")


def _listed(names: list[str]) -> list[str]:
    return [part.strip() for name in names for part in name.split(",") if part.strip()]


def _gates(given: list[str]) -> dict[str, float]:
    """``JUDGE=VALUE`` texts.

    Raises:
        UserError: another form.
    """
    from t2i_align.errors import UserError

    gates = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            gates[name.strip()] = float(value)
        except ValueError as error:
            raise UserError(
                f"--gate {text}: no number after '='", "e.g. --gate jpeg=0.5"
            ) from error
    return gates


def _options(given: dict[str, Any]) -> RuleOptions:
    """Validated as a recipe's section is.

    Raises:
        RecipeError: every problem.
    """
    from t2i_align.data.label_rules import RuleOptions
    from t2i_align.errors import RecipeError
    from t2i_align.explain import validate

    options, problems = validate(RuleOptions, given, (), lambda _: "command line")
    if options is None:
        raise RecipeError(problems, "label")
    return options
