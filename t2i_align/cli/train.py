"""``t2i-align train``: run a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

PROCESSES = "Number of processes over all machines, started for you on this one."
MACHINES = "Number of machines; run the same command on each, with its own --machine-rank."


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, read as YAML.")
    ] = None,
    num_processes: Annotated[int, typer.Option(min=1, help=PROCESSES)] = 1,
    num_machines: Annotated[int, typer.Option(min=1, help=MACHINES)] = 1,
    machine_rank: Annotated[int, typer.Option(min=0, help="Rank of this machine, from 0.")] = 0,
    main_process_ip: Annotated[str | None, typer.Option(help="Address of machine 0.")] = None,
    main_process_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="A free port of machine 0.")
    ] = None,
) -> None:
    """Train by a recipe; continue with train.resume_from_checkpoint=latest."""
    from t2i_align.later import importing
    from t2i_align.quiet import hush

    with importing():
        import torch

        from t2i_align.recipe import load_recipe
        from t2i_align.train.distributed import Launch, explained, launch
        from t2i_align.train.run import train as run

    hush()
    options = load_recipe(recipe, overrides or (), cuda=torch.cuda.is_available())
    how = Launch(num_processes, num_machines, machine_rank, main_process_ip, main_process_port)
    if not how.alone:
        if code := launch([recipe, *(overrides or ())], how):
            raise typer.Exit(code)
        return
    with explained():
        run(options)
