"""Files that verbs read and write."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pastalm.cli.terminal import print_error
from pastalm.errors import DataError, PastaError


def read_text(source: str) -> str:
    """The text of a file; `-` is stdin. Raises DataError."""
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 (at byte {error.start})") from None


def read_object(source: str) -> dict[str, Any]:
    """The JSON object of a file; `-` is stdin. Raises DataError."""
    try:
        value = json.loads(read_text(source))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{source} is not JSON: {error.msg} ({where})") from None
    except RecursionError:
        raise DataError(f"{source} is nested too deep") from None
    if not isinstance(value, dict):
        raise DataError(f"{source} must have a JSON object, not {type(value).__name__}")
    return value


def check_target(target: Path, *sources: Path | None) -> None:
    """Raises DataError if the results would overwrite a file that is read."""
    for source in sources:
        if source is not None and source.exists() and target.exists() and target.samefile(source):
            raise DataError(f"{target} is an input of this command: give another file for the result")


def bad_row_handler(skip_bad: bool) -> Callable[[PastaError], None] | None:
    """The handler for errors of bad rows: prints them and continues; None: stop at the first."""
    return print_left_out if skip_bad else None


def print_left_out(error: PastaError) -> None:
    print_error(f"left out: {error}")
