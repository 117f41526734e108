"""Writes docs/cli.md from the command's own help.

python docs/make_cli.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from pastalm.cli import app

TARGET = Path(__file__).with_name("cli.md")
WIDTH = 100
HELD = """\
The answer goes to stdout, everything else to stderr; an error is one line. Exit codes: 0; 1 for a failure; 2 for what
was given and cannot be used; 130 for Ctrl-C. An option that would do nothing beside the others is refused.

Files, and what `-` reads, are UTF-8 whatever the locale says. What a stdout of another encoding (a redirect on
Windows, `PYTHONIOENCODING`) cannot write is written as Python's escapes, `\\u6f22`, and in JSON as JSON's own;
`PYTHONUTF8=1` makes stdout UTF-8. The live view is drawn only on a terminal that takes UTF-8.
"""


def verbs() -> Iterator[list[str]]:
    """Every verb, with those below it."""

    def below(command: object, path: list[str]) -> Iterator[list[str]]:
        yield path
        for name, child in sorted(getattr(command, "commands", {}).items()):
            yield from below(child, [*path, name])

    yield from below(get_command(app), [])


def page() -> str:
    """The page, whole."""
    told = "Written by `python docs/make_cli.py` from the command's own help; a test compares."
    parts = ["# The command `pasta`", "", told, "", *HELD.splitlines()]
    shown = {"prog_name": "pasta", "env": {"COLUMNS": str(WIDTH)}, "terminal_width": WIDTH}
    for words in verbs():
        lines = CliRunner().invoke(app, [*words, "--help"], **shown).stdout.strip().splitlines()
        parts += ["", f"## {' '.join(['pasta', *words])}", "", *(f"    {line}".rstrip() for line in lines)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
