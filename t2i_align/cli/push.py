"""``t2i-align push``: an export to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that t2i-align export wrote.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="If it is created now.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; left out: main.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List files and sizes, upload nothing.")
    ] = False,
) -> None:
    """Upload an export and its card to the hub."""
    from t2i_align.export import push as hub

    if dry_run:
        found = hub.files_of(folder)
        for name, size in found:
            typer.echo(f"{size:>14,}  {name}")
        typer.echo(f"{sum(size for _, size in found):>14,}  {len(found)} files to {repo_id}")
        return
    url = hub.push(folder, repo_id, private=private, revision=revision)
    typer.echo(f"pushed {folder} to {url}")
