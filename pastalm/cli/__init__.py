"""The command `pasta`: one file for each group of verbs, each of which imports what it needs when it runs.

The answer goes to stdout, everything else to stderr. An error is one line. Exit codes: 0; 1 for a failure; 2 for bad
input; 130 for Ctrl-C, after printing the answer so far. The live view is drawn only if stdout is a terminal with UTF-8.
A character that stdout's encoding lacks is written as Python's escape (`\\u6f22`), in JSON as JSON's. An option that
would have no effect with the other options is an error.
"""

from __future__ import annotations

# isort: off
from pastalm.cli import decode, serve, language, models, data, score, evaluate, training  # noqa: F401  (the help's order)

# isort: on
from pastalm.cli.command import app as app


def main() -> None:
    """The entry point of `pasta`."""
    app(prog_name="pasta")
