"""``t2i-align cache``: fill, look at, check and clear what runs pay for once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from t2i_align.errors import EXIT_CODES

cache = typer.Typer(
    no_args_is_help=True,
    help="Latents, text and reference errors on disk, shared between runs.",
)
DEFAULT = "~/.cache/t2i_align"
BROKEN_EXIT = 3
Dir = Annotated[str, typer.Argument(metavar="[DIR]", help="A recipe's cache.dir.")]
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]


@cache.command()
def build(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, read as YAML.")
    ] = None,
    num_processes: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that share the work.")
    ] = 1,
) -> None:
    """Fill the caches of a recipe; a build that was stopped goes on where it was."""
    import torch
    from rich.console import Console

    from t2i_align.quiet import hush
    from t2i_align.recipe import load_recipe
    from t2i_align.train.cache_build import build as run

    hush()
    loaded = load_recipe(recipe, overrides or (), cuda=torch.cuda.is_available())
    made = run(loaded, Console(stderr=True), num_processes)
    text = ", ".join(f"{count} {name}" for name, count in made.items())
    typer.echo(f"new in {loaded.cache.dir}: {text}")


@cache.command()
def inspect(folder: Dir = DEFAULT, as_json: Json = False) -> None:
    """List what is there: spaces, entries, bytes, models and runs."""
    from t2i_align.cli.show import print_json, print_rows
    from t2i_align.data.cache_folder import inspect as look
    from t2i_align.data.cache_folder import root_of

    found = look(root_of(folder))
    if as_json:
        print_json([space.to_dict() for space in found])
        return
    print_rows(
        f"cache {folder}",
        [
            {
                "name": space.name,
                "entries": f"{space.entries:,}",
                "shards": space.num_shards,
                "size": megabytes(space.num_bytes),
                "models": ", ".join(space.models) or "not noted",
                "runs": ", ".join(space.runs) or "not noted",
            }
            for space in found
        ],
    )


@cache.command()
def verify(
    folder: Dir = DEFAULT,
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="Rename broken files, so that runs rebuild them.")
    ] = False,
) -> None:
    """Compare every shard with its hash; name broken ones and exit with 3."""
    from t2i_align.data import cache_folder

    verdicts = list(cache_folder.verify(cache_folder.root_of(folder)))
    broken = [verdict for verdict in verdicts if verdict.broken]
    for verdict in broken:
        typer.echo(f"{verdict.path}: {verdict.problem}")
        if set_aside:
            typer.echo(f"  set aside as {cache_folder.set_aside(verdict).name}")
    unknown = sum(verdict.unknown for verdict in verdicts)
    text = f"{len(verdicts)} shards: {len(verdicts) - len(broken) - unknown} as written"
    text += f", {unknown} readable, written before hashes were" if unknown else ""
    typer.echo(f"{text}, {len(broken)} broken")
    if broken and not set_aside:
        typer.echo("fix: t2i-align cache verify --set-aside, then run again: they are rebuilt")
    if broken:
        assert BROKEN_EXIT in EXIT_CODES
        raise typer.Exit(BROKEN_EXIT)


@cache.command()
def prune(
    folder: Dir = DEFAULT,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="A recipe whose caches stay; repeatable.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only list.")] = False,
) -> None:
    """List what no given recipe needs, and delete it with --yes."""
    from t2i_align.data import cache_folder
    from t2i_align.quiet import hush

    hush()
    root = cache_folder.root_of(folder)
    names = set().union(*(_spaces(recipe) for recipe in keep or ()))
    found = cache_folder.needless(root, names, lambda p: cache_folder.rests_on(p, names))
    others = cache_folder.leftovers(root, found)
    total = sum(map(cache_folder.size_of, [*found, *others]))
    for path in found:
        typer.echo(f"{path.relative_to(root)}: {megabytes(cache_folder.size_of(path))}")
    for path in [*found, *others] if yes else ():
        cache_folder.remove(path)
    verb = "deleted" if yes else "would be deleted"
    text = f"{len(found)} {verb}, and {len(others)} files of manifests and notes on what is gone"
    typer.echo(f"{text}: {megabytes(total)}" + ("" if yes else "; do it with --yes"))


def _spaces(name: str) -> set[str]:
    """Spaces of media and text that a recipe uses."""
    import torch

    from t2i_align.data.prepare import spaces_of
    from t2i_align.recipe import load_recipe

    recipe: Any = load_recipe(name, run_checks=False)
    generator = recipe.chosen("model")(recipe.model, torch.device("cpu"))
    return {f"{kind}-{space}" for kind, space in spaces_of(generator, recipe.cache).items()}


def megabytes(num_bytes: int) -> str:
    """A size for people."""
    return f"{num_bytes / 1e6:,.1f} MB"
