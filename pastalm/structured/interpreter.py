"""The interpreter of a plan: sampled tokens of one structured answer in, events out.

It has the same surface as `core/interpreter.py`, and its events say all that an engine must know. Where that one forks
where the model promises, this one forks where the schema does:

    a group     its thread writes the opening bracket, forks a thread for each child, and ends when they have
    a leaf      is written under its grammar; what only one continuation leaves open is forced
    a need      a child that needs others begins once they have ended, and sees what they wrote

A child sees the prompt, the brackets that are open and its own key, and of its siblings those that it needs. Keys,
brackets, commas are never sampled. Budgets: what `max_tokens` leaves is shared out among the leaves; one that comes to
its end is led the shortest way out of its value (`length`), so that every answer parses.
"""

from __future__ import annotations

import codecs
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pastalm.core.events import (
    Blocked,
    Decoded,
    Event,
    Finished,
    FinishReason,
    Forked,
    Joined,
    Path,
    SampledToken,
    TokenSet,
)
from pastalm.core.interpreter import Limits
from pastalm.core.params import SamplingParams
from pastalm.engines.processors.base import ThreadProcessor
from pastalm.errors import RequestError
from pastalm.structured.grammar import COMMA, Grammars, Value
from pastalm.structured.mask import ValueMask
from pastalm.structured.plan import Child, Choice, Counted, Group, Leaf, Node, quoted

_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass(slots=True)
class FieldThread:
    """A thread of a structured answer.

    child: what it writes. node: the part of it that it writes now.
    budget: tokens that it may still have. written: tokens so far.
    value: of a leaf, once it has begun.
    shown: text that stands before its first own text: an optional field's key.
    children: the threads of its group. needs: the threads that it waits for. needed: whether another waits for it.
    close: text behind its last child.
    """

    path: Path
    child: Child
    node: Node
    budget: int
    state: Literal["waiting", "queued", "live", "open", "finished"] = "waiting"
    written: int = 0
    value: Value | None = None
    tail: str = ""
    fed: str = ""
    shown: str = ""
    close: str = ""
    children: list[Path] = field(default_factory=list)
    needs: tuple[Path, ...] = ()
    needed: bool = False
    characters: Any = field(default_factory=lambda: _UTF8("replace"))
    said: int = 0


class TooFewTokens(RequestError):
    """max_tokens is less than the shortest answer of a plan."""


class FieldInterpreter:
    """The threads of one structured answer. Its `begin` makes it a logits processor too: the masks of its values.

    plan: of the answer.
    grammars: of the model's tokens.
    params: its max_tokens counts here.
    limits: max_threads decode at once; max_chunk_tokens bounds a leaf.
    parts: the plan of the same answer in threads, if `plan` is of one thread: its shortest answer is found faster.

    Raises TooFewTokens if max_tokens is less than a short answer takes, which may be a few more than the shortest one.
    """

    def __init__(
        self, plan: Node, grammars: Grammars, params: SamplingParams, limits: Limits, *, parts: Node | None = None
    ) -> None:
        self._grammars, self._limits = grammars, limits
        fewest = self._least(parts or plan)
        if fewest > params.max_tokens and parts is not None:  # fields that may be left out count there
            fewest = min(fewest, self._least(plan))
        if fewest > params.max_tokens:
            raise TooFewTokens(
                f"max_tokens {params.max_tokens} is too few: an answer to this schema takes {fewest} or more"
            )
        main = FieldThread((), Child(plan, "answer"), plan, params.max_tokens)
        self.threads: dict[Path, FieldThread] = {(): main}
        self.stopped: list[Path] = []
        self._queue: deque[FieldThread] = deque()

    # ------------------------------------------------------------------ what a driver calls

    def start(self) -> list[Event]:
        """The events that begin the answer."""
        return list(self._begin(self.threads[()], joined=None))

    def start_behind(self, text: str, spent: int, *, close: str) -> list[Event]:
        """The events with which the answer begins in a thread that has written already.

        text: what the thread is fed first, and the reader sees. spent: tokens so far. close: text behind the answer.
        """
        main = self.threads[()]
        main.fed = main.shown = text
        main.written, main.close = spent, close
        main.budget -= spent
        return list(self._begin(main, joined=()))

    def advance(self, sampled: SampledToken) -> list[Event]:
        """The events that follow from a sampled token; none if its thread does not decode."""
        thread = self.threads.get(sampled.path)
        if thread is None or thread.state != "live":
            return []
        if sampled.lost:
            return list(self._end(thread, "abort", why=sampled.lost))
        if isinstance(thread.node, Counted):
            return list(self._counted(thread, thread.node, sampled))
        return list(self._decoded(thread, sampled))

    def finish(self, reason: FinishReason) -> list[Event]:
        """Ends every thread now."""
        unfinished = [thread for thread in self.threads.values() if thread.state != "finished"]
        for thread in unfinished:
            thread.state = "finished"
        self._queue.clear()
        return [Finished(path=thread.path, reason=reason) for thread in unfinished]

    @property
    def finished(self) -> bool:
        return self.threads[()].state == "finished"

    def begin(self, request: Any) -> ThreadProcessor:
        """What masks the logits of the main thread."""
        return ValueMask(self.value, ())

    def value(self, path: Path) -> Value | None:
        """The value that a thread writes now."""
        thread = self.threads.get(path)
        return thread.value if thread is not None else None

    def guide(self, path: Path) -> Any:
        """What a thread writes next is held to, on an engine that cannot be masked (guides.py); None: nothing."""
        return None

    # ------------------------------------------------------------------ beginning

    def _begin(self, thread: FieldThread, joined: tuple[Path, ...] | None) -> Iterator[Event]:
        """A thread begins (joined None), or goes on behind those it has waited for."""
        node = thread.node
        fed, shown = self._heading(thread, node)
        forced = tuple(self._grammars.encode(fed))
        thread.written += len(forced)
        thread.budget -= len(forced)
        whole = thread.value is not None and thread.value.ended
        thread.state = "open" if whole or isinstance(node, Group) else "live"
        allowed = self._numbers(thread, node) if isinstance(node, Counted) else None
        if joined is None:
            yield self._forked(thread, text=shown, forced=forced, allowed=allowed)
        else:
            yield Joined(path=thread.path, children=joined, text=shown, forced=forced, allowed=allowed)
        if isinstance(node, Group):
            yield Blocked(path=thread.path)
            yield from self._open(thread, node)
        elif whole:
            yield Blocked(path=thread.path)
            yield from self._end_value(thread)

    def _heading(self, thread: FieldThread, node: Node) -> tuple[str, str]:
        """What a thread is fed before its first token, and the reader's text of it. Its value begins."""
        fed, shown, thread.shown = thread.fed, thread.shown, ""
        if isinstance(node, Group):
            return fed + node.open + node.lead, shown + node.open
        if isinstance(node, Counted):
            return fed + "/* ", shown
        if isinstance(node, Choice):
            value = self._grammars.literals(list(node.options), "")
            fed, shown = fed + node.open, shown + node.open
        else:
            value = self._grammars.value(node, thread.tail)
        begun = value.begin().decode()
        if isinstance(node, Leaf) and not begun and fed.endswith(" ") and not _is_number(node):
            # a word's token has the space before it
            value = self._grammars.value(node, thread.tail, head=" ")
            fed, shown = fed[:-1], shown[:-1]
        thread.value, thread.said = value, len(begun.encode())
        if isinstance(node, Leaf) and node.optional:
            thread.shown = shown
            return fed + begun, ""
        return fed + begun, shown + value.text.decode()

    def _forked(
        self, thread: FieldThread, *, text: str = "", forced: tuple[int, ...] = (), allowed: TokenSet | None = None
    ) -> Forked:
        topic = thread.child.name if thread.path else ""
        return Forked(path=thread.path, topic=topic, text=text, forced=forced, allowed=allowed)

    def _open(self, thread: FieldThread, group: Group) -> Iterator[Event]:
        """Forks the children of a group."""
        if not group.children:
            yield from self._end(thread, "stop", text=group.close)
            return
        thread.close = group.close + thread.close
        budgets = self._shares(group.children, thread.budget)
        thread.budget = 0
        paths = [(*thread.path, i) for i in range(len(group.children))]
        thread.children = paths
        for i, (child, path, budget) in enumerate(zip(group.children, paths, budgets, strict=True)):
            begun = FieldThread(path, child, child.node, budget, tail=COMMA)
            begun.needs = tuple(paths[j] for j in child.needs)
            begun.fed = f" {child.hint}{child.key}" if begun.needs else child.hint + child.key.removeprefix(group.lead)
            begun.shown = (", " if i else "") + child.key
            begun.needed = thread.needed or any(i in other.needs for other in group.children)
            self.threads[path] = begun
        for path in paths:
            yield from self._offer(self.threads[path])

    def _offer(self, thread: FieldThread) -> Iterator[Event]:
        """A thread begins at once if it needs nothing and a place is free; else it is there and waits."""
        if thread.needs:
            yield self._forked(thread)
            yield Blocked(path=thread.path)
        elif self._has_place(thread):
            yield from self._begin(thread, None)
        else:
            thread.state = "queued"
            self._queue.append(thread)
            yield self._forked(thread)
            yield Blocked(path=thread.path, on="thread")

    def _has_place(self, thread: FieldThread) -> bool:
        live = sum(other.state == "live" for other in self.threads.values())
        return isinstance(thread.node, Group) or live < self._limits.max_threads

    # ------------------------------------------------------------------ values

    def _decoded(self, thread: FieldThread, sampled: SampledToken) -> Iterator[Event]:
        """A token of a value, and what is certain behind it."""
        value = thread.value
        assert value is not None
        stops = sampled.token in self._grammars.vocabulary.eos and value.may_end
        reason: FinishReason = "stop"
        tokens = [sampled.token]
        if not stops:
            tokens, reason = self._written(thread, value, sampled.token)
        ends = stops or value.ended or reason == "length"
        thread.state = "open" if ends else "live"
        yield self._took(thread, sampled, tokens, text=self._said(thread, final=ends), tag=stops)
        if ends:
            yield from self._end_value(thread, reason)

    @staticmethod
    def _took(thread: FieldThread, sampled: SampledToken, tokens: Sequence[int], *, text: str, tag: bool) -> Decoded:
        """The event of the tokens that follow from a sampled one: the first in its place, the others forced."""
        thread.budget -= len(tokens)
        thread.written += len(tokens)
        return Decoded(
            path=thread.path,
            token=tokens[0],
            text=text,
            tag=tag,
            replaced=tokens[0] != sampled.token,
            forced=tuple(tokens[1:]),
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            drafter=sampled.drafter,
            drafted=sampled.drafted,
        )

    def _written(self, thread: FieldThread, value: Value, token: int) -> tuple[list[int], FinishReason]:
        """The tokens that a value gets: the sampled one and what is certain behind it. Where no end would be in reach
        behind them, or the grammar does not have the token, those that lead out of the value (`length`)."""
        way_out = value.ending() if thread.budget <= self._margin(thread) else None
        if value.write(token):
            tokens = [token, *value.certain()]
            if value.ended or way_out is None or len(value.ending()) <= thread.budget - len(tokens):
                return tokens, "stop"
            value.take_back(tokens)
        way_out = way_out or value.ending() or self._grammars.encode(COMMA)
        for each in way_out:
            value.write(each)
        return way_out, "length"

    def _said(self, thread: FieldThread, *, final: bool) -> str:
        """The text of a value that has not been said. Of an optional one only when it is clear that it is there."""
        value = thread.value
        assert value is not None
        text = value.text
        if isinstance(thread.node, Leaf) and thread.node.optional and b"null".startswith(text.strip()):
            if final:  # it is left out
                thread.said, thread.shown = len(text), ""
            return ""
        said, thread.said = text[thread.said :], max(thread.said, len(text))
        before, thread.shown = thread.shown, ""
        return before + str(thread.characters.decode(said, final))

    def _margin(self, thread: FieldThread) -> int:
        """With more tokens left than this, an end is in reach whatever a thread writes next."""
        schema = thread.node.schema if isinstance(thread.node, Leaf) else {}
        if not isinstance(schema, dict) or _longest(schema) <= thread.budget:
            return 0
        simple = schema.get("type") in ("string", "integer", "number") and not {"pattern", "format"} & set(schema)
        return 8 + 2 * schema.get("minLength", 0) if simple else 32 + len(quoted(schema)) // 4

    def _end_value(self, thread: FieldThread, reason: FinishReason = "stop", *, why: str = "") -> Iterator[Event]:
        """A value is whole: its thread ends, or writes what was chosen."""
        value, node = thread.value, thread.node
        assert value is not None
        if isinstance(node, Choice):
            chosen = node.options[value.text.decode()]
            thread.value, thread.close = None, node.close + thread.close
            thread.node, thread.fed, thread.shown = chosen, node.between, node.between
            thread.said = 0
            yield from self._begin(thread, joined=())
        else:
            yield from self._end(thread, reason, text=thread.close, why=why)

    def _numbers(self, thread: FieldThread, counted: Counted) -> TokenSet:
        """The tokens of the numbers of items that the budget allows."""
        tokens = {}
        for n in range(counted.least, counted.most + 1):
            ids = self._grammars.encode(str(n))
            if len(ids) == 1 and (n == counted.least or self._least(counted.items(n)) <= thread.budget - 4):
                tokens[ids[0]] = n
        return TokenSet(frozenset(tokens))

    def _counted(self, thread: FieldThread, counted: Counted, sampled: SampledToken) -> Iterator[Event]:
        """The number of items has been decided."""
        numbers = self._numbers(thread, counted).ids
        token = sampled.token if sampled.token in numbers else min(numbers)
        group = counted.items(int(self._grammars.vocabulary.text([token])))
        thread.node, thread.state = group, "open"
        yield self._took(thread, sampled, [token, *self._grammars.encode(" items */ [")], text="[", tag=True)
        yield Blocked(path=thread.path)
        yield from self._open(thread, group)

    # ------------------------------------------------------------------ ends

    def _end(
        self, thread: FieldThread, reason: FinishReason, *, text: str = "", forced: tuple[int, ...] = (), why: str = ""
    ) -> Iterator[Event]:
        """A thread ends, and what waited for it goes on."""
        thread.state = "finished"
        yield Finished(path=thread.path, reason=reason, text=text, forced=forced, why=why)
        if thread.path:
            parent = self.threads[thread.path[:-1]]
            if all(self.threads[path].state == "finished" for path in parent.children):
                yield from self._end_group(parent)
        for waiting in list(self.threads.values()):
            if waiting.state == "waiting" and waiting.needs and self._ready(waiting):
                yield from self._resume(waiting)
        while self._queue and self._has_place(self._queue[0]):
            queued = self._queue.popleft()
            yield from self._begin(queued, joined=queued.needs)

    def _end_group(self, thread: FieldThread) -> Iterator[Event]:
        """All children of a group have ended."""
        forced: tuple[int, ...] = ()
        if thread.needed:
            children = tuple(thread.children)
            yield Joined(path=thread.path, children=children, forced=tuple(self._grammars.encode(thread.close)))
            forced = tuple(self._grammars.encode(COMMA))
        yield from self._end(thread, "stop", text=thread.close, forced=forced)

    def _ready(self, thread: FieldThread) -> bool:
        return all(self.threads[path].state == "finished" for path in thread.needs)

    def _resume(self, thread: FieldThread) -> Iterator[Event]:
        if self._has_place(thread):
            yield from self._begin(thread, joined=thread.needs)
        else:
            thread.state = "queued"
            self._queue.append(thread)

    # ------------------------------------------------------------------ budgets

    def _least(self, node: Node, before: str = "") -> int:
        """Tokens that are enough for a short answer to a node, `before` included."""
        encode = self._grammars.encode
        least = len(encode(before)) + 2
        if isinstance(node, Leaf):
            return least + self._grammars.fewest(node)
        if isinstance(node, Counted):
            return least + self._least(node.items(node.least)) + 8
        around = len(encode(node.open)) + len(encode(node.close))
        if isinstance(node, Choice):
            return (
                least + around + max(self._least(option, name + node.between) for name, option in node.options.items())
            )
        return least + around + sum(self._least(child.node, f" {child.hint}{child.key}") for child in node.children)

    def _shares(self, children: Sequence[Child], budget: int) -> list[int]:
        """How a budget is shared out: each child has what it needs at least, the rest goes to those who can use it, in
        equal parts."""
        shares = [self._least(child.node, f" {child.hint}{child.key}") for child in children]
        most = [max(share, self._most(child.node) + share) for child, share in zip(children, shares, strict=True)]
        left = budget - sum(shares)
        open_ones = [i for i in range(len(shares)) if most[i] > shares[i]]
        while left > 0 and open_ones:
            part = max(1, left // len(open_ones))
            for i in list(open_ones):
                given = int(min(part, most[i] - shares[i], left))
                shares[i] += given
                left -= given
                if shares[i] >= most[i]:
                    open_ones.remove(i)
                if left <= 0:
                    break
        return shares

    def _most(self, node: Node) -> float:
        """Tokens that a node can use."""
        if isinstance(node, Group):
            return sum(self._most(child.node) + len(self._grammars.encode(child.key)) for child in node.children)
        if not isinstance(node, Leaf):
            return math.inf
        longest = _longest(node.schema) if isinstance(node.schema, dict) else math.inf
        return min(self._limits.max_chunk_tokens, longest)


def _is_number(leaf: Leaf) -> bool:
    return not leaf.optional and isinstance(leaf.schema, dict) and leaf.schema.get("type") in ("integer", "number")


def _longest(schema: dict[str, Any]) -> float:
    """No value of a schema has more tokens: its bytes, with a comma and the space before it."""
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return max((len(quoted(value).encode()) for value in values), default=0) + 2
    kind = schema.get("type")
    if kind in ("boolean", "null", "integer"):
        return 22
    if kind == "string" and isinstance(most := schema.get("maxLength"), int):
        return 6 * most + 4
    return math.inf
