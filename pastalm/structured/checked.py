"""Structured answers of an engine that cannot be masked: what a thread writes is checked, and asked for again.

A completions server has no masks. If it has guided decoding of its own, it gets the schema of each value, and writes
the value whole (`guide`). Whether it has it or not, every piece that it sends is checked:

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from pastalm.core.events import Decoded, Event, FinishReason, Joined, Path, SampledToken
from pastalm.core.interpreter import Limits
from pastalm.core.params import SamplingParams
from pastalm.structured.grammar import Grammars, Value
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

    guided: the engine holds a value to its schema where it can (`Request.guide`). Then nothing of the value is forced,
        and the engine writes all of it.
    """

    def __init__(
        self,
        plan: Node,
        grammars: Grammars,
        params: SamplingParams,
        limits: Limits,
        *,
        parts: Node | None = None,
        guided: bool = False,
    ) -> None:
        super().__init__(plan, grammars, params, limits, parts=parts)
        self._guided = guided
        self._refused: Counter[Path] = Counter()

    def guide(self, path: Path) -> Mapping[str, Any] | None:
        """The schema of all that a thread writes next; None if it has begun to write it, or writes no value."""
        thread = self.threads.get(path)
        if thread is None or thread.state != "live" or not self._guided:
            return None
        node = thread.node
        if isinstance(node, Counted):
            return {"type": "integer", "minimum": node.least, "maximum": node.most}
        if thread.value is None or thread.value.text:
            return None
        if isinstance(node, Choice):
            return {"enum": [json.loads(name) for name in node.options]}
        return _schema_of(node) if isinstance(node, Leaf) else None

    def advance(self, sampled: SampledToken) -> list[Event]:
        thread = self.threads.get(sampled.path)
        if thread is None or thread.state != "live":
            return []
        if isinstance(thread.node, Counted):
            return list(self._counted(thread, thread.node, sampled))
        return list(self._decoded(thread, sampled))

    def _heading(self, thread: FieldThread, node: Node) -> tuple[str, str]:
        if not isinstance(node, Leaf | Choice):
            return super()._heading(thread, node)
        fed, shown, thread.shown = thread.fed, thread.shown, ""
        if isinstance(node, Choice):
            thread.value = self._grammars.literals(list(node.options), "")
            fed, shown = fed + node.open, shown + node.open
        else:
            thread.value = self._grammars.value(node, "")
        begun = "" if self._guided else thread.value.begin().decode()
        if not begun and not self._guided:
            fed = fed.removesuffix(" ")  # a word's token has the space before it
        thread.said = len(begun)
        if isinstance(node, Leaf) and node.optional:
            thread.shown = shown
            return fed + begun, ""
        return fed + begun, shown + begun

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
        thread.budget -= len(tokens)
        thread.written += len(tokens)
        thread.state = "open" if ends else "live"
        yield Decoded(
            path=thread.path,
            token=tokens[0],
            text=self._said(thread, final=ends),
            tag=not written,
            replaced=tokens[0] != sampled.token,
            forced=tuple(tokens[1:]),
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
        )
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


def _schema_of(leaf: Leaf) -> Mapping[str, Any]:
    schema = {} if leaf.schema is True else leaf.schema
    if not leaf.optional:
        return dict(schema)
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rest = {key: value for key, value in schema.items() if key not in definitions}
    return {"anyOf": [rest, {"type": "null"}], **definitions}
