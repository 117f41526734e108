"""PASTA-LANG: its values, their text form, and a scanner for text that arrives in pieces.

An answer in linear form is a sequence of marks, in which each `Promise` stands directly before the chunk that keeps it.
Its text form is the paper's XML (arXiv 2502.11517, section 3):

    <promise topic="sleep" tokens="20"/><async>1. Sleep well.</async><sync/>That is all.

Escaping, one rule: where ordinary text holds `<`, any number of backslashes, and then `promise`, `async`, `/async` or
`sync`, one backslash more is written after the `<`. A reader takes one away again.

Whole documents, with chunks nested in one another, are in `records/documents.py`: decoding needs none.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias
from xml.sax.saxutils import escape, unescape

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

_WORDS = r"promise|/?async|sync"
HEAD = re.compile(rf"<(\\*)({_WORDS})?")
"""A `<`, backslashes after it, and the word of a tag, if there is one."""
_LOOKS_LIKE_A_TAG = re.compile(rf"<(?=\\*(?:{_WORDS}))")
_ATTRIBUTES = r'[ \t]+topic="(?P<topic>[^"<>\n]*)"[ \t]+tokens="(?P<tokens>\d{1,6})"[ \t]*'
_SWAPPED = r'[ \t]+tokens="(?P<tokens2>\d{1,6})"[ \t]+topic="(?P<topic2>[^"<>\n]*)"[ \t]*'
TAG = re.compile(
    rf"<promise(?:{_ATTRIBUTES}|{_SWAPPED})/>|(?P<open><async[ \t]*>)|(?P<close></async[ \t]*>)|(?P<sync><sync[ \t]*/>)"
)


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


def unescaped(head: re.Match[str]) -> str:
    """The text that a match of HEAD stands for, if it begins no tag."""
    return head[0].replace("\\", "", 1) if head[2] else head[0]


def tag_mark(tag: re.Match[str], promise: Callable[[str, int], Promise]) -> Mark:
    """The mark that a match of TAG stands for. promise: makes a promise of its topic and length."""
    if tag["open"]:
        return AsyncOpen()
    if tag["close"]:
        return AsyncClose()
    if tag["sync"]:
        return Sync()
    topic, tokens = (tag["topic"], tag["tokens"]) if tag["tokens"] else (tag["topic2"], tag["tokens2"])
    return promise(unescape(topic, {"&quot;": '"'}), int(tokens))


# ------------------------------------------------------------------------------ scanning pieces

TAG_LIMIT = 200
"""Characters after which a tag that is still open is ordinary text."""
_BEGUN = "|".join(word[:length] for word in ("promise", "async", "/async", "sync") for length in range(len(word)))
_UNDECIDED = re.compile(rf"<(?:\\*(?:{_BEGUN})|(?!.{{{TAG_LIMIT - 1}}})(?:{_WORDS})[^<>\n]*)\Z", re.DOTALL)
"""At the end of a text: what more text may make a tag, or an escaped one."""


class Scanner:
    """Finds tags in bytes that arrive in pieces, wherever the pieces end.

    For models that write the XML themselves, so it is lenient: a malformed tag is ordinary text, a promise outside its
    bounds is clipped. The result does not depend on where the pieces end (adjacent `Text` merged). Bytes that are not
    UTF-8 become U+FFFD.

    held: text that may still become a tag.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""

    def feed(self, piece: bytes) -> list[Mark]:
        """The marks that are certain once `piece` has arrived."""
        return list(self._scan(self.held + self._decoder.decode(piece)))

    def flush(self) -> list[Mark]:
        """The marks in what is still held, at the end of the text. The scanner can be used again afterwards."""
        return list(self._scan(self.held + self._decoder.decode(b"", final=True), final=True))

    def _scan(self, text: str, *, final: bool = False) -> Iterator[Mark]:
        at = 0
        while (head := HEAD.search(text, at)) and (final or not _UNDECIDED.match(text, head.start())):
            if head.start() > at:
                yield Text(text[at : head.start()])
            tag = TAG.match(text, head.start(), head.start() + TAG_LIMIT)
            yield tag_mark(tag, Promise.clip) if tag else Text(unescaped(head))
            at = (tag or head).end()
        end = head.start() if head else len(text)
        if end > at:
            yield Text(text[at:end])
        self.held = text[end:]
