"""The terminal: messages and errors on stderr, results on stdout, Ctrl-C."""

from __future__ import annotations

import codecs
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_error(message: str) -> None:
    """Prints an error in one line."""
    print("pasta: " + " ".join(message.split()), file=sys.stderr)


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with a message on stderr. Raises typer.Exit."""
    print_error(message)
    raise typer.Exit(code)


def drop_stdout() -> None:
    """Redirects stdout to nowhere. If it is closed or full, flushing Python's buffer at exit would raise an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def print_json(value: Any) -> None:
    """Prints one line of JSON, with escapes if stdout is not UTF-8."""
    print(json.dumps(value, ensure_ascii=not takes_utf8()))


def takes_utf8() -> bool:
    """Whether stdout is UTF-8."""
    try:
        return codecs.lookup(sys.stdout.encoding or "").name == "utf-8"
    except LookupError:
        return False


def can_draw() -> bool:
    """Whether stdout is a terminal that can show the live view."""
    return sys.stdout.isatty() and takes_utf8()


def quiet_libraries() -> None:
    """Turns off warnings, progress bars and telemetry of libraries (TRL's trainers report usage)."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def busy(message: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr during a long task, if stderr is a terminal. Yields a function that changes its message."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(message) as status, _log_shown(status.update):
        yield status.update


@contextmanager
def _log_shown(progress: Callable[[str], None]) -> Iterator[None]:
    """Shows the package's log: each warning on a line of stderr, everything below through `progress`."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            say(f"pasta: {text}") if record.levelno >= logging.WARNING else progress(text)

    log, handler = logging.getLogger("pastalm"), Shown()
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class CtrlC:
    """A context manager: the first Ctrl-C only sets `pressed`, so that no step is cut short; the second raises."""

    pressed = False

    def __enter__(self) -> CtrlC:
        self._handler_before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._handler_before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
