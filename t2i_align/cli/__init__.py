"""The command line: one file a verb, no logic of its own.

``VERBS`` is the literal table of verbs. Verb modules are light: whatever needs torch is imported by
the function that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from t2i_align import __version__
from t2i_align.errors import EXIT_CODES, UserError

VERBS: dict[str, str] = {
    "ls": "t2i_align.cli.ls:ls",
    "cp": "t2i_align.cli.cp:cp",
    "schema": "t2i_align.cli.schema:schema",
    "validate": "t2i_align.cli.validate:validate",
    "train": "t2i_align.cli.train:train",
    "generate": "t2i_align.cli.generate:generate",
    "score": "t2i_align.cli.score:score",
    "label": "t2i_align.cli.label:label",
    "judges": "t2i_align.cli.judges:judges",
    "eval": "t2i_align.cli.eval:evaluate",
    "compare": "t2i_align.cli.compare:compare",
    "bench": "t2i_align.cli.bench:bench",
    "report": "t2i_align.cli.html_report:report",
    "export": "t2i_align.cli.export:export",
    "push": "t2i_align.cli.push:push",
    "adapter": "t2i_align.cli.adapter:adapter",
    "scenes": "t2i_align.cli.scenes:scenes",
    "quickstart": "t2i_align.cli.quickstart:quickstart",
    "cache": "t2i_align.cli.cache:cache",
    "doctor": "t2i_align.cli.doctor:doctor",
    "cite": "t2i_align.cli.cite:cite",
}
EPILOG = "Exit codes: " + " · ".join(f"{code} {what}" for code, what in EXIT_CODES.items())


def report(error: UserError) -> None:
    """Print an error for a person, on stderr, in red where the terminal can."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), (str(error), "red"))
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


class Verbs(TyperGroup):
    """Verbs, also nested ones, whose user errors become a message and the documented exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that was named."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            report(error)
            raise typer.Exit(error.exit_code) from error


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"t2i-align {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Align image, speech and 3D generators to preferences: one YAML recipe a run."""


def build_app() -> typer.Typer:
    """The application with every verb of the table."""
    app = typer.Typer(
        cls=Verbs,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        epilog=EPILOG,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog=EPILOG)(_root)
    for name, path in VERBS.items():
        module, _, function = path.partition(":")
        verb = getattr(importlib.import_module(module), function)
        if isinstance(verb, typer.Typer):
            app.add_typer(verb, name=name)
        else:
            app.command(name)(verb)
    return app


def main() -> None:
    """Entry point of the ``t2i-align`` script."""
    build_app()(prog_name="t2i-align")
