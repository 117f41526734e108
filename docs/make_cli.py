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
HEAD = """\
The answer goes to stdout, everything else to stderr. An error is one line. Exit codes: 0 for success, 1 for a failure,
2 for invalid input, 130 for Ctrl-C. An option that would have no effect with the other options is an error.

Files and stdin (`-`) are UTF-8, whatever the locale. If stdout has another encoding (a redirect on Windows,
`PYTHONIOENCODING`), characters that it lacks are written as Python's escapes, `\\u6f22`, and in JSON as JSON's;
`PYTHONUTF8=1` makes stdout UTF-8. The live view needs a terminal with UTF-8.
"""


def verbs() -> Iterator[list[str]]:
    """Every verb, with those below it."""

    def below(command: object, path: list[str]) -> Iterator[list[str]]:
        yield path
        for name, child in sorted(getattr(command, "commands", {}).items()):
            yield from below(child, [*path, name])

    yield from below(get_command(app), [])


def page() -> str:
    """The whole page."""
    origin = "Written by `python docs/make_cli.py` from the command's own help. A test compares them."
    parts = ["# The command `pasta`", "", origin, "", *HEAD.splitlines()]
    shown = {"prog_name": "pasta", "env": {"COLUMNS": str(WIDTH)}, "terminal_width": WIDTH}
    for words in verbs():
        lines = CliRunner().invoke(app, [*words, "--help"], **shown).stdout.strip().splitlines()
        parts += ["", f"## {' '.join(['pasta', *words])}", "", *(f"    {line}".rstrip() for line in lines)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
