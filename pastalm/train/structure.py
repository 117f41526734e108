"""Marks the independent parts of an answer by its structure, without any model.

The paper has a large model annotate (section 5.1; annotate_remote.py); this reads structure instead: items of
lists, titled sections, labelled and enumerated paragraphs. It is made to be right rather than
complete: where a part may lean on an earlier one (a pronoun, "then", a step that uses a result, a
derivation, a story) it is left in the main thread.

Contract: `strip(annotate(r)) == r` byte for byte. A chunk holds its item whole: marker, text and
the white space after it. Between adjacent promises stands nothing; text after a group follows a
`Sync`, unless it is only the title of the next group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

from pastalm.core.language import (
    CHUNK_TAGS,
    MAX_LENGTH,
    MAX_TOPIC_WORDS,
    Promise,
    Sync,
    Text,
    clip_topic,
    round_length,
    topic_key,
)
from pastalm.records.documents import Async, Document, Node, strip

CountTokens: TypeAlias = Callable[[str], int]
Span: TypeAlias = tuple[int, int]
Kind: TypeAlias = Literal[
    "heading",
    "bold",
    "bracket",
    "roman",
    "series",
    "title",
    "label",
    "outline",
    "number",
    "bullet",
    "ordinal",
]

MAX_GROUP = 16
MAX_TOPIC_TOKENS = 8
MIN_MEAN_TOKENS = 25
"""Below this mean length of its chunks a group is not worth its tags."""
WORTH = 0.9
"""A group is kept if its longest chain is below this share of its plain length."""
PROMISE_TAGS = 3
CLOSED_SHARE = 1 / 3
"""Where a larger share of a group leans on other parts, none of it is promised."""

# --------------------------------------------------------------------------------------- lines


@dataclass(frozen=True, slots=True)
class _Line:
    """start: offset in the response. text: without its end. opens: first line after a blank."""

    start: int
    text: str
    indent: int
    blank: bool
    opens: bool
    fenced: bool


_FENCE = re.compile(r"\s*(```+|~~~+)")


def _lines(response: str) -> list[_Line]:
    lines: list[_Line] = []
    start, fence, opens = 0, "", True
    for raw in response.split("\n"):
        edge = _FENCE.match(raw)
        inside = bool(fence) or edge is not None
        if edge and not fence:
            fence = edge[1][:3]
        elif edge and edge[1].startswith(fence) and raw.strip() == edge[1]:
            fence = ""
        lead = raw[: len(raw) - len(raw.lstrip())]
        blank = not raw.strip()
        lines.append(_Line(start, raw, len(lead.expandtabs(4)), blank, opens and not blank, inside))
        opens = blank
        start += len(raw) + 1
    return lines


# ------------------------------------------------------------------------------------- markers


@dataclass(frozen=True, slots=True)
class _Marker:
    """A line that begins a part. rank: the smaller, the further out. number: of a numbered item."""

    line: int
    kind: Kind
    rank: int
    name: str = ""
    number: int | None = None

    def follows(self, other: _Marker) -> bool:
        """Whether this is the next part of the run that `other` belongs to."""
        if self.kind != other.kind or self.name != other.name:
            return False
        if abs(self.rank - other.rank) > (1 if self.rank >= _LIST_RANK else 0):
            return False
        if self.number is None or other.number is None:
            return True
        # Markdown also numbers every item 1
        return self.number == other.number + 1 or self.number == other.number == 1


_LIST_RANK = 10
_INNERMOST = 99
_HEADING = re.compile(r"(#{1,6})\s+\S")
_NUMBER = re.compile(r"\s*(?:\*\*|__)?\(?(\d{1,2})(?:[.)]\s+(?=\S)|[.)](?=[A-Za-z*\"“]))")
_BULLET = re.compile(r"\s*(?:([-*+\u2013\u2014])\s+(?=\S)|([•·●◦▪\u2023])\s*(?=\S))")
_BOLD = re.compile(r"(?:\*\*|__)([^*_]{2,80})(?:\*\*|__):?\s*$|(?:\*\*|__)([^*_]{2,80}):(?:\*\*|__)\s*$")
_BRACKET = re.compile(r"\[([A-Z0-9][^\[\].!?]{2,40})\]:?\s*$")
_OUTLINE = re.compile(r"(\d{1,2})\.(\d{1,2})[.)]?\s+[A-Z]")
_UNDERLINE = re.compile(r"(={3,}|-{3,})\s*$")
_ROMAN = re.compile(r"([IVX]{1,4})[.)]\s+\S")
_SERIES = re.compile(
    r"(?:\*\*)?(day|week|month|phase|option|module|lesson|unit|session|slide|part|section|idea|"
    r"tip|method|approach|strategy|example|scenario|level|tier|reason|point|example|step|stage|"
    r"habit|principle|topic|concept|type|feature)\s+(?:\d{1,2}|[IVX]{1,4}|one|two|three|four|five|"
    r"six|seven|"
    r"eight|nine|ten)(?:\s*[-\u2013]\s*\d{1,2})?\s*(?:[:.\-\u2013\u2014(]|\*\*|$)",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"(?:\*\*|__)([^*_]{2,60}?)(?::(?:\*\*|__)|(?:\*\*|__)\s*[:\-\u2013\u2014])\s*\S"
    r"|([A-Z][\w&/'\u2019() -]{1,45}?)(?::| [\u2013\u2014-]) (?=\S)"
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_ORDINAL = re.compile(
    r"(first|second|third|fourth|fifth|sixth)(?:ly)?, |(?:one|another) (?:\w+ ){0,2}?(?:way|"
    r"reason|benefit|advantage|disadvantage|option|approach|strategy|factor|example|possibility|"
    r"method|aspect|challenge|feature|tip|theory|argument|area|"
    r"application|difference) ",
    re.IGNORECASE,
)
_NO_TITLE = re.compile(
    r"\b(?:is|are|was|were|here|here's|following|below|can|could|you|i|we|would|should|will|"
    r"includes?|examples?|notes?|follows|steps?|this|these|that|it|sure|answer|output|input|code|"
    r"usage|result|explanation|important|warning|where|question|subject|dear|re|from|cc|date|ps|"
    r"title|sincerely|"
    r"q|a|http|https)\b",
    re.IGNORECASE,
)
_SMALL = frozenset(re.findall(r"\S+", "a an and as at by for from in into of on or the to vs with your"))


def _title_text(line: str) -> str | None:
    """The text of a line that is nothing but a title, "Title:" or "Title Like This"."""
    text = line.strip()
    words = text.rstrip(":").split()
    if not text or not text[0].isupper() or len(words) > 7 or _NO_TITLE.search(text):
        return None
    if text.endswith(":"):
        return text[:-1] if not re.search(r"[.!?;,\"]", text[:-1]) else None
    titled = all(w[0].isupper() or w in _SMALL or not w[0].isalpha() for w in words)
    return text if titled and not re.search(r"[.!?;:,\"*|=<>]", text) else None


def _plain_marker(index: int, line: _Line, repeated: frozenset[str]) -> _Marker | None:
    """Titles, labels and ordinals: they begin a paragraph without any mark of their own."""
    title = _title_text(line.text)
    if title and (line.opens or line.text.rstrip().endswith(":")) and title not in repeated:
        return _Marker(index, "title", 8, "colon" if line.text.rstrip().endswith(":") else "")
    label = _LABEL.match(line.text) if line.opens else None
    if label:
        name = (label[1] or label[2]).strip()
        if len(name.split()) <= 6 and name not in repeated and not _NO_TITLE.search(name):
            return _Marker(index, "label", 9)
    if line.opens and (matched := _ORDINAL.match(line.text)):
        number = _ORDINALS.index(matched[1].casefold()) if matched[1] else None
        return _Marker(index, "ordinal", _INNERMOST, "counted" if matched[1] else "", number)
    return None


def _marker(index: int, line: _Line, repeated: frozenset[str], below: _Line | None) -> _Marker | None:
    text = line.text
    if line.fenced or line.blank or not re.search(r"\w", text) or text.lstrip().startswith("|"):
        return None
    if matched := _NUMBER.match(text):
        return _Marker(index, "number", _LIST_RANK + line.indent, number=int(matched[1]))
    if matched := _BULLET.match(text):
        return _Marker(index, "bullet", _LIST_RANK + line.indent, matched[1] or matched[2])
    if line.indent:
        return None
    if line.opens and below and (matched := _UNDERLINE.match(below.text)):
        return _Marker(index, "heading", 1 if matched[1].startswith("=") else 2)
    if matched := _OUTLINE.match(text):
        return _Marker(index, "outline", _LIST_RANK, matched[1], int(matched[2]))
    if matched := _HEADING.match(text):
        return _Marker(index, "heading", len(matched[1]))
    if matched := _SERIES.match(text):
        return _Marker(index, "series", 8, matched[1].casefold())
    if (matched := _BOLD.match(text)) and (matched[1] or matched[2]) not in repeated:
        return _Marker(index, "bold", 7)
    if _BRACKET.match(text):
        return _Marker(index, "bracket", 7)
    if _ROMAN.match(text):
        return _Marker(index, "roman", 8)
    return _plain_marker(index, line, repeated)


def _names(lines: Sequence[_Line]) -> Iterator[str]:
    for line in lines:
        if line.fenced or line.blank:
            continue
        if matched := _BOLD.match(line.text):
            yield matched[1] or matched[2]
        elif title := _title_text(line.text):
            yield title
        elif matched := _LABEL.match(line.text):
            yield (matched[1] or matched[2]).strip()


def _markers(lines: Sequence[_Line]) -> list[_Marker]:
    # a name that comes back is a speaker or a field of every item, never a part of its own
    counts = Counter(_names(lines))
    repeated = frozenset(name for name, count in counts.items() if count > 1)
    below = (*lines[1:], None)
    markers = (_marker(i, line, repeated, after) for i, (line, after) in enumerate(zip(lines, below, strict=True)))
    spoken = any(count > 2 for count in counts.values())
    return [m for m in markers if m and not (spoken and m.kind == "label")]


# ---------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True)
class _Run:
    """Sibling parts: where each begins, and the line before which the last one must end."""

    markers: tuple[_Marker, ...]
    bound: int


def _runs(lines: Sequence[_Line], markers: Sequence[_Marker]) -> list[_Run]:
    """All runs of sibling parts, nested ones too."""
    by_line = {marker.line: marker for marker in markers}
    stack: list[list[_Marker]] = []
    finished: list[_Run] = []

    def close(depth: int, bound: int) -> None:
        while len(stack) > depth:
            finished.append(_Run(tuple(stack.pop()), bound))

    for index, line in enumerate(lines):
        marker = by_line.get(index)
        if marker is None:
            close(_depth_of_paragraph(stack, line, lines), index)
            continue
        depth = next((d for d in reversed(range(len(stack))) if marker.follows(stack[d][-1])), None)
        if depth is not None:
            close(depth + 1, index)
            stack[depth].append(marker)
            continue
        close(_depth_of_new(stack, marker), index)
        stack.append([marker])
    close(0, len(lines))
    return finished


def _depth_of_new(stack: Sequence[Sequence[_Marker]], marker: _Marker) -> int:
    for depth, run in enumerate(stack):
        same = run[-1].kind == marker.kind and run[-1].name == marker.name
        if run[-1].rank > marker.rank or (run[-1].rank == marker.rank and same):
            return depth
    return len(stack)


def _depth_of_paragraph(stack: Sequence[Sequence[_Marker]], line: _Line, lines: Sequence[_Line]) -> int:
    """A paragraph of its own ends bullets: only numbers and titles say what they still hold."""
    if not line.opens or line.fenced:
        return len(stack)
    for depth, run in enumerate(stack):
        last = run[-1]
        if last.kind == "bullet" and line.indent <= last.rank - _LIST_RANK:
            head = lines[last.line].text.strip()
            if not head.endswith((":", "**")):
                return depth
    return len(stack)


_CLOSING = re.compile(
    r"\W*(?:in (?:conclusion|summary|short|general|addition|the end)|to (?:conclude|sum|"
    r"summari[sz]e)|overall|ultimately|finally|lastly|remember|these|this|those|i hope|hope|"
    r"let me|please|note|by |with (?:these|this|the right)|it(?:'s| is) (?:important|worth|also|"
    r"always|crucial|essential)|keep in mind|of course|good luck|if you|all of|each of|both|"
    r"as you can|so,|thus|therefore|however|would you|do you|is there|feel free|thank|conclusion|"
    r"summary|in all|when |while |you can also|additionally|also|together|depending|disclaimer|"
    r"sincerely|best|for more|sources?\b|"
    r"references?\b|conclusion|conclusively|there are (?:many|also|other)|for example)",
    re.IGNORECASE,
)


def _blocks(lines: Sequence[_Line], start: int, end: int) -> list[int]:
    """Where each block (paragraph, list, fenced code) between two lines begins."""
    return [
        i for i in range(start, end) if i == start or (lines[i].opens and not (lines[i].fenced and lines[i - 1].fenced))
    ]


def _closes(line: _Line) -> bool:
    """Whether a line begins the closing words of an answer."""
    marked = line.fenced or _BULLET.match(line.text) or _NUMBER.match(line.text)
    return not marked and _CLOSING.match(line.text) is not None


def _last_end(lines: Sequence[_Line], run: _Run) -> int:
    """The line before which the last part ends: it takes the shape of those before it."""
    starts = [m.line for m in run.markers]
    last, kind = starts[-1], run.markers[-1].kind
    spans = list(pairwise(starts))
    most = min((len(_blocks(lines, a, b)) for a, b in spans), default=1)
    single = all(sum(not lines[i].blank for i in range(a, b)) == 1 for a, b in spans)
    indent = lines[last].indent
    paragraphs = 1
    for i in range(last + 1, run.bound):
        line = lines[i]
        if line.blank or line.indent > indent or (line.fenced and lines[i - 1].fenced):
            continue
        closes = _closes(line)
        if not line.opens and (single or closes):
            return i
        paragraphs += line.opens
        if line.opens and (closes or (paragraphs > most and kind != "heading")):
            return i
    return run.bound


# ------------------------------------------------------------------------------ heads and topics


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of the answer. lead: its name, or empty. rest: its text after marker and lead.
    number: of an item of a numbered list."""

    start: int
    end: int
    text: str
    kind: Kind
    lead: str
    rest: str
    number: int | None = None


_LEAD_BOLD = re.compile(r"\s*(?:\*\*|__)(.+?)(?:\*\*|__)\s*[:.\-\u2013\u2014]?\s*")
_LEAD_QUOTED = re.compile(r"\s*[\"“]([^\"“”\n]{2,60})[\"”]\s*(?:[:\-\u2013\u2014]|by\b|\()\s*")
_LEAD_PLAIN = re.compile(r"\s*([^\n:;.!?]{2,70}?)(?::| [-\u2013\u2014])(?=\s)\s*")
_FIRST_LINE = re.compile(r"\s*(.+?)\s*(?:\n|$)")


def _head(text: str, kind: Kind) -> tuple[str, str]:
    """A part's lead and the rest, its own marker left out."""
    body = text
    for pattern in (_NUMBER, _BULLET):
        if kind in ("number", "bullet") and (matched := pattern.match(body)):
            body = body[matched.end() :]
            break
    if kind == "roman":
        body = re.sub(r"^[IVX]+[.)]\s+", "", body)
    if kind == "heading":
        body = re.sub(r"^#+\s+(?:\d+[.)]\s*)?", "", body)
    if kind in ("heading", "bold", "bracket", "title") and (matched := _FIRST_LINE.match(body)):
        return _clean(matched[1]), body[matched.end() :]
    for pattern in (_LEAD_BOLD, _LEAD_QUOTED, _LEAD_PLAIN):
        matched = pattern.match(body)
        if matched and len(matched[1].split()) <= 9:
            return _clean(matched[1]), body[matched.end() :]
    matched = _FIRST_LINE.match(body)
    if matched and body[matched.end() :].strip() and len(matched[1].split()) <= 8:
        return _clean(matched[1]), body[matched.end() :]
    return "", body


def _clean(text: str) -> str:
    """A name without Markdown, links and a number of its own."""
    plain = re.sub(r"<?(?:https?://|www\.)\S+", "", text)
    plain = re.sub(r"\\(?=_)|[*`#\[\]]+|__+|(?<!\w)_|_(?!\w)", "", plain)
    return re.sub(r"^\s*\d{1,2}[.)]\s+", "", plain).strip().rstrip(":").strip()


_STOP = frozenset(
    re.findall(
        r"\S+",
        """
        a about above after all also although am an and another any are as at away be because been
        before being below both but by can cannot could did do does doing don dont cant wont isnt
        doesnt im youre thats theyre weve ive lets down during each either etc even every for from
        get give go had has have having he her here hers him his how however i if in into is it
        its itself just let like lot made make makes making many may me might more most much must
        my no nor not of off on once one only onto or other our ours out over own per put same she
        should so some such take than that the their theirs them then there these they thing
        things this those through to too try under until up upon us use used uses using very via
        was we were what when where whether which while who whom whose why will with within
        without would you your yours yourself don't can't it's you're one's first second third
        fourth fifth firstly secondly thirdly finally lastly next way ways step e.g i.e eg ie vs
        """,
    )
)
_ACRONYMS = frozenset({"IT", "US", "WHO"})
_WORD = re.compile(r"[^\W_][\w'\u2019+#./-]*")
_SERIES_LEAD = re.compile(r"([A-Za-z]+)\s+(\d{1,2}|[IVX]{1,4})\b(?:\s*[-\u2013]\s*\d+)?\W*")


def _words(text: str) -> list[str]:
    words = (re.sub(r"['\u2019]s?$|[./-]+$", "", w) for w in _WORD.findall(_clean(text)))
    return [w.replace("'", "").replace("\u2019", "") for w in words if w]


def _content(text: str) -> list[str]:
    words = _words(text)
    return [w for w in words if not _empty(w) and len(w) > 1]


def _empty(word: str) -> bool:
    """A word that says nothing; IT and US do."""
    return word.casefold() in _STOP and word not in _ACRONYMS


def _phrase(text: str) -> list[str]:
    """The words of a name, without an article before them and words after which it is not at its end."""
    words = _words(text)
    while words and words[0].casefold() in ("a", "an", "the"):
        del words[0]
    while words and _empty(words[-1]) and words[-1] != "A":  # a letter, as in "Vitamin A"
        del words[-1]
    return words


def _topics(part: _Part, common: frozenset[str]) -> Iterator[str]:
    """Topics, the best first. common: words that most parts of the group share."""
    most = MAX_TOPIC_WORDS
    lead, rest = part.lead, part.rest.strip()
    sentence = re.split(r"(?<=[.!?])\s", rest, maxsplit=1)[0]
    if len(_content(sentence)) <= most:
        sentence = rest[:200]
    if matched := _SERIES_LEAD.match(lead):
        series, more = f"{matched[1]} {matched[2]}", _content(lead[matched.end() :] or sentence)
        yield from (f"{series} {word}" for word in more)
        yield series
    words = _phrase(lead)
    if len(words) <= most and not all(map(_empty, words)):
        yield " ".join(words)
    own = list(dict.fromkeys(_content(lead)))
    if own:
        yield from _choices(own, most)
    more = [w for w in _content(sentence) if w.casefold() not in common] or _content(sentence)
    yield from _choices(list(dict.fromkeys(own + more))[:12], most)


def _choices(words: Sequence[str], most: int) -> Iterator[str]:
    yield from (" ".join(words[:n]) for n in range(most, 1, -1))
    yield from (" ".join((*words[: most - 1], word)) for word in words[most:])
    yield from (" ".join(words[i : i + most]) for i in range(1, len(words)))
    yield " ".join(words[:1])


def _usable(topic: str, count_tokens: CountTokens) -> bool:
    """A topic of which at least one word says something, short enough to be decoded whole."""
    words = topic.split()
    speaks = any(len(re.sub(r"\W", "", w)) > 1 and not _empty(w) for w in words)
    letters = any(c.isalpha() for c in topic)
    fits = len(topic) <= 60 and count_tokens(topic) <= MAX_TOPIC_TOKENS
    return bool(words) and clip_topic(topic) == topic and speaks and letters and fits


def _common(parts: Sequence[_Part]) -> frozenset[str]:
    heads = [[w.casefold() for w in _content(p.rest[:200])] for p in parts]
    counts = Counter(w for head in heads for w in set(head))
    openers = Counter(head[0] for head in heads if head)
    often = {w for w, n in counts.items() if n > max(1, len(parts) / 2)}
    return frozenset(often | {w for w, n in openers.items() if n > 2})


# -------------------------------------------------------------------------------- independence

_LEANS_HEAD = re.compile(
    r"\W*(?!(?-i:IT|US)\b)(?:(?:it|they|he|she|him|her|his|their|its|them|this|these|those|that|"
    r"such|then|next|afterwards?|finally|lastly|however|therefore|thus|hence|so|also|in addition|"
    r"additionally|furthermore|moreover|similarly|likewise|meanwhile|instead|consequently|"
    r"as a result|again|but|and|or|on the other hand|by contrast|in contrast|conversely|still|yet|"
    r"besides|otherwise|nevertheless|eventually|now|once|as (?:mentioned|above|before)|"
    r"based on (?:the|this|these)|alternatively|same|in conclusion|overall|in summary|for example|"
    r"for instance|the (?:other|latter|former|rest)|others?|repeat|continue|more|last)\b"
    r"|after (?:that|this|these|which|you|the|completing|finishing|all)\b"
    r"|(?:[\w'-]+ ){1,6}also\b|(?:\w+ ){1,3}then\b)",
    re.IGNORECASE,
)
_LEANS_REST = re.compile(
    r"\W*(?:(?:then|next|finally|however|therefore|thus|hence|after (?:that|this|you)|similarly|"
    r"likewise|once|now|lastly|additionally|moreover|furthermore|as a result|the same|in addition|"
    r"repeat|in conclusion|also)\b)",
    re.IGNORECASE,
)
_LEANS_ANY = re.compile(
    r"\b(?:(?:as|mentioned|described|listed|shown|discussed|noted|outlined|stated|see|given|"
    r"defined|used|created|the|from|points|steps|items) (?:above|earlier|before that|previously)|"
    r"aforementioned|previous(?:ly)? (?:step|section|item|point|example|question|paragraph|answer|"
    r"chapter|method|option|approach|day|week|one|mentioned|created|defined|result|exercise|"
    r"slide)s?|preceding|the (?:resulting|newly|remaining|mixture)|repeat (?:the|this|steps?|"
    r"these)|(?:in|from|of|to|with|see|by|and|steps?) step (?:\d|one|two|three)|steps \d|"
    r"same (?:\w+ )?as (?:above|before|in|the (?:first|previous|last))|this also|these also|"
    r"the (?:first|second|third|previous|last|other) (?:option|method|approach|example|point|step|"
    r"strategy|tip|reason|item|two|three|four|ones|methods|options|approaches)|you(?:'ve|\u2019ve|"
    r" have)? (?:just |previously )?(?:created|installed|wrote|defined|built|chose|identified|"
    r"gathered|collected)|we (?:just|previously|already|have|get|obtain|found|defined|know)|"
    r"(?:all|any|each) of the above|continu(?:ing|ed) from|building on|unlike the|"
    r"like the (?:first|previous|last)|combined with the|once (?:you(?:'ve|\u2019ve| have)|the|that|this|it|they|"
    r"these)|after (?:that|completing)|"
    r"the (?:above|latter|former)|ibid)\b",
    re.IGNORECASE,
)
_SUMMARY = re.compile(
    r"\W*(?:conclusions?|summary|overall|final (?:thoughts|words|verdict|answer)|references|"
    r"sources|bibliography|in (?:conclusion|summary)|wrap[- ]up|putting it|introduction|abstract|"
    r"overview|executive summary|recap|takeaways?|key takeaways?|closing|sincerely|signature|"
    r"acknowledg\w+|"
    r"title|subject|disclaimer|final|result|recommendations?|discussion)\b",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"\d\s*[=*/^\u00d7\u00f7]\s*[\d(a-z]|[a-z)]\s*=\s*[-(\d]|\\(?:frac|sqrt|sum|int|cdot|times|"
    r"left)\b|\\\[|\$\$|\bsubstitut|\bwe (?:get|obtain|have|can (?:now|then))\b|"
    r"\bso,? the (?:answer|total|probability)\b",
    re.IGNORECASE,
)
_FICTION = re.compile(
    r"\b(?:verse|chorus|bridge|outro|refrain|stanza|pre-chorus|scene|act|chapter|episode|prologue|"
    r"epilogue|int\.|ext\.|hook|round|interviewer|narrator|player|user|assistant|turn)\b",
    re.IGNORECASE,
)
_TALE = re.compile(
    r"\b(?:story|poem|lyrics|song|rap|script|dialogue|conversation|screenplay|novel|letter|e-?mail|"
    r"sonnet|haiku|limerick|speech|monologue|play|scene|fan ?fic\w*|narrative|roleplay|debate|"
    r"interview|character|joke|fairy ?tale|quest|adventure)\b",
    re.IGNORECASE,
)
_PROCEDURE = re.compile(
    r"\b(?:steps?|procedure|instructions?|how (?:to|do|can|would|should)|recipe|tutorial|"
    r"walk ?through|"
    r"algorithm|solve|calculate|compute|derive|prove|proof|guide me)\b",
    re.IGNORECASE,
)
_WORKING = re.compile(r"\b(?:process|workflow|set(?:ting)? up|install\w*|configur\w+|implement\w*)\b")
_GOAL = re.compile(r"To [a-z]+ (?!.*\b(?:consider|could|can|may|might|should|include)\b)")
_BEGINS = re.compile(r"\W*(?:first(?:ly)?,|(?:start|begin)(?:ning|ing)? (?:with|by))", re.IGNORECASE)
_ASSORTED = re.compile(
    r"\b(?:ways|tips|options|reasons|things|ideas|examples|suggestions|questions|factors|benefits|"
    r"strategies|features|advantages|disadvantages|methods|types|possibilities|recommendations|"
    r"characteristics|aspects|causes|differences|similarities|resources|topics|titles|applications)\b",
    re.IGNORECASE,
)
_HANDS = re.compile(
    r"\b(?:click|tap|select|menu|button|dialog|drag|double-click|right-click|terminal|"
    r"command line|preheat|oven|skillet|simmer|tablespoons?|teaspoons?|tbsp|tsp|whisk|stir|dough|"
    r"batter|saucepan|"
    r"install|npm|pip|import|function|variable|loop|return|screw|drill|glue)\b",
    re.IGNORECASE,
)
_FIELD = re.compile(
    r"(?:(?:full |first |last |character )?name|age|gender|race|occupation|background|backstory|"
    r"appearance|personality|setting|plot|characters?|protagonist|antagonist|premise|twist|"
    r"logline|pre-?conditions?|(?:test )?steps|expected (?:results?|outcome)|actual results?|fix|"
    r"vulnerability|issue|problem|solution|root cause|cause|resolution|diagnosis|symptoms?|"
    r"hypothesis|thesis(?: statement)?|claim|proof|given|ingredients|directions|instructions|"
    r"materials|method(?:ology|s)?|results|procedure|set-?up|punchline|questions?|answers?|input|"
    r"output|"
    r"topic|dataset|rationale|objective|headline|situation|task|action|explanation|translation|original|corrected|step)\W*$",
    re.IGNORECASE,
)
_AGREEING = re.compile(r"\b(?:itinerar\w+|biograph\w+|bio|memoir|obituary|eulogy)\b", re.IGNORECASE)
"""What is asked for where parts share what none of their names tells."""
_COUNTED = re.compile(r"(?:day|week|month|session|lesson|part)s?\s+\w+(?:\s*[-\u2013]\s*\w+)?\W*$", re.IGNORECASE)
"""A name that only counts: its content depends on that of the ones before it."""
_CHOICE = re.compile(r"\b(?:method|option|approach|using|solution|alternative|way)\b", re.IGNORECASE)
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")
_LISTS: frozenset[Kind] = frozenset({"number", "bullet"})


def _leans(part: _Part) -> bool:
    """Whether a part refers to one before it, or sums up."""
    start = f"{part.lead}: {part.rest}" if part.lead else part.rest
    if _SUMMARY.match(part.lead or part.rest) or _LEANS_HEAD.match(start):
        return True
    if part.lead and _LEANS_REST.match(part.rest):
        return True
    if part.kind == "series" and _SUMMARY.match(part.rest):
        return True
    return bool(_LEANS_ANY.search(part.text))


def _explained(part: _Part) -> bool:
    return bool(part.lead) and len(part.rest.split()) >= 10


def _share(parts: Sequence[_Part], pattern: re.Pattern[str]) -> float:
    return sum(bool(pattern.search(part.text)) for part in parts) / len(parts)


def _coded(parts: Sequence[_Part]) -> bool:
    """Code in several parts: a later one may use what an earlier one defined."""
    if sum("```" in p.text or "~~~" in p.text for p in parts) < 2:
        return False
    return not all(_CHOICE.search(p.lead) for p in parts)


def _stepwise(parts: Sequence[_Part], before: str, prompt: str) -> bool:
    """Steps that are only instructions; steps with a name and an explanation stand on their own."""
    if parts[0].kind == "series" and parts[0].lead.casefold().startswith(("step", "stage")):
        return True
    if parts[0].kind in _LISTS and _BEGINS.match(parts[0].rest) and not parts[0].lead:
        return True
    opening = before.strip().rpartition("\n")[2]
    procedure = _PROCEDURE.search(opening) or _WORKING.search(opening) or _GOAL.match(opening)
    if not (procedure or _PROCEDURE.search(prompt)):
        return False
    if _share(parts, _HANDS) >= CLOSED_SHARE:
        return True
    assorted = not procedure and _ASSORTED.search(opening)
    return not assorted and not all(_explained(p) for p in parts)


def _invented(parts: Sequence[_Part], before: str, prompt: str) -> bool:
    """A name that one part brings up and others take up: they share what only the first made."""
    if parts[0].kind in (*_LISTS, "series") and not _TALE.search(prompt):
        return False
    given_text = f"{prompt}\n{before}".casefold()
    counts = Counter(name for part in parts for name in set(_NAME.findall(part.rest)))
    limit = max(1, len(parts) * 0.4)
    return any(n > limit and name.casefold() not in given_text for name, n in counts.items())


def _narrated(parts: Sequence[_Part], prompt: str) -> bool:
    """Parts of a story, a song, a letter or a conversation."""
    if _share(parts, _FICTION) and any(_FICTION.match(p.lead) for p in parts):
        return True
    return parts[0].kind not in (*_LISTS, "series") and _TALE.search(prompt) is not None


def _record(parts: Sequence[_Part]) -> bool:
    """Fields of one record, such as an invented person or a worked problem: they depend on the first."""
    fields = sum(bool(_FIELD.match(p.lead)) for p in parts)
    return fields > 1 or bool(re.match(r"(?:\w+ )?names?$", parts[0].lead, re.IGNORECASE))


def _independent(parts: Sequence[_Part], before: str, prompt: str) -> bool:
    """Whether the parts as a group may be written apart from each other."""
    leads = Counter(p.lead.casefold() for p in parts if p.lead)
    if (leads and max(leads.values()) > 1) or _record(parts):
        return False
    if _share(parts, _MATH) >= 0.25 or _coded(parts) or _narrated(parts, prompt):
        return False
    if any(p.text.count("\n") >= 40 for p in parts):
        return False
    if _AGREEING.search(prompt) or sum(bool(_COUNTED.match(p.text.split("\n", 1)[0])) for p in parts) > 1:
        return False
    return not _stepwise(parts, before[-300:], prompt[-600:]) and not _invented(parts, before, prompt)


# -------------------------------------------------------------------------------------- groups


@dataclass(frozen=True, slots=True)
class _Group:
    """Adjacent parts that will be promised. saved: tokens that its longest chain is shorter."""

    parts: tuple[_Part, ...]
    promises: tuple[Promise, ...]
    saved: int

    @property
    def start(self) -> int:
        return self.parts[0].start

    @property
    def end(self) -> int:
        return self.parts[-1].end


def _parts(response: str, lines: Sequence[_Line], run: _Run) -> list[_Part]:
    starts = [m.line for m in run.markers] + [_last_end(lines, run)]
    offsets = [lines[i].start if i < len(lines) else len(response) for i in starts]
    parts = []
    kind, numbers = run.markers[0].kind, [m.number for m in run.markers]
    counts = kind == "number" and len(set(numbers)) == len(numbers)  # Markdown also numbers every item 1
    for (start, end), number in zip(pairwise(offsets), numbers, strict=True):
        lead, rest = _head(response[start:end], kind)
        parts.append(_Part(start, end, response[start:end], kind, lead, rest, number if counts else None))
    if _bare(parts[-1]) and not any(map(_bare, parts[:-1])):
        parts.pop()
    return _named_apart(parts)


def _bare(part: _Part) -> bool:
    """Whether a part is one line; where its siblings are more, its text was not recognised."""
    return "\n" not in part.text.strip()


def _named_apart(parts: list[_Part]) -> list[_Part]:
    """Parts whose leads are all one word ("Test case: ...") are named by what follows it."""
    if len(parts) < 2 or not parts[0].lead or len({p.lead.casefold() for p in parts}) > 1:
        return parts
    heads = [_head(p.rest, "label") for p in parts]
    return [replace(p, lead=lead, rest=rest) for p, (lead, rest) in zip(parts, heads, strict=True)]


def _stretches(parts: Sequence[_Part], count_tokens: CountTokens) -> Iterator[list[_Part]]:
    """Runs of at least two parts that lean on none of their siblings, at most MAX_GROUP long."""
    current: list[_Part] = []
    runs: list[list[_Part]] = []
    for part in parts:
        leans = bool(part is not parts[0] and _leans(part)) or bool(_SUMMARY.match(part.lead))
        if leans or count_tokens(part.text) > MAX_LENGTH or not part.rest.strip() + part.lead:
            runs.append(current)
            current = []
        else:
            current.append(part)
    runs.append(current)
    for run in runs:
        pieces = -(-len(run) // MAX_GROUP) or 1
        size = -(-len(run) // pieces) or 1
        yield from (run[i : i + size] for i in range(0, len(run), size) if len(run) - i >= 2)


def _promises(parts: Sequence[_Part], count_tokens: CountTokens) -> tuple[Promise, ...] | None:
    """Promises with distinct topics, or None where a part has none left.

    The topic of a numbered item begins with its number, so that the chunk need not count its siblings; it is not one of
    the topic's words.
    """
    common, topics_used, promises = _common(parts), set[str](), []
    for part in parts:
        number = "" if part.number is None else f"{part.number}. "
        topic = next(
            (
                f"{number}{t}"
                for t in _topics(part, common)
                if topic_key(t) not in topics_used and _usable(f"{number}{t}", count_tokens)
            ),
            None,
        )
        if topic is None:
            return None
        topics_used.add(topic_key(topic))
        promises.append(Promise(topic, round_length(count_tokens(part.text))))
    return tuple(promises)


def _group(parts: Sequence[_Part], count_tokens: CountTokens) -> _Group | None:
    promises = _promises(parts, count_tokens)
    if promises is None:
        return None
    plain = sum(count_tokens(p.text) for p in parts)
    nodes = tuple(_nodes(promises, parts))
    chain = critical_path((*nodes, Sync()), count_tokens)
    worth = chain < WORTH * plain and plain >= MIN_MEAN_TOKENS * len(parts)
    return _Group(tuple(parts), promises, plain - chain) if worth else None


def _nodes(promises: Sequence[Promise], parts: Sequence[_Part]) -> Iterator[Node]:
    for promise, part in zip(promises, parts, strict=True):
        yield promise
        yield Async((Text(part.text),))


@dataclass(frozen=True, slots=True)
class _Judged:
    """A run of parts. groups: those to promise. alone: it is left to one thread for a reason: its parts depend on each
    other as a group, or are too short."""

    groups: tuple[_Group, ...] = ()
    alone: bool = False


def _judged(response: str, count_tokens: CountTokens, prompt: str) -> Iterator[_Judged]:
    lines = _lines(response)
    for run in _runs(lines, _markers(lines)):
        if len(run.markers) < 2:
            continue
        parts = _parts(response, lines, run)
        if not _independent(parts, response[: parts[0].start], prompt):
            yield _Judged(alone=True)
            continue
        short = sum(count_tokens(part.text) for part in parts) < MIN_MEAN_TOKENS * len(parts)
        stretches = [s for s in _stretches(parts, count_tokens) if len(s) >= 2]
        enough = sum(map(len, stretches)) >= (1 - CLOSED_SHARE) * len(parts)
        yield _Judged(tuple(g for s in stretches if enough and (g := _group(s, count_tokens))), short)


def _chosen(groups: Sequence[_Group]) -> list[_Group]:
    """The groups that save most without overlapping: weighted interval scheduling."""
    ordered = sorted(groups, key=lambda g: g.end)
    best: list[tuple[int, list[_Group]]] = [(0, [])]
    for i, group in enumerate(ordered):
        before = max(j for j in range(i + 1) if j == 0 or ordered[j - 1].end <= group.start)
        saved, groups_so_far = best[before]
        with_group = (saved + group.saved, [*groups_so_far, group])
        best.append(max(best[-1], with_group, key=lambda b: b[0]))
    return best[-1][1]


def critical_path(document: Document, count_tokens: CountTokens) -> int:
    """Tokens on the longest chain of a document without nested chunks, tags counted."""
    depth, ends = 0, [0]
    for node in document:
        if isinstance(node, Text):
            depth += count_tokens(node.text)
        elif isinstance(node, Promise):
            depth += PROMISE_TAGS + count_tokens(node.topic) + count_tokens(str(node.tokens))
        elif isinstance(node, Async):
            ends.append(depth + CHUNK_TAGS + count_tokens(strip(node.body)))
        else:
            depth = max(depth, *ends) + 1
    return max(depth, *ends)


# ------------------------------------------------------------------------------------- annotate


def annotate(response: str, count_tokens: CountTokens, *, prompt: str = "") -> Document:
    """The response with its independent parts promised; plain text where it has none.

    count_tokens: tokens of a text under the model's base vocabulary. prompt: what was asked, where
    it is known: it tells stories and procedures, and which names the parts did not make up.
    """
    nodes: list[Node] = []
    at, topics = 0, list[str]()
    groups = [group for run in _judged(response, count_tokens, prompt) for group in run.groups]
    for group in _chosen(groups):
        between = response[at : group.start]
        joined = topics + [topic_key(p.topic) for p in group.promises]
        if topics and not _leads_on(between, joined):
            nodes.append(Sync())
            joined = joined[len(topics) :]
        if between:
            nodes.append(Text(between))
        nodes += _nodes(group.promises, group.parts)
        at, topics = group.end, joined
    if rest := response[at:]:
        nodes += [Sync(), Text(rest)] if topics else [Text(rest)]
    return tuple(nodes)


def for_one_thread(response: str, count_tokens: CountTokens, *, prompt: str = "") -> bool:
    """Whether a response has lists or sections that one thread should write: each depends on itself as a group (steps,
    a derivation, a story), or has parts too short for a promise. False if it has none, or one that is left alone only
    because single parts lean on others, or because the rules do not recognise it.

    Such an answer shows when not to fork.
    """
    judged = list(_judged(response, count_tokens, prompt))
    return bool(judged) and all(run.alone and not run.groups for run in judged)


def _leads_on(between: str, topics: Sequence[str]) -> bool:
    """Whether the text between two groups is only the title of the second, so that they are one."""
    if len(set(topics)) < len(topics) or len(topics) > MAX_GROUP:
        return False
    lines = [line for line in _lines(between) if not line.blank]
    titles = (_HEADING.match(x.text) or _BOLD.match(x.text) or _title_text(x.text) for x in lines)
    return bool(lines) and len(lines) <= 2 and all(titles) and not _LEANS_HEAD.match(between)
