"""The README tells the truth: its tables are generated, its links and paths exist, its verbs parse.

What its commands do is shown by ``tests/trajectory/test_readme_commands.py``, which runs them.
"""

from __future__ import annotations

import re
import shlex

import click
import pytest
import typer

from t2i_align.cli import VERBS, build_app
from t2i_align.readme import README, with_tables
from t2i_align.scenes.grammar import TASKS

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
        first, *others = re.findall(r"[\w.]+/|[\w.]+\.py", line)
        folder = folder if line.startswith(" ") else first
        inside = README.parent / folder / (first if line.startswith(" ") else "")
        assert inside.exists(), line
        for name in others:  # beside the first, or in it
            assert (inside.parent / name).exists() or (inside / name).exists(), line
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


def test_the_table_of_the_quickstart_adds_up() -> None:
    """A paired difference of shares is (wins - losses) / pictures; overall is the tasks' mean."""
    block = re.search(r"^task +before.*?\n(.*?)^overall(.*?)\n", TEXT, re.DOTALL | re.MULTILINE)
    assert block is not None
    number = r"([+-]?\d\.\d{3})"
    form = re.compile(rf"{number} +{number} +{number} +\[{number}, {number}\] +(\d+)/(\d+)/(\d+)")
    lines = [form.search(line) for line in (*block[1].splitlines(), block[2])]
    rows = [[float(x) for x in line.groups()] for line in lines if line is not None]
    assert len(rows) == len(lines) == len(TASKS) + 1
    assert [line.split()[0] for line in block[1].splitlines()] == list(TASKS)
    for before, after, difference, low, high, win, tie, lose in rows:
        assert difference == pytest.approx((win - lose) / (win + tie + lose), abs=6e-4)
        assert difference == pytest.approx(after - before, abs=1.1e-3) and low <= difference <= high
    *tasks, overall = rows
    for k in (0, 1):
        assert overall[k] == pytest.approx(sum(r[k] for r in tasks) / len(tasks), abs=1.1e-3)
    assert [sum(r[k] for r in tasks) for k in (5, 6, 7)] == overall[5:]
