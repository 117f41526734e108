"""The exceptions that a user can cause. Each message is one line that says what to do.

PastaError
├── LanguageError      text is not PASTA-LANG; has the position if it is known
├── RequestError       the request is invalid, for any engine (also a ValueError)
├── CapabilityError    the engine does not support the request
├── ModelError         a model or adapter cannot be found, read or prepared
├── DataError          a file of prompts, answers or events cannot be read
├── EngineError        the engine failed during a step
├── RemoteError        a server cannot be reached, or rejects the run
└── Refused            our own server rejects a client's request (server/errors.py)
"""

from __future__ import annotations

from collections.abc import Iterable


class PastaError(Exception):
    """Base of every error that a user can cause."""


class LanguageError(PastaError, ValueError):
    """The text is not PASTA-LANG. `position`: offset of the first invalid character, if known."""

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message if position is None else f"{message} (at character {position})")
        self.position = position


class RequestError(PastaError, ValueError):
    """The request is invalid."""


class CapabilityError(PastaError):
    """The engine does not support the request."""


class ModelError(PastaError):
    """A model or adapter cannot be found, read or prepared."""


class DataError(PastaError):
    """A data file cannot be read, written or parsed."""


class EngineError(PastaError):
    """The engine failed during a step."""


class RemoteError(PastaError):
    """A server cannot be reached, or rejects every request of this run."""


def check_text(text: str, name: str) -> None:
    """Raises RequestError if the text contains a lone surrogate, which cannot be encoded.

    Lone surrogates come from command-line bytes that are not UTF-8, and from JSON escapes.

    text: the text to check.
    name: how the error message calls it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how Python's surrogateescape stores an invalid byte
            what = f"is not UTF-8: byte 0x{code - 0xDC00:02x}"
        else:
            what = f"contains a lone surrogate, U+{code:04X},"
        raise RequestError(f"{name} {what} at character {error.start}; give valid UTF-8") from None


def complaint(checks: Iterable[tuple[bool, str]]) -> str | None:
    """The message of the first check that failed; None if all are valid. checks: (valid, message)."""
    return next((message for valid, message in checks if not valid), None)
