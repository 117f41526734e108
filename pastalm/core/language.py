"""PASTA-LANG: its values, its text form, and a scanner for text that arrives in pieces.

A document is a tuple of nodes in linear form: `Text`, `Promise`, `Async` and `Sync`, where each
`Promise` stands directly before the `Async` chunk that keeps it. Its text form is the paper's XML
(arXiv 2502.11517, section 3):

    <promise topic="sleep" tokens="20"/><async>1. Sleep well.</async><sync/>That is all.

Escaping, one rule: where ordinary text holds `<`, any number of backslashes, and then `promise`,
`async`, `/async` or `sync`, one backslash more is written after the `<`; `parse` and `Scanner` take
one away again.

Normal form: adjacent `Text` merged, no empty `Text`. `parse(render(x)) == x` for every x in it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from pastalm.errors import LanguageError

MAX_TOPIC_WORDS = 3
LENGTH_STEP = 10
MAX_LENGTH = 500
CHUNK_TAGS = 2
"""`<async>` and `</async>`: what a chunk takes beside the tokens it was promised."""
LENGTHS = range(LENGTH_STEP, MAX_LENGTH + 1, LENGTH_STEP)
_NUMBER = re.compile(r"\d{1,3}[.)](?:\s+|$)")


def topic_key(topic: str) -> str:
    """The key that is equal for equal topics: the words, case folded, without a number before them.

    Empty for a topic that is only such a number.
    """
    words = " ".join(topic.split()).casefold()
    number = _NUMBER.match(words)
    return words[number.end() :] if number else words


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary text of the answer, unescaped."""

    text: str


@dataclass(frozen=True, slots=True)
class Promise:
    """A chunk is written asynchronously and belongs here.

    topic: 1 to 3 words, single spaces between them. tokens: predicted length of the chunk's whole
    linear content, a multiple of 10 in 10..500 ("Pred-10X" in the paper).
    Raises LanguageError for anything else; `clip` makes the nearest valid promise.
    """

    topic: str
    tokens: int

    def __post_init__(self) -> None:
        words = self.topic.split()
        if not words or len(words) > MAX_TOPIC_WORDS or " ".join(words) != self.topic:
            raise LanguageError(f"topic must be 1 to {MAX_TOPIC_WORDS} words, got {self.topic!r}")
        if self.tokens not in LENGTHS:
            raise LanguageError(
                f"tokens must be a multiple of {LENGTH_STEP} in {LENGTH_STEP}..{MAX_LENGTH}, got {self.tokens}"
            )

    @classmethod
    def clip(cls, topic: str, tokens: float) -> Promise:
        """The nearest valid promise: first 3 words, length rounded up or down to a ten."""
        words = topic.split()[:MAX_TOPIC_WORDS] or ["part"]
        return cls(" ".join(words), round_length(tokens))


@dataclass(frozen=True, slots=True)
class Async:
    """The chunk that keeps the promise before it."""

    body: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Sync:
    """What follows may depend on the chunks promised so far."""


@dataclass(frozen=True, slots=True)
class AsyncOpen:
    """`<async>` in a flat document."""


@dataclass(frozen=True, slots=True)
class AsyncClose:
    """`</async>` in a flat document."""


Node: TypeAlias = "Text | Promise | Async | Sync"
Document: TypeAlias = "tuple[Node, ...]"
Mark: TypeAlias = "Text | Promise | AsyncOpen | AsyncClose | Sync"


def round_length(tokens: float) -> int:
    """The nearest length a promise may name: a multiple of 10 in 10..500."""
    return min(MAX_LENGTH, max(LENGTH_STEP, round(tokens / LENGTH_STEP) * LENGTH_STEP))


# ------------------------------------------------------------------------------ flat and nested


def linearize(document: Iterable[Node]) -> tuple[Mark, ...]:
    """The document as flat marks in linear order, in normal form."""
    return tuple(_merged(_flatten(document)))


def _flatten(document: Iterable[Node]) -> Iterator[Mark]:
    for node in document:
        if isinstance(node, Async):
            yield AsyncOpen()
            yield from _flatten(node.body)
            yield AsyncClose()
        else:
            yield node


def _merged(marks: Iterable[Mark]) -> Iterator[Mark]:
    held: list[str] = []
    for mark in marks:
        if isinstance(mark, Text):
            held.append(mark.text)
            continue
        if text := "".join(held):
            yield Text(text)
        held = []
        yield mark
    if text := "".join(held):
        yield Text(text)


def nest(marks: Iterable[Mark]) -> Document:
    """The document of which `marks` is the linear form, in normal form.

    Raises LanguageError where a chunk has no promise, a promise no chunk, or a tag no partner.
    """
    return _nest((mark, None) for mark in _merged(marks))


def _nest(marks: Iterable[tuple[Mark, int | None]]) -> Document:
    stack: list[list[Node]] = [[]]
    promised = False
    at: int | None = None
    for mark, at in marks:
        if promised and not isinstance(mark, AsyncOpen):
            raise LanguageError("a promise must be followed at once by its <async>", at)
        if isinstance(mark, AsyncOpen):
            if not promised:
                raise LanguageError("<async> without a promise right before it", at)
            stack.append([])
        elif isinstance(mark, AsyncClose):
            if len(stack) == 1:
                raise LanguageError("</async> without its <async>", at)
            body = tuple(stack.pop())
            stack[-1].append(Async(body))
        else:
            stack[-1].append(mark)
        promised = isinstance(mark, Promise)
    if promised:
        raise LanguageError("the last promise has no <async>", at)
    if len(stack) > 1:
        raise LanguageError("an <async> is never closed", at)
    return tuple(stack[0])


def normalize(document: Iterable[Node]) -> Document:
    """The document in normal form; raises LanguageError if it is not well-formed."""
    return nest(linearize(document))


def strip(document: Iterable[Node | Mark]) -> str:
    """The reader's text: tags removed, chunks in their places."""
    parts = []
    for node in document:
        if isinstance(node, Text):
            parts.append(node.text)
        elif isinstance(node, Async):
            parts.append(strip(node.body))
    return "".join(parts)


# ------------------------------------------------------------------------------ text form

_WORD = r"/?async|promise|sync"
_ESCAPE = re.compile(rf"<(\\*)({_WORD})")
_ATTRIBUTE = r'[ \t]+topic="(?P<topic>[^"<>\n]*)"[ \t]+tokens="(?P<tokens>\d{1,6})"[ \t]*'
_SWAPPED = r'[ \t]+tokens="(?P<tokens2>\d{1,6})"[ \t]+topic="(?P<topic2>[^"<>\n]*)"[ \t]*'
_TAG = re.compile(
    rf"<promise(?:{_ATTRIBUTE}|{_SWAPPED})/>|(?P<open><async[ \t]*>)|(?P<close></async[ \t]*>)|(?P<sync><sync[ \t]*/>)"
)
TAG_LIMIT = 200
"""Characters after which a tag that is still open is ordinary text."""

_ENTITIES = (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;"))


def _escape_topic(topic: str) -> str:
    for plain, entity in _ENTITIES:
        topic = topic.replace(plain, entity)
    return topic


def _unescape_topic(topic: str) -> str:
    for plain, entity in reversed(_ENTITIES):
        topic = topic.replace(entity, plain)
    return topic


def render_mark(mark: Mark) -> str:
    """One mark in text form."""
    if isinstance(mark, Text):
        return _ESCAPE.sub(r"<\\\1\2", mark.text)
    if isinstance(mark, Promise):
        return f'<promise topic="{_escape_topic(mark.topic)}" tokens="{mark.tokens}"/>'
    if isinstance(mark, AsyncOpen):
        return "<async>"
    return "</async>" if isinstance(mark, AsyncClose) else "<sync/>"


def render(document: Iterable[Node]) -> str:
    """The document's text form, escaped."""
    return "".join(render_mark(mark) for mark in linearize(document))


def parse(source: str) -> Document:
    """The document that `source` is the text form of, in normal form.

    Raises LanguageError, with the position, for a malformed tag, a promise outside its bounds, or
    tags that do not pair up.
    """
    return _nest(_tokens(source))


def _tokens(source: str) -> Iterator[tuple[Mark, int]]:
    held: list[str] = []
    start = end = 0
    for head in _ESCAPE.finditer(source):
        held.append(source[end : head.start()])
        if head[1]:
            held.append(f"<{head[1][1:]}{head[2]}")
            end = head.end()
            continue
        tag = _TAG.match(source, head.start())
        if tag is None:
            raise LanguageError(f"malformed tag <{head[2]}", head.start())
        if text := "".join(held):
            yield Text(text), start
        held = []
        try:
            yield _mark(tag, strict=True), head.start()
        except LanguageError as error:
            raise LanguageError(str(error), head.start()) from None
        start = end = tag.end()
    held.append(source[end:])
    if text := "".join(held):
        yield Text(text), start


def _mark(tag: re.Match[str], *, strict: bool) -> Mark:
    if tag["open"]:
        return AsyncOpen()
    if tag["close"]:
        return AsyncClose()
    if tag["sync"]:
        return Sync()
    topic = _unescape_topic(tag["topic"] if tag["tokens"] else tag["topic2"])
    tokens = int(tag["tokens"] or tag["tokens2"])
    return Promise(topic, tokens) if strict else Promise.clip(topic, tokens)


# ------------------------------------------------------------------------------ scanning pieces

_HEADS = ("promise", "async", "/async", "sync")
"""The longest first."""
_ESCAPED = re.compile(r"\\*")
_TAG_END = re.compile(r"[<>\n]")


class Scanner:
    """Finds tags in bytes that arrive in pieces, wherever the pieces end.

    For models that write the XML themselves, so it is lenient: a malformed tag is ordinary text, a promise outside its
    bounds is clipped. Text that may still become a tag is held back. The result does not depend on where the pieces
    end (adjacent `Text` merged). Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, piece: bytes) -> list[Mark]:
        """The marks that are certain once `piece` has arrived."""
        self._held += self._decoder.decode(piece)
        return list(self._scan(final=False))

    def flush(self) -> list[Mark]:
        """The marks in what is still held, at the end of the text. The scanner can be used again afterwards."""
        self._held += self._decoder.decode(b"", final=True)
        marks = list(self._scan(final=True))
        self._decoder.reset()
        return marks

    @property
    def held(self) -> str:
        """Characters that may still become a tag."""
        return self._held

    def _scan(self, *, final: bool) -> Iterator[Mark]:
        held, at = self._held, 0
        while at < len(held):
            bracket = held.find("<", at)
            end = len(held) if bracket < 0 else bracket
            if end > at:
                yield Text(held[at:end])
                at = end
                continue
            length, mark = self._decide(held, at, final)
            if not length:
                break
            yield mark if mark is not None else Text(held[at : at + length])
            at += length
        self._held = held[at:]

    @staticmethod
    def _decide(held: str, at: int, final: bool) -> tuple[int, Mark | None]:
        """The number of characters that belong together at a `<` (0: more text is needed), and the mark that they are
        (None: ordinary text)."""
        begin = _ESCAPED.match(held, at + 1).end()  # type: ignore[union-attr]
        slashes = begin - at - 1
        word = next((w for w in _HEADS if held.startswith(w, begin)), None)
        if word is None:
            rest = held[begin : begin + len(_HEADS[0])]
            waits = not final and any(w.startswith(rest) for w in _HEADS)
            return (0, None) if waits else (1 + slashes, None)
        if slashes:
            return 1 + slashes + len(word), Text(f"<{held[at + 2 : begin]}{word}")
        end = _TAG_END.search(held, at + 1, at + TAG_LIMIT)
        if end is None and len(held) - at < TAG_LIMIT and not final:
            return 0, None
        tag = _TAG.match(held, at) if end is not None else None
        return (tag.end() - at, _mark(tag, strict=False)) if tag else (1 + len(word), None)
