"""What the core needs to know about a tokenizer: ids of the tags, bytes of a token, ids of numbers.

A prepared model has six special tokens of its own for PASTA-LANG; a promise is then
`<|promise|>` topic `<|tokens|>` N `<|/promise|>`. Their ids arise only from `encode_document`, never
from text. An unprepared model has none (`tags` is None) and writes the XML as ordinary text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pastalm.core.language import LENGTHS, AsyncClose, AsyncOpen, Node, Promise, Text, linearize

TAG_TOKENS = {
    "promise": "<|promise|>",
    "tokens": "<|tokens|>",
    "promise_end": "<|/promise|>",
    "async_open": "<|async|>",
    "async_close": "<|/async|>",
    "sync": "<|sync|>",
}
"""Name and spelling of the six added tokens, in the order in which a model is given them."""


@dataclass(frozen=True, slots=True)
class Tags:
    """Token ids of the six tags."""

    promise: int
    tokens: int
    promise_end: int
    async_open: int
    async_close: int
    sync: int
    ids: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """All of them, in the order of TAG_TOKENS."""

    def __post_init__(self) -> None:
        ids = (self.promise, self.tokens, self.promise_end, self.async_open, self.async_close, self.sync)
        object.__setattr__(self, "ids", ids)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.

    size: number of ids.
    eos: ids that end a response.
    encode: the ids of a text, never a special token.
    piece: the bytes that a token adds to the text (none for special tokens).
    tags: the ids of the tags (None: the model writes XML).
    ends: how the tokens of eos are spelled, for servers whose replies contain them.
    """

    size: int
    eos: frozenset[int]
    encode: Callable[[str], Sequence[int]]
    piece: Callable[[int], bytes]
    tags: Tags | None = None
    ends: frozenset[str] = frozenset()

    @cached_property
    def numbers(self) -> dict[tuple[int, ...], int]:
        """Token ids of every length a promise may name -> that length."""
        return {tuple(self.encode(str(n))): n for n in LENGTHS}

    def text(self, tokens: Iterable[int]) -> str:
        """The text of some tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", errors="replace")

    def encode_document(self, document: Iterable[Node]) -> list[int]:
        """Token ids of the linear form. Needs `tags`."""
        assert self.tags is not None
        ids: list[int] = []
        for mark in linearize(document):
            if isinstance(mark, Text):
                ids += self.encode(mark.text)
            elif isinstance(mark, Promise):
                ids += [self.tags.promise, *self.encode(mark.topic)]
                ids += [self.tags.tokens, *self.encode(str(mark.tokens)), self.tags.promise_end]
            elif isinstance(mark, AsyncOpen):
                ids.append(self.tags.async_open)
            else:
                ids.append(self.tags.async_close if isinstance(mark, AsyncClose) else self.tags.sync)
        return ids
