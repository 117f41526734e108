"""Reads PASTA-LANG's text form (`core/language.py`): its tags, and a scanner for text that arrives in pieces."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from xml.sax.saxutils import unescape

from pastalm.core.language import TAG_WORDS, AsyncClose, AsyncOpen, Mark, Promise, Sync, Text

HEAD = re.compile(rf"<(\\*)({TAG_WORDS})?")
"""A `<`, backslashes after it, and the word of a tag, if there is one."""
_ATTRIBUTES = r'[ \t]+topic="(?P<topic>[^"<>\n]*)"[ \t]+tokens="(?P<tokens>\d{1,6})"[ \t]*'
_SWAPPED = r'[ \t]+tokens="(?P<tokens2>\d{1,6})"[ \t]+topic="(?P<topic2>[^"<>\n]*)"[ \t]*'
TAG = re.compile(
    rf"<promise(?:{_ATTRIBUTES}|{_SWAPPED})/>|(?P<open><async[ \t]*>)|(?P<close></async[ \t]*>)|(?P<sync><sync[ \t]*/>)"
)


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
_UNDECIDED = re.compile(rf"<(?:\\*(?:{_BEGUN})|(?!.{{{TAG_LIMIT - 1}}})(?:{TAG_WORDS})[^<>\n]*)\Z", re.DOTALL)
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
