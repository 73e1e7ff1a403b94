"""``t2i-align bench``: what ways to train give and cost, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True, help="Compare ways to train, in one run.")


@bench.callback()
def _bench() -> None:
    """Compare ways to train, in one run."""


@bench.command()
def objectives(
    recipe: Annotated[
        list[str], typer.Option(help="Recipe on the embedded world; repeatable, in order.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("outputs/bench"),
    seeds: Annotated[str, typer.Option(help="Seeds of each recipe, comma separated.")] = "0",
    per_task: Annotated[int, typer.Option(min=2, help="Held-out pictures of each task.")] = 100,
    prompt_seed: Annotated[int, typer.Option(min=0, help="Which held-out prompts and noise.")] = 0,
    controls: Annotated[
        bool, typer.Option(help="Also each recipe's first seed with shuffled labels.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Start no further run after so many minutes.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value for every recipe.")
    ] = None,
) -> None:
    """Train and evaluate recipes side by side: table.md and bench.json; may be continued."""
    from rich.console import Console

    from t2i_align.cli.show import print_rows
    from t2i_align.errors import UserError
    from t2i_align.scenes.bench import Settings, entries, lines
    from t2i_align.scenes.bench import bench as run

    try:
        numbers = [int(x) for x in seeds.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds: got '{seeds}'", "give whole numbers such as 0,1,2") from error
    settings = Settings(out, per_task, prompt_seed, tuple(override or ()))
    rows = run(entries(recipe, numbers, controls=controls), settings, Console(stderr=True), minutes)
    print_rows(f"{out}: held-out prompts, same noise as the base", lines(rows))


@bench.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the bench.")] = Path("outputs/bench_train"),
    rounds: Annotated[int, typer.Option(min=0, help="Timed steps of each layout.")] = 3,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id; without, a random one of SDXL's kind.")
    ] = None,
    resolution: Annotated[int, typer.Option(min=64, help="Side of its pictures.")] = 256,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of one step.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    precision: Annotated[str, typer.Option(help="no or bf16.")] = "no",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """One DPO step from live everything to all cached: FLOPs and seconds; may be continued."""
    from rich.console import Console

    from t2i_align.cli.show import print_rows
    from t2i_align.errors import UserError

    if precision not in ("no", "bf16") or device not in ("cpu", "cuda"):
        raise UserError(
            f"--precision, --device: got '{precision}' and '{device}'",
            "give no or bf16, and cpu or cuda",
        )
    from t2i_align.quiet import hush

    hush()
    from t2i_align.train.bench import Bench, markdown, notes
    from t2i_align.train.bench_step import Settings

    settings = Settings(model, resolution, pairs, rank, precision, device)  # type: ignore[arg-type]
    measured = Bench(out, settings)
    measured.run(rounds, Console(stderr=True))
    (out / "table.md").write_text(markdown(measured))
    print_rows(f"{out}: one step of each layout", measured.table())
    for note in notes(measured):
        typer.echo(note)


@bench.command()
def start(
    recipe: Annotated[
        str, typer.Option(help="A YAML file, or the name of a shipped recipe.")
    ] = "scenes_dpo",
    out: Annotated[Path, typer.Option(help="Folder of the measurement.")] = Path(
        "outputs/bench_start"
    ),
    runs: Annotated[int, typer.Option(min=1, help="Warm starts, after one not counted.")] = 5,
    bound: Annotated[float, typer.Option(min=0, help="Seconds that a start may take.")] = 10.0,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value for the recipe.")
    ] = None,
) -> None:
    """From `t2i-align train` to its first optimizer step: seconds by stage, and of imports."""
    from t2i_align.cli.show import print_rows
    from t2i_align.train.bench_start import bench as run
    from t2i_align.train.bench_start import notes

    found = run(out, recipe, override or [], runs, bound)
    print_rows(f"{recipe}: seconds to the first step, medians", found["stages"])
    for note in notes(found):
        typer.echo(note)


@bench.command()
def step(
    recipe: Annotated[
        str, typer.Option(help="A YAML file, or the name of a shipped recipe.")
    ] = "scenes_dpo",
    out: Annotated[Path, typer.Option(help="Folder of the measurement.")] = Path(
        "outputs/bench_step"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a process.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each variant, in turns.")] = 1,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="section.key=value beside the recipe, several in quotes; repeatable."),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value for the recipe.")
    ] = None,
) -> None:
    """A recipe's step: seconds and FLOPs by phase, kinds of operations, other settings beside."""
    from t2i_align.cli.show import print_rows
    from t2i_align.quiet import hush
    from t2i_align.train.bench_recipe import Job, tables
    from t2i_align.train.bench_recipe import bench as run

    job = Job(recipe, tuple(override or ()), steps, profiled=True)
    found = run(out, job, variant or [], rounds, hush)
    title = f"{recipe}: {found['records']} records a step, {found['seconds']:.3f} s"
    title += f", the fastest {found['fastest']:.3f}"
    for name, rows in tables(found).items():
        print_rows(f"{title}: {name}", rows)
    typer.echo(
        f"{found['date']}, {found['device']}, {found['cores']} CPU cores, "
        f"{found['threads']} threads, torch {found['torch']}"
    )
