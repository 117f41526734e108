"""Documents in PASTA-LANG: answers whole, with their chunks nested in one another.

A document is a tuple of nodes: `Text`, `Promise`, `Sync` (`core/language.py`), and `Async`, the chunk that stands
directly behind the promise it keeps. `linearize` and `nest` lead to the flat marks and back, `render` and `parse` to
the text form. Normal form: adjacent `Text` merged, no empty `Text`. `parse(render(x)) == x` for every x in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from pastalm.core.language import AsyncClose, AsyncOpen, Mark, Promise, Sync, Text, merged, render_mark
from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import LanguageError
from pastalm.records.xml import HEAD, TAG, tag_mark, unescaped


@dataclass(frozen=True, slots=True)
class Async:
    """The chunk that keeps the promise before it."""

    body: tuple[Node, ...]


Node: TypeAlias = "Text | Promise | Async | Sync"
Document: TypeAlias = "tuple[Node, ...]"


def linearize(document: Iterable[Node | Mark]) -> tuple[Mark, ...]:
    """The document as flat marks in linear order, in normal form. Marks that are flat already stay as they are."""
    return tuple(merged(_flatten(document)))


def _flatten(document: Iterable[Node | Mark]) -> Iterator[Mark]:
    for node in document:
        if isinstance(node, Async):
            yield AsyncOpen()
            yield from _flatten(node.body)
            yield AsyncClose()
        else:
            yield node


def nest(marks: Iterable[Mark]) -> Document:
    """The document of which `marks` is the linear form, in normal form.

    Raises LanguageError where a chunk has no promise, a promise no chunk, or a tag no partner.
    """
    return _nest((mark, None) for mark in merged(marks))


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
    return "".join(mark.text for mark in _flatten(document) if isinstance(mark, Text))


def encode(document: Iterable[Node | Mark], vocabulary: Vocabulary) -> list[int]:
    """Token ids of the linear form. vocabulary: that of a prepared model; only from here come the ids of its tags."""
    tags = vocabulary.tags
    assert tags is not None
    ids: list[int] = []
    for mark in linearize(document):
        if isinstance(mark, Text):
            ids += vocabulary.encode(mark.text)
        elif isinstance(mark, Promise):
            ids += [tags.promise, *vocabulary.encode(mark.topic)]
            ids += [tags.tokens, *vocabulary.encode(str(mark.tokens)), tags.promise_end]
        elif isinstance(mark, AsyncOpen):
            ids.append(tags.async_open)
        else:
            ids.append(tags.async_close if isinstance(mark, AsyncClose) else tags.sync)
    return ids


# ------------------------------------------------------------------------------ text form


def render(document: Iterable[Node]) -> str:
    """The document's text form, escaped."""
    return "".join(render_mark(mark) for mark in linearize(document))


def parse(source: str) -> Document:
    """The document that `source` is the text form of, in normal form.

    Raises LanguageError, with the position, for a malformed tag, a promise outside its bounds, or
    tags that do not pair up.
    """
    return _nest(_marks(source))


def _marks(source: str) -> Iterator[tuple[Mark, int]]:
    """The marks in normal form, each with the character at which it begins."""
    held: list[str] = []
    start = end = 0
    for head in HEAD.finditer(source):
        held.append(source[end : head.start()])
        if head[1] or not head[2]:
            held.append(unescaped(head))
            end = head.end()
            continue
        tag = TAG.match(source, head.start())
        if tag is None:
            raise LanguageError(f"malformed tag <{head[2]}", head.start())
        if text := "".join(held):
            yield Text(text), start
        held = []
        try:
            mark = tag_mark(tag, Promise)
        except LanguageError as error:
            raise LanguageError(str(error), head.start()) from None
        yield mark, head.start()
        start = end = tag.end()
    held.append(source[end:])
    if text := "".join(held):
        yield Text(text), start
