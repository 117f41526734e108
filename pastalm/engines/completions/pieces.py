"""A vocabulary for servers that work with text instead of token ids."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

from pastalm.core.vocabulary import TAG_TOKENS, Tags, Vocabulary
from pastalm.records.xml import Scanner


class Pieces:
    """An open vocabulary for a server that returns text and no token ids.

    A token is a piece of text as the server sent it, at most LONGEST_PIECE characters. Its id is that text, read as a
    number, so no table is needed. Id 0 is the end of the text.

    prepared: the model has the tag tokens. The server spells them out; their ids are 1 to 6. Each digit is a piece of
        its own, since promised lengths are read digit by digit. If False, each `>` ends a piece, so that a tag of the
        XML is never in one piece with what follows.
    ends: spellings of the end of the text.
    """

    EOS = 0

    def __init__(self, *, prepared: bool = False, ends: Iterable[str] = ()) -> None:
        tags = Tags(*range(1, 7)) if prepared else None
        tag_ids = dict(zip(TAG_TOKENS.values(), range(1, 7), strict=True)) if prepared else {}
        self._tag_ids = tag_ids | dict.fromkeys(filter(None, ends), self.EOS)
        self._apart = re.compile("[0-9]" if prepared else ">")
        self._split = re.compile("|".join([*map(re.escape, self._tag_ids), self._apart.pattern]))
        self.vocabulary = Vocabulary(
            size=sys.maxsize,
            eos=frozenset({self.EOS}),
            encode=self.encode,
            piece=self.piece,
            scanner=Scanner,
            tags=tags,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. The spelling of a tag is text, too."""
        return [_number(part) for part in _pieces(text, self._apart)]

    def read(self, text: str) -> list[int]:
        """Ids of text that the server sent. The spelling of a tag is that tag, that of the end is the end."""
        parts = _pieces(text, self._split)
        return [self._tag_ids[part] if part in self._tag_ids else _number(part) for part in parts]

    def piece(self, token: int) -> bytes:
        return token.to_bytes(-(-token.bit_length() // 8), "big")[1:] if token > 6 else b""

    def text(self, tokens: Iterable[int]) -> str:
        """The text of some ids, with tags spelled out, as it is sent to the server."""
        spelling = ("", *TAG_TOKENS.values())
        return b"".join(self.piece(t) if t > 6 else spelling[t].encode() for t in tokens).decode()


LONGEST_PIECE = 256
"""Keeps ids below the number of digits that Python and JSON readers accept."""


def _pieces(text: str, split: re.Pattern[str]) -> Iterator[str]:
    """The text in parts: each match of `split` is a part, but `>` belongs to the part before it. Lone surrogates, which
    JSON can contain, are replaced."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    at = 0
    for match in split.finditer(text):
        end = match.end() if match[0] == ">" else match.start()
        yield from _bounded(text[at:end])
        if end < match.end():
            yield match[0]
        at = match.end()
    yield from _bounded(text[at:])


def _bounded(text: str) -> Iterator[str]:
    return (text[i : i + LONGEST_PIECE] for i in range(0, len(text), LONGEST_PIECE))


def _number(text: str) -> int:
    """The bytes of a text, after a byte 1, as a number."""
    return int.from_bytes(b"\1" + text.encode(), "big")
