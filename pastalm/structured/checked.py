"""Structured answers of an engine that cannot be masked: what a thread writes is checked, and asked for again.

A completions server has no masks. Its own guided decoding, where it has it, gets the form of each value (guides.py).
Whether it has it or not, every piece that it sends is checked:

    a piece that fits            is taken
    one that goes beyond         its part up to where the value is whole is taken, and the value ends
    one that does not fit        is not taken; the completion is asked for again from what the thread has
    after TRIES of these         the value is led out the shortest way (`length`), as at the end of its budget

The grammars are written in bytes: a server that says text has no table of tokens.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from pastalm.core.events import Event, FinishReason, Joined, Path, SampledToken
from pastalm.core.interpreter import Limits
from pastalm.core.params import SamplingParams
from pastalm.structured.grammar import Grammars, Value
from pastalm.structured.guides import Guide, one_of, rest_of, whole
from pastalm.structured.interpreter import FieldInterpreter, FieldThread
from pastalm.structured.plan import Choice, Counted, Leaf, Node

TRIES = 4
"""How often the completions of one value are asked for again before it is led out."""
_SPACES = b" \t\r\n"
_NUMBER = re.compile(rb"\s*([0-9]+)")


class CheckedValue(Value):
    """A value of which text comes in pieces that no mask has seen. Spaces before it are not of it.

    whole: what came next was not of it any more.
    """

    whole = False

    def fork(self) -> Self:
        value = super().fork()
        value.whole = self.whole
        return value

    @property
    def ended(self) -> bool:
        return self.whole or super().ended

    def write(self, token: int) -> bool:
        piece = self._grammars.piece(token)
        text = piece if self._bytes else piece.lstrip(_SPACES)
        return bool(piece) and (not text or self._take(list(text), text))

    def take(self, token: int) -> list[int] | None:
        """Takes a token and what certainly ends the value behind it, or the longest part of the token behind which the
        value is whole. Returns the tokens. None, and nothing changes, if neither fits."""
        if self.write(token):
            return [token, *self._closing()]
        piece = self._grammars.piece(token)
        text = piece if self._bytes else piece.lstrip(_SPACES)
        for length in range(self._matcher.validate_tokens(list(text)), -1, -1):
            part, value = text[:length], self.fork()
            if (not part or value._take(list(part), part)) and value.may_end:
                self._spell(part)
                self.whole = True
                return self._grammars.encode(part)
        return None

    def _closing(self) -> list[int]:
        """Takes what is certain, if it ends the value."""
        text, value = self._matcher.compute_ff_bytes(), self.fork()
        if not text or not value._spell(text) or not value.ended:
            return []
        self._spell(text)
        return self._grammars.encode(text)


class ByteGrammars(Grammars):
    """Grammars over bytes, for any vocabulary, also one whose tokens are any pieces of text.

    JSON has any spaces: how a server's own guided decoding sets them is its matter.
    """

    form: Mapping[str, Any] = {"whitespace_flexible": True}
    value_type = CheckedValue

    def _units(self) -> tuple[list[bytes], list[int], Callable[[bytes | str], list[int]]]:
        return (
            [*(bytes([byte]) for byte in range(256)), b""],
            [256],
            lambda text: list(text.encode() if isinstance(text, str) else text),
        )

    def ids(self, token: int) -> Sequence[int]:
        return list(self.piece(token))

    def piece(self, token: int) -> bytes:
        return self.vocabulary.piece(token)

    def spell(self, text: bytes) -> list[int]:
        """Tokens of bytes that are no text by themselves: the rest of a character."""
        if self._singles is None:
            known = range(self.vocabulary.size) if self.vocabulary.size < 2**31 else ()
            pieces = ((self.piece(token), token) for token in known)
            self._singles = {piece[0]: token for piece, token in pieces if len(piece) == 1}
        return [self._singles[byte] for byte in text if byte in self._singles]

    _singles: dict[int, int] | None = None


class CheckedFields(FieldInterpreter):
    """`FieldInterpreter` for an engine that cannot be masked: it checks what is sampled.

    guides: the kinds of guides that the engine takes (`Request.guide`).
    """

    def __init__(
        self,
        plan: Node,
        grammars: Grammars,
        params: SamplingParams,
        limits: Limits,
        *,
        parts: Node | None = None,
        guides: Collection[str] = (),
    ) -> None:
        super().__init__(plan, grammars, params, limits, parts=parts)
        self._offered = guides
        self._guides: dict[Path, Guide] = {}
        self._refused: Counter[Path] = Counter()

    def guide(self, path: Path) -> Guide | None:
        """What the completion that begins a thread's value is held to; None if it has begun, or is only checked."""
        thread = self.threads.get(path)
        if thread is None or thread.state != "live" or (thread.value and len(thread.value.text) > thread.said):
            return None
        return self._guides.get(path)

    def advance(self, sampled: SampledToken) -> list[Event]:
        thread = self.threads.get(sampled.path)
        if thread is None or thread.state != "live":
            return []
        if isinstance(thread.node, Counted):
            return list(self._counted(thread, thread.node, sampled))
        return list(self._decoded(thread, sampled))

    def _heading(self, thread: FieldThread, node: Node) -> tuple[str, str]:
        self._guides.pop(thread.path, None)
        if isinstance(node, Counted) and "regex" in self._offered:
            self._guides[thread.path] = one_of([str(n) for n in range(node.least, node.most + 1)])
        if not isinstance(node, Leaf | Choice):
            return super()._heading(thread, node)
        fed, shown, thread.shown = thread.fed, thread.shown, ""
        if isinstance(node, Choice):
            fed, shown = fed + node.open, shown + node.open
        thread.value = self._begun(node)
        begun = thread.value.begin().decode()
        guide = one_of(node.options, begun) if isinstance(node, Choice) else rest_of(node, begun)
        if (guide is None or "regex" not in self._offered) and not thread.value.ended:
            leaf = node if isinstance(node, Leaf) else Leaf({"enum": list(map(json.loads, node.options))})
            guide = whole(leaf) if "json" in self._offered else None
            if guide is not None:  # the server writes all of the value
                thread.value, begun = self._begun(node), ""
        if guide is not None:
            self._guides[thread.path] = guide
        if not begun and "json" not in (guide or {}):
            fed = fed.removesuffix(" ")  # a word's token has the space before it
        thread.said = len(begun.encode())
        if isinstance(node, Leaf) and node.optional:
            thread.shown = shown
            return fed + begun, ""
        tail = thread.tail if thread.value.ended and isinstance(node, Leaf) else ""
        return fed + begun + tail, shown + begun

    def _begun(self, node: Leaf | Choice) -> Value:
        if isinstance(node, Choice):
            return self._grammars.literals(list(node.options), "")
        return self._grammars.value(node, "")

    def _decoded(self, thread: FieldThread, sampled: SampledToken) -> Iterator[Event]:
        found = self._checked(thread, sampled)
        if found is None:
            yield self._again(thread)
            return
        tokens, reason = found
        value = thread.value
        assert value is not None
        ends = value.ended or reason != "stop"
        written = bool(tokens)
        if ends and isinstance(thread.node, Leaf):
            tokens = [*tokens, *self._grammars.encode(thread.tail)]
        tokens = tokens or [min(self._grammars.vocabulary.eos)]
        thread.state = "open" if ends else "live"
        yield self._took(thread, sampled, tokens, text=self._said(thread, final=ends), tag=not written)
        if ends:
            yield from self._end_value(thread, reason, why=sampled.lost)

    def _checked(self, thread: FieldThread, sampled: SampledToken) -> tuple[list[int], FinishReason] | None:
        """The tokens that a value gets, perhaps none at its end. None: the completion is to be asked for again."""
        value = thread.value
        assert isinstance(value, CheckedValue)
        taken, ahead = self._taken(value, sampled)
        tight = thread.budget <= self._margin(thread) + 1
        if taken is not None and (ahead.ended or not tight or len(ahead.ending()) < thread.budget - len(taken)):
            thread.value = ahead
            return taken, "stop"
        if taken is None and not sampled.lost and self._refused[thread.path] < TRIES:
            return None
        way_out = value.ending()
        for token in way_out:
            value.write(token)
        return way_out, "abort" if sampled.lost else "length"

    def _taken(self, value: CheckedValue, sampled: SampledToken) -> tuple[list[int] | None, CheckedValue]:
        """What is taken of a sampled token (None: it does not fit), and the value with it."""
        ahead = value.fork()
        if sampled.lost:
            return None, ahead
        if sampled.token in self._grammars.vocabulary.eos:
            ahead.whole = value.may_end
            return ([] if ahead.whole else None), ahead
        return ahead.take(sampled.token), ahead

    def _again(self, thread: FieldThread) -> Joined:
        """The thread goes on from what it has: its engine asks for another completion."""
        self._refused[thread.path] += 1
        return Joined(path=thread.path)

    def _counted(self, thread: FieldThread, counted: Counted, sampled: SampledToken) -> Iterator[Event]:
        number = _NUMBER.match(self._grammars.piece(sampled.token)) if not sampled.lost else None
        allowed = self._numbers(thread, counted).ids
        tokens = self._grammars.encode(number[1]) if number else []
        if len(tokens) == 1 and tokens[0] in allowed:
            sampled = replace(sampled, token=tokens[0])
        elif not sampled.lost and self._refused[thread.path] < TRIES:
            yield self._again(thread)
            return
        yield from super()._counted(thread, counted, sampled)
