"""The README tells the truth: its tables are generated, its links and paths exist, its verbs parse.

What its commands do is shown by ``tests/trajectory/test_readme_commands.py``, which runs them.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from t2i_align.cli import VERBS, build_app
from t2i_align.readme import README, with_tables

TEXT = README.read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every line of every bash block, without comments, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_tables_are_those_of_ls() -> None:
    """If this fails: python -m t2i_align.readme."""
    assert with_tables(TEXT) == TEXT
    assert TEXT.count(": begin -->") == 4


def test_links_and_the_tree_name_what_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert (README.parent / target).exists(), target
    tree = re.search(r"## Tree\n\n```\n(.*?)```", TEXT, re.DOTALL)
    assert tree is not None
    folder = ""
    for line in tree[1].splitlines():
        names = re.findall(r"[\w.]+/|[\w.]+\.py", line.split("  ")[0] + line[:20])
        if not line.startswith(" "):
            folder = names[0]
            assert (README.parent / folder).is_dir(), folder
        for name in names[:1] if line.startswith(" ") else []:
            assert (README.parent / folder / name).exists(), folder + name
    verbs = re.search(r"one file a verb: ([\w ]+)", tree[1])
    assert verbs is not None and set(verbs[1].split()) == set(VERBS)


@pytest.mark.parametrize("line", [c for c in commands() if c.startswith("t2i-align")])
def test_every_command_parses(line: str) -> None:
    """Known verb, known options, no missing argument."""
    verb, *arguments = shlex.split(line)[1:]
    group = typer.main.get_command(build_app())
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    command = group.commands[verb]  # type: ignore[attr-defined]
    command.make_context(verb, arguments)


def test_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for line in commands():
        for target in re.findall(r"^make ([\w-]+)", line):
            assert f"\n{target}:" in makefile, target


def test_no_two_numbers_without_their_command() -> None:
    """The table of the quickstart stands below the command that makes it."""
    assert TEXT.index("make quickstart") < TEXT.index("overall")
    assert Path(README.parent / "t2i_align/docs/img/before_after.png").is_file()
