"""The exceptions a user can cause: one tree, one line each, saying what to do.

PastaError
├── LanguageError      text that is not PASTA-LANG (a position where there is one)
├── RequestError       a request that no engine could serve (also a ValueError)
├── CapabilityError    asked of an engine that does not offer it
├── ModelError         a model or adapter that cannot be found, read or prepared
├── DataError          a file of prompts, annotations or events that cannot be read
├── EngineError        the engine failed in the middle of a step
├── RemoteError        a server that cannot be reached, or that refuses the run
└── Refused            what our own server tells a client (server/protocol.py)
"""

from __future__ import annotations

from collections.abc import Iterable


class PastaError(Exception):
    """Base of every error that a user can cause."""


class LanguageError(PastaError, ValueError):
    """Not PASTA-LANG. `position` is the offset in characters where it stops being so."""

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message if position is None else f"{message} (at character {position})")
        self.position = position


class RequestError(PastaError, ValueError):
    """A request that cannot be served as it stands."""


class CapabilityError(PastaError):
    """The engine does not support what was asked of it."""


class ModelError(PastaError):
    """A model or adapter cannot be found, read or prepared."""


class DataError(PastaError):
    """A data file cannot be read or is not what it should be."""


class EngineError(PastaError):
    """An engine failed in the middle of a step."""


class RemoteError(PastaError):
    """A server cannot be reached, or refuses everything that this run asks."""


def check_text(text: str, name: str) -> None:
    """Raises RequestError where a text holds half of a surrogate pair, which no encoding can write: it comes of bytes
    that are not UTF-8 on a command line, and of JSON that holds such halves."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # as Python's surrogateescape has it
            what = f"is not UTF-8: byte 0x{code - 0xDC00:02x}"
        else:
            what = f"holds half of a surrogate pair, U+{code:04X},"
        raise RequestError(f"{name} {what} at character {error.start}; give whole characters, as UTF-8") from None


def complaint(checks: Iterable[tuple[bool, str]]) -> str | None:
    """What the first failed check says; None if all of them (whether it holds, what else) hold."""
    return next((said for holds, said in checks if not holds), None)
