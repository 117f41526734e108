"""What the interpreter and the layout must know of a tokenizer: tag ids, bytes of a token, numbers.

A prepared model has six special tokens of its own for PASTA-LANG; a promise is then
`<|promise|>` topic `<|tokens|>` N `<|/promise|>`. Their ids arise only from `encode_document`, never
from text. An unprepared model has none (`tags` is None) and writes the XML as ordinary text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pastalm.lang import LENGTHS, AsyncClose, AsyncOpen, Node, Promise, Text, linearize

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
    """encode: base vocabulary only, no special token ever. piece: bytes a token adds to the text
    (empty for special tokens). eos: ids that end a response. size: number of ids. ends: how the tokens of eos are
    spelled, for servers that say them."""

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
        """The text of some tokens; bytes that are no UTF-8 become U+FFFD."""
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



class Pieces:
    """An open vocabulary, for a server that says text and no token ids: every piece of text that comes gets an
    id of its own, so that a token is what the server sent at once.

    0 is the end. If `prepared`, 1..6 are the six tags, and digits are pieces by themselves, as promised lengths are
    read one at a time; the server spells the tags, and may so spell the end too (`ends`). Else every `>` ends a piece,
    so that nothing stands behind a tag of the XML in its piece.
    """

    EOS = 0

    def __init__(self, *, prepared: bool = False, ends: Iterable[str] = ()) -> None:
        tags = Tags(*range(1, 7)) if prepared else None
        self._texts = ["", *TAG_TOKENS.values()]
        self._ids: dict[str, int] = {}
        spelled = dict(zip(TAG_TOKENS.values(), range(1, 7), strict=True)) if prepared else {}
        self._spelled = spelled | dict.fromkeys(ends, self.EOS)
        self._apart = re.compile("[0-9]" if prepared else "[^>]*>")
        self._split = re.compile("|".join([*map(re.escape, self._spelled), self._apart.pattern]))
        self.vocabulary = Vocabulary(
            size=sys.maxsize,
            eos=frozenset({self.EOS}),
            encode=self.encode,
            piece=self.piece,
            tags=tags,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: a tag's spelling is text."""
        return [self._id(part) for part in self._parts(text, self._apart)]

    def read(self, text: str) -> list[int]:
        """Ids of what a server said: a tag's spelling is that tag, the end's is the end."""
        parts = self._parts(text, self._split)
        return [self._spelled[part] if part in self._spelled else self._id(part) for part in parts]

    def piece(self, token: int) -> bytes:
        return self._texts[token].encode() if token > 6 else b""

    def text(self, tokens: Iterable[int]) -> str:
        """What a server is sent for some ids, tags spelled out."""
        return "".join(self._texts[token] for token in tokens)

    @staticmethod
    def _parts(text: str, split: re.Pattern[str]) -> Iterable[str]:
        at = 0
        for found in split.finditer(text):
            yield from filter(None, (text[at : found.start()], found[0]))
            at = found.end()
        if at < len(text):
            yield text[at:]

    def _id(self, text: str) -> int:
        if text not in self._ids:
            self._ids[text] = len(self._texts)
            # half of a surrogate pair, which JSON can hold, is no character
            self._texts.append(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return self._ids[text]
