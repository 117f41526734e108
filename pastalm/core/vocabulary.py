"""What the interpreter and the layout must know of a tokenizer: tag ids, bytes of a token, numbers.

A prepared model has six special tokens of its own for PASTA-LANG; a promise is then
`<|promise|>` topic `<|tokens|>` N `<|/promise|>`. Their ids arise only from `encode_document`, never
from text. An unprepared model has none (`tags` is None) and writes the XML as ordinary text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """An open vocabulary, for a server that says text and no token ids: a token is what the server sent at once, and
    its id is that text, read as a number. So there is no table: nothing is shared between threads or kept.

    0 is the end. If `prepared`, 1..6 are the six tags, and digits are pieces by themselves, as promised lengths are
    read one at a time; the server spells the tags, and may so spell the end too (`ends`). Else every `>` ends a piece,
    so that nothing stands behind a tag of the XML in its piece. A piece has LONGEST_PIECE characters at most.
    """

    EOS = 0

    def __init__(self, *, prepared: bool = False, ends: Iterable[str] = ()) -> None:
        tags = Tags(*range(1, 7)) if prepared else None
        spelled = dict(zip(TAG_TOKENS.values(), range(1, 7), strict=True)) if prepared else {}
        self._spelled = spelled | dict.fromkeys(filter(None, ends), self.EOS)
        self._apart = re.compile("[0-9]" if prepared else ">")
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
        return [_number(part) for part in _pieces(text, self._apart)]

    def read(self, text: str) -> list[int]:
        """Ids of what a server said: a tag's spelling is that tag, the end's is the end."""
        parts = _pieces(text, self._split)
        return [self._spelled[part] if part in self._spelled else _number(part) for part in parts]

    def piece(self, token: int) -> bytes:
        return token.to_bytes(-(-token.bit_length() // 8), "big")[1:] if token > 6 else b""

    def text(self, tokens: Iterable[int]) -> str:
        """What a server is sent for some ids, tags spelled out."""
        spelling = ("", *TAG_TOKENS.values())
        return b"".join(self.piece(t) if t > 6 else spelling[t].encode() for t in tokens).decode()


LONGEST_PIECE = 256
"""Its number has fewer digits than Python and JSON readers take."""


def _pieces(text: str, split: re.Pattern[str]) -> Iterator[str]:
    """The text in parts: what `split` matches stands alone, but `>` ends the part before it. Half of a surrogate
    pair, which JSON can hold, is no character."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    at = 0
    for found in split.finditer(text):
        end = found.end() if found[0] == ">" else found.start()
        yield from _bounded(text[at:end])
        if end < found.end():
            yield found[0]
        at = found.end()
    yield from _bounded(text[at:])


def _bounded(text: str) -> Iterator[str]:
    return (text[i : i + LONGEST_PIECE] for i in range(0, len(text), LONGEST_PIECE))


def _number(text: str) -> int:
    """A text's bytes behind a 1, as a number."""
    return int.from_bytes(b"\1" + text.encode(), "big")
