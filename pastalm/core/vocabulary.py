"""What the core needs to know about a tokenizer: ids of the tags, bytes of a token, ids of numbers.

A prepared model has six special tokens of its own for PASTA-LANG; a promise is then
`<|promise|>` topic `<|tokens|>` N `<|/promise|>`. Their ids never arise from text. An unprepared model has none
(`tags` is None) and writes the XML as ordinary text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pastalm.core.language import LENGTHS, MarkScanner

TAG_TOKENS = {
    "promise": "<|promise|>",
    "tokens": "<|tokens|>",
    "promise_end": "<|/promise|>",
    "async_open": "<|async|>",
    "async_close": "<|/async|>",
    "sync": "<|sync|>",
}
"""Name and spelling of the six added tokens, in the order in which a model is given them."""


class Tags(NamedTuple):
    """Token ids of the six tags, in the order of TAG_TOKENS."""

    promise: int
    tokens: int
    promise_end: int
    async_open: int
    async_close: int
    sync: int


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer.

    size: number of ids.
    eos: ids that end a response.
    encode: the ids of a text, never a special token.
    piece: the bytes that a token adds to the text (none for special tokens).
    scanner: makes what finds tags in the text of a model without tags of its own.
    tags: the ids of the tags (None: the model writes XML).
    ends: how the tokens of eos are spelled, for servers whose replies contain them.
    """

    size: int
    eos: frozenset[int]
    encode: Callable[[str], Sequence[int]]
    piece: Callable[[int], bytes]
    scanner: Callable[[], MarkScanner]
    tags: Tags | None = None
    ends: frozenset[str] = frozenset()

    @cached_property
    def numbers(self) -> dict[tuple[int, ...], int]:
        """Token ids of every length a promise may name -> that length."""
        return {tuple(self.encode(str(n))): n for n in LENGTHS}

    def text(self, tokens: Iterable[int]) -> str:
        """The text of some tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", errors="replace")
