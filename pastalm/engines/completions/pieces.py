"""A vocabulary for servers that take and give text, and no token ids."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

from pastalm.core.vocabulary import TAG_TOKENS, Tags, Vocabulary


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
