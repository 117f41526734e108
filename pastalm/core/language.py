"""PASTA-LANG: its values and their text form.

An answer in linear form is a sequence of marks, in which each `Promise` stands directly before the chunk that keeps it.
Its text form is the paper's XML (arXiv 2502.11517, section 3):

    <promise topic="sleep" tokens="20"/><async>1. Sleep well.</async><sync/>That is all.

Escaping, one rule: where ordinary text holds `<`, any number of backslashes, and then `promise`, `async`, `/async` or
`sync`, one backslash more is written after the `<`. A reader takes one away again.

What reads the text form is in `records/xml.py`, whole documents, with chunks nested in one another, in
`records/documents.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeAlias
from xml.sax.saxutils import escape

from pastalm.errors import LanguageError

MAX_TOPIC_WORDS = 3
LENGTH_STEP = 10
MAX_LENGTH = 500
LENGTHS = range(LENGTH_STEP, MAX_LENGTH + 1, LENGTH_STEP)
CHUNK_TAGS = 2
"""`<async>` and `</async>`: what a chunk takes beside the tokens it was promised."""
_NUMBER = re.compile(r"\A\d{1,3}[.)](?:\s+|$)")


def topic_key(topic: str) -> str:
    """The key that is equal for equal topics: the words, case folded, without a number before them.

    Empty for a topic that is only such a number.
    """
    return _NUMBER.sub("", " ".join(topic.split()).casefold(), count=1)


def clip_topic(topic: str) -> str:
    """A topic as a promise may name it: its first 3 words, single spaces between them, and the number before them.

    A number ("2.", "2)") says where in a list the chunk stands, not what it is about, so it is not one of the words.
    """
    words = topic.split()
    numbered = bool(words and _NUMBER.fullmatch(words[0]))
    return " ".join(words[: MAX_TOPIC_WORDS + numbered])


def round_length(tokens: float) -> int:
    """The nearest length a promise may name: a multiple of 10 in 10..500."""
    return min(MAX_LENGTH, max(LENGTH_STEP, round(tokens / LENGTH_STEP) * LENGTH_STEP))


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary text of the answer, unescaped."""

    text: str


@dataclass(frozen=True, slots=True)
class Promise:
    """A chunk is written asynchronously and belongs here.

    topic: 1 to 3 words, single spaces between them, and a number before them if it has one. tokens: predicted length
    of the chunk's whole linear content, a multiple of 10 in 10..500 ("Pred-10X" in the paper).
    Raises LanguageError for anything else; `clip` makes the nearest valid promise.
    """

    topic: str
    tokens: int

    def __post_init__(self) -> None:
        if not self.topic or clip_topic(self.topic) != self.topic:
            raise LanguageError(f"topic must be 1 to {MAX_TOPIC_WORDS} words, got {self.topic!r}")
        if self.tokens not in LENGTHS:
            raise LanguageError(
                f"tokens must be a multiple of {LENGTH_STEP} in {LENGTH_STEP}..{MAX_LENGTH}, got {self.tokens}"
            )

    @classmethod
    def clip(cls, topic: str, tokens: float) -> Promise:
        """The nearest valid promise: first 3 words, length rounded up or down to a ten."""
        return cls(clip_topic(topic) or "part", round_length(tokens))


@dataclass(frozen=True, slots=True)
class AsyncOpen:
    """`<async>`: the chunk begins that keeps the promise before it."""


@dataclass(frozen=True, slots=True)
class AsyncClose:
    """`</async>`: the chunk ends."""


@dataclass(frozen=True, slots=True)
class Sync:
    """What follows may depend on the chunks promised so far."""


Mark: TypeAlias = "Text | Promise | AsyncOpen | AsyncClose | Sync"


def merged(marks: Iterable[Mark]) -> Iterator[Mark]:
    """The marks in normal form: adjacent `Text` merged, no empty `Text`."""
    for is_text, run in groupby(marks, key=lambda mark: isinstance(mark, Text)):
        if not is_text:
            yield from run
        elif text := "".join(mark.text for mark in run if isinstance(mark, Text)):
            yield Text(text)


# ------------------------------------------------------------------------------ text form

TAG_WORDS = r"promise|/?async|sync"
_LOOKS_LIKE_A_TAG = re.compile(rf"<(?=\\*(?:{TAG_WORDS}))")


def render_mark(mark: Mark) -> str:
    """One mark in text form, escaped."""
    if isinstance(mark, Text):
        return _LOOKS_LIKE_A_TAG.sub(r"<\\", mark.text)
    if isinstance(mark, Promise):
        topic = escape(mark.topic, {'"': "&quot;"})
        return f'<promise topic="{topic}" tokens="{mark.tokens}"/>'
    if isinstance(mark, AsyncOpen):
        return "<async>"
    return "</async>" if isinstance(mark, AsyncClose) else "<sync/>"


class MarkScanner(Protocol):
    """Finds marks in bytes that arrive in pieces, for models that write them as text (`records/xml.py`).

    held: text that may still become a tag.
    """

    held: str

    def feed(self, piece: bytes) -> list[Mark]:
        """The marks that are certain once `piece` has arrived."""

    def flush(self) -> list[Mark]:
        """The marks in what is still held, at the end of the text."""
