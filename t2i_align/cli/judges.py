"""``t2i-align judges``: convert, fit, serve and measure judges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from t2i_align.cli.judges_bench import bench
from t2i_align.cli.judges_fit import fit
from t2i_align.cli.judges_serve import serve

judges = typer.Typer(no_args_is_help=True, help="Convert, fit, serve and measure judges.")
judges.command()(bench)
judges.command()(fit)
judges.command()(serve)


@judges.command()
def convert(
    name: Annotated[str, typer.Argument(help="Name of a judge; see `ls judges`.")],
    file: Annotated[
        Path, typer.Argument(help="The published checkpoint; for dreamsim, a folder of its files.")
    ],
    out: Annotated[
        Path | None,
        typer.Argument(help="Folder to write; left out: where the judge looks for its weights."),
    ] = None,
    sha256: Annotated[
        str | None,
        typer.Option(help="Hash the file must have; left out: the card's. Pickles need one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was written, on stdout.")] = False,
) -> None:
    """Turn a published checkpoint into safetensors, with its names checked both ways."""
    from dataclasses import asdict

    from t2i_align.cli.show import print_json, print_pairs
    from t2i_align.judges.convert import convert as run
    from t2i_align.judges.weights import weights_home
    from t2i_align.quiet import hush

    hush()
    report = run(name, file, out or weights_home() / name, sha256)
    if as_json:
        row = asdict(report)
        print_json(row | {"file": str(report.file), "others": [str(p) for p in report.others]})
        return
    print_pairs(
        f"converted {name}",
        [
            ("file", str(report.file)),
            ("tensors", f"{report.num_tensors}, {report.num_bytes / 1e6:.1f} MB"),
            ("sha256", report.sha256),
            ("made from sha256", report.source_sha256),
            *(("also written", str(path)) for path in report.others),
        ],
    )
