"""Grammars of values: what a thread may write next, by llguidance, and the shortest way to an end.

A value is followed by a comma, which is part of its grammar, so that a number can end. The last value of an answer is
followed by the model's end token or by nothing. No text is read by an engine: a mask is a bit for each token.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import CapabilityError, RequestError
from pastalm.structured import numbers
from pastalm.structured.matches import short
from pastalm.structured.plan import Leaf
from pastalm.structured.schemas import hidden, parts, scalars, takes_other_keys

FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
SHORT_ESCAPES = {"json_allowed_escapes": 'nrbtf\\"'}
"""Without \\u: every text has one spelling, so a key cannot be spelled as another one."""
_LONG = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")
"""Characters that JSON spells with \\u only."""
COMMA = ","
KEPT = 256
"""Compiled grammars that are kept."""
MOST_BYTES = 4096
"""Of the shortest way to an end."""
MOST_ITEMS = 20_000
"""Of a row of llguidance's parser: an object with some thousands of fields that may all be left out."""
SECONDS = 2.0
"""A way to an end is looked for no longer: a schema may have none, as an object that requires one of its own kind."""
_UNKNOWN = re.compile(r'Unimplemented keys: \[(".*?")\]')
STATES = 64
"""How many states the search for an end looks at."""
ALIKE = 4
"""How many ways through the same states the search follows, of different lengths within those left behind: they may
differ in what must come yet."""
AHEAD = 3
"""So many bytes that are certain mean that a part of the value has been left behind."""
_FIRST = b'"}],0123456789ntfaA@.-:/_ TZ+{[('
"""What most often leads to an end soon."""


class Value:
    """One value while it is written.

    text: all of it so far, as JSON, without what follows it.
    """

    def __init__(self, grammars: Grammars, compiled: Any, tail: str, schema: str = "") -> None:
        self._grammars, self._compiled, self._tail, self._schema = grammars, compiled, tail, schema
        self._matcher = compiled.deep_copy()
        self._bytes = b""

    def fork(self) -> Self:
        """The same value, to be written on apart."""
        value = type(self)(self._grammars, self._compiled, self._tail, self._schema)
        value._matcher, value._bytes = self._matcher.deep_copy(), self._bytes
        return value

    @property
    def ended(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """Why its grammar cannot go on, in one line, if it cannot."""
        return str(self._matcher.get_error()).strip().partition("\n")[0].partition(";")[0]

    @property
    def text(self) -> bytes:
        return self._bytes.removesuffix(self._tail.encode()) if self._tail and self.ended else self._bytes

    def write(self, token: int) -> bool:
        """Takes a token. False, and nothing changes, if the grammar does not have it."""
        return self._take(self._grammars.ids(token), self._grammars.piece(token))

    def _take(self, ids: Sequence[int], text: bytes) -> bool:
        if not ids or self._matcher.validate_tokens(ids) < len(ids):
            return False
        self._matcher.try_consume_tokens(ids)
        self._bytes += text
        return True

    def take_back(self, tokens: Sequence[int]) -> None:
        """Takes its last tokens back."""
        self._matcher.rollback(len(tokens))
        self._bytes = self._bytes[: len(self._bytes) - sum(len(self._grammars.piece(token)) for token in tokens)]

    def certain(self) -> list[int]:
        """Takes all that only one continuation leaves open, and returns its tokens."""
        taken: list[int] = []
        while not self.ended and (text := self._matcher.compute_ff_bytes()):
            tokens = list(self._matcher.compute_ff_tokens()) or self._spelled(text)
            if not tokens or not all(map(self.write, tokens)):
                break
            taken += tokens
        return taken

    def _spelled(self, text: bytes) -> list[int]:
        """Tokens of bytes that are certain, where the next ones may belong to the same token: only at a value's end."""
        return self._grammars.encode(text) if self._tail and text.endswith(self._tail.encode()) else []

    def begin(self) -> bytes:
        """Takes the bytes with which the value begins in any case, and returns them."""
        text = bytes(self._matcher.compute_ff_bytes())
        for token in self._grammars.encode(text):
            self.write(token)
        return text

    def mask(self) -> NDArray[np.bool_]:
        """[vocabulary]: which tokens may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._grammars.size, bitorder="little").view(np.bool_)

    def ending(self) -> list[int]:
        """Tokens that end the value soon; it is not changed. Empty if it has ended, or if no end is found."""
        key = (self._compiled, self._matcher.compute_bitmask())
        if self._ends_by(known := self._grammars.endings.get(key, [])):
            return known
        value, text = self.fork(), b""
        until = time.monotonic() + SECONDS
        while not value.may_end:
            way, loop = value._way_out(until)
            way = way or value._run(*loop, until)
            if not way or len(text) > MOST_BYTES or time.monotonic() > until or not value._spell(way):
                return []
            text += way
        tokens = self._grammars.encode(text)
        tokens = tokens if self._ends_by(tokens) else self._grammars.spell(text)
        if len(self._grammars.endings) >= KEPT:
            self._grammars.endings.clear()
        self._grammars.endings[key] = tokens
        return tokens

    def _ends_by(self, tokens: Sequence[int]) -> bool:
        value = self.fork()
        return bool(tokens) and all(map(value.write, tokens)) and value.may_end

    @property
    def may_end(self) -> bool:
        """Whether it is whole as it stands."""
        return self.ended or (not self._tail and bool(self._matcher.is_accepting()))

    def _spell(self, text: bytes) -> bool:
        """Takes bytes; whether the grammar has them."""
        known = bytes(byte for byte in text if byte in self._grammars.bytes)
        return not known or self._take([self._grammars.bytes[byte] for byte in known], known)

    def _usable(self, among: bytes) -> bytes:
        """Those of some bytes that may come next."""
        allowed, tokens = self.mask(), self._grammars.bytes
        return bytes(byte for byte in among if byte in tokens and allowed[tokens[byte]] and byte != ord("\\"))

    def _run(self, before: bytes, unit: bytes, until: float) -> bytes:
        """`before`, then a unit as often as it takes until an end is near, in doubling steps: a length that must be
        reached, of a text or an array."""
        count = 1
        while unit and count * len(unit) <= MOST_BYTES:
            value, run = self.fork(), before + count * unit
            if not value._spell(run):
                return before + count // 2 * unit
            if value._way_out(until)[0]:
                return run
            count *= 2
        return b""

    def _way_out(self, until: float) -> tuple[bytes, tuple[bytes, bytes]]:
        """The fewest bytes to an end, or out of a part of the value; empty if there is none near, or none is found
        before `until`. And a way back to a state in which the same may come next: the bytes before it, and those that
        lead to it again."""
        if _quotes(self._bytes) % 2 and (way := self._matched()):  # within a text
            return way, (b"", b"")
        way, loop = self._search(_FIRST, until)
        if way:
            return way, loop
        way, found = self._search(bytes(self._grammars.bytes), until)
        return way, loop if loop[1] else found

    def _matched(self) -> bytes:
        """A way out of a text by the end of what its pattern matches: masks do not tell how much of it is there."""
        for match in self._grammars.matches(self._schema):
            for begin in range(len(match), -1, -1):
                value, way = self.fork(), match[begin:] + b'"'
                if value._spell(way):
                    return way
        return b""

    def _search(self, usable: bytes, until: float) -> tuple[bytes, tuple[bytes, bytes]]:
        """`_way_out` by some bytes only."""
        begin = self._matcher.compute_bitmask()
        frontier: list[tuple[Value, bytes, tuple[bytes, ...], tuple[int, ...]]] = [(self, b"", (begin,), (0,))]
        loop, first, deeper = (b"", b""), {begin: b""}, b""
        within = _quotes(self._bytes)
        lengths: dict[tuple[bytes, ...], dict[tuple[int, ...], set[int]]] = {}
        for _ in range(STATES):
            if not frontier or time.monotonic() > until:
                break
            value, way, states, runs = frontier.pop(0)
            for byte in value._usable(usable):
                ahead, text = value.fork(), way + bytes([byte])
                if not ahead._spell(text[-1:]):
                    continue
                certain = 0
                while not ahead.ended and (sure := ahead._matcher.compute_ff_bytes()) and ahead._spell(sure):
                    text, certain = text + sure, certain + len(sure)
                state = ahead._matcher.compute_bitmask()
                closes = byte in b"}]" and not (within + way.count(b'"')) % 2
                if ahead.may_end or closes or (certain >= AHEAD and not _opens(text[-certain:])):
                    return text, loop
                if certain >= AHEAD and not deeper:
                    deeper = text
                stays, longer = state == states[-1], len(text) - len(way)
                through = states if stays else (*states, state)
                within_each = (*runs[:-1], runs[-1] + longer) if stays else (*runs, longer)
                alike = lengths.setdefault(through, {})
                last = alike.setdefault(within_each[:-1], set()) if len(alike) < ALIKE else alike.get(within_each[:-1])
                if last is not None and within_each[-1] not in last:
                    last.add(within_each[-1])
                    frontier.append((ahead, text, through, within_each))
                before = first.setdefault(state, text)
                if text.startswith(before) and len(text) > max(len(before), len(loop[0] + loop[1])):
                    loop = before, text.removeprefix(before)
        return deeper, loop


class Grammars:
    """The grammars of one model's tokens.

    size: number of units that the grammars are written in: tokens. bytes: those of a single byte, by byte.
    endings: ways out of values that were found, by grammar and by what may come next.

    Raises CapabilityError if llguidance is not installed, or the model's tokens are unknown.
    """

    form: Mapping[str, Any] = FORM
    value_type: type[Value] = Value

    def __init__(self, vocabulary: Vocabulary) -> None:
        try:
            import llguidance
        except ImportError:
            raise CapabilityError("structured output needs llguidance: pip install 'llguidance>=1.9'") from None
        self.vocabulary = vocabulary
        self._llguidance = llguidance
        pieces, ends, encode = self._units()
        self.size = len(pieces)
        self.bytes: dict[int, int] = {}
        for token, piece in enumerate(pieces):
            if len(piece) == 1:
                self.bytes.setdefault(piece[0], token)
        self.bytes = {b: self.bytes[b] for b in dict.fromkeys([*_FIRST, *sorted(self.bytes)]) if b in self.bytes}
        self.endings: dict[tuple[Any, bytes], list[int]] = {}
        source = _Source(pieces, ends[0], encode)
        self._tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(source), eos_token=ends)
        self._limits = llguidance.LLParserLimits(max_items_in_row=MOST_ITEMS)
        self._compiled = lru_cache(KEPT)(self._compile)
        self._fewest = lru_cache(KEPT)(self._count_fewest)
        self.matches = lru_cache(KEPT)(self._short_matches)

    def _units(self) -> tuple[list[bytes], list[int], Callable[[bytes | str], list[int]]]:
        """What the grammars are written in: the bytes of each unit, the units that end a text, the units of a text."""
        if self.vocabulary.size > 2**31:
            raise CapabilityError("structured output needs the model's tokens: give its tokenizer")
        self._pieces = [self.vocabulary.piece(i) for i in range(self.vocabulary.size)]
        return self._pieces, sorted(self.vocabulary.eos) or [0], self.encode

    def ids(self, token: int) -> Sequence[int]:
        """The units of a token of the model: the token."""
        return (token,)

    def piece(self, token: int) -> bytes:
        """The bytes of a token of the model."""
        return self._pieces[token]

    def encode(self, text: bytes | str) -> list[int]:
        """Tokens of a text; bytes that are no text are spelled one by one."""
        try:
            words = text if isinstance(text, str) else text.decode()
        except UnicodeDecodeError:
            assert isinstance(text, bytes)
            return self.spell(text)
        return list(self.vocabulary.encode(words)) if words else []

    def spell(self, text: bytes) -> list[int]:
        """Tokens of single bytes, where the vocabulary has them."""
        return [self.bytes[byte] for byte in text if byte in self.bytes]

    def value(self, leaf: Leaf, tail: str, head: str = "") -> Value:
        """A value of a leaf that begins. head, tail: what stands before and behind it.

        Raises RequestError if its schema cannot be held.
        """
        schema = json.dumps(leaf.schema)
        return self.value_type(self, self._compiled(schema, leaf.optional, head, tail), tail, schema)

    def literals(self, texts: Sequence[str], tail: str) -> Value:
        """One of some texts, given as JSON."""
        rule = " | ".join(map(json.dumps, texts))
        return self.value_type(self, self._matcher(f"%llguidance {{}}\nstart: ({rule}) {json.dumps(tail)}"), tail)

    def fewest(self, leaf: Leaf) -> int:
        """Tokens of a short value of a leaf: about the fewest that are enough. Raises RequestError if there is none."""
        return self._fewest(json.dumps(leaf.schema), leaf.optional)

    def _count_fewest(self, schema: str, optional: bool) -> int:
        value = self.value(Leaf(json.loads(schema), optional), COMMA)
        begun = self.encode(value.begin())
        tokens = value.ending()
        if problem := value.error:
            raise RequestError(f"the schema cannot be held: {problem}")
        if not tokens and not (value.ended and value.text):
            raise RequestError("the schema cannot be held: no short value of it was found")
        return len(begun) + len(tokens)

    def _short_matches(self, schema: str) -> tuple[bytes, ...]:
        """Short texts that the patterns of a schema match, as they stand in JSON."""
        patterns = {part.get("pattern") for _, part in parts(json.loads(schema or "{}"))}
        matches = [self._short_match(pattern) for pattern in patterns if isinstance(pattern, str)]
        return tuple(sorted(filter(None, matches)))

    def _short_match(self, pattern: str) -> bytes:
        """What is read off the pattern; if that is wrong, for it is written as llguidance reads it, what is found by
        search, where it may stand anywhere in a text."""
        text = json.dumps(short(pattern), ensure_ascii=False)[1:-1].encode()
        try:
            if self._string(pattern)._spell(b'"' + text + b'"'):
                return text
            if pattern.startswith("^"):
                return b""
            value = self._string(f"^(?:{pattern.removesuffix('$')})$")
        except RequestError:
            return b""
        found = value.begin() + b"".join(map(self.piece, value.ending()))
        return found.removeprefix(b'"').removesuffix(b'"')

    def _string(self, pattern: str) -> Value:
        return self.value(Leaf({"type": "string", "pattern": pattern}), "")

    def _compile(self, schema: str, optional: bool, head: str, tail: str) -> Any:
        parsed = json.loads(schema)
        if parsed is False:
            raise RequestError("the schema cannot be held: false admits no value")
        parsed = {} if parsed is True else parsed
        form = {**self.form, **_escapes(parsed)}
        value = '(value | "null")' if optional else "value"
        around = [json.dumps(head) if head else "", value, json.dumps(tail) if tail else ""]

        def matcher(of: Mapping[str, Any]) -> Any:
            rule = "%json " + json.dumps({**of, "x-guidance": form})
            return self._matcher(f"%llguidance {{}}\nstart: {' '.join(around)}\nvalue: {rule}\n", parsed)

        try:
            return matcher(numbers.bounded(parsed))
        except RequestError:  # llguidance cannot intersect two parts that take any value
            return matcher(parsed)

    def _matcher(self, grammar: str, schema: Any = None) -> Any:
        matcher = self._llguidance.LLMatcher(self._tokens, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise RequestError(f"the schema cannot be held: {_reason(matcher.get_error(), schema)}")
        return matcher


class _Source:
    """The vocabulary as llguidance wants it."""

    def __init__(self, pieces: list[bytes], end: int, encode: Callable[[bytes | str], list[int]]) -> None:
        self.tokens, self.eos_token_id, self.bos_token_id = pieces, end, None
        self.special_token_ids = [i for i, piece in enumerate(pieces) if not piece]
        self._encode = encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text)


def _quotes(text: bytes) -> int:
    """The quotation marks in some JSON that begin and end texts."""
    return re.sub(rb"\\.", b"", text).count(b'"')


def _opens(text: bytes) -> bool:
    """Whether some JSON opens an object or an array."""
    return b"{" in text or b"[" in text


def _escapes(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Which escapes the texts of a schema may have, where its objects have keys that it does not name.

    Raises RequestError for a constant that needs others.
    """
    seen = dict(parts(schema, hidden(schema)))
    if not any(map(takes_other_keys, seen.values())):
        return {}
    for at, part in seen.items():
        for keyword in ("const", "enum"):
            if any(_LONG.search(text) for text in scalars(part.get(keyword)) if isinstance(text, str)):
                why = (
                    "a control character in it does not go with an object of open keys: say additionalProperties false"
                )
                raise RequestError(f"the schema cannot be held: {keyword} at {at} is not supported: {why}")
    return SHORT_ESCAPES


def _reason(error: str, schema: Any) -> str:
    """An error of llguidance in one line, with the place of the keyword that it names."""
    line = error.strip().splitlines()[0]
    line = line.partition("failed to compile JSON schema: ")[2] or line
    if unknown := _UNKNOWN.search(line):
        names = [name.strip().strip('"') for name in unknown[1].split(",")]
        places = [f"{name} at {next(_places(schema, name), '#')}" for name in names]
        return f"{' and '.join(places)} is not supported"
    if line.startswith("oneOf"):
        place = next(_places(schema, "oneOf"), "#")
        return f"the alternatives of oneOf at {place} may overlap: use anyOf"
    return line


def _places(schema: Any, keyword: str) -> Iterator[str]:
    """JSON pointers of a schema's parts that have a keyword."""
    return (at for at, part in parts(schema) if keyword in part)
