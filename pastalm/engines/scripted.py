"""An engine without a model: it plays written documents, one a request, through a real vocabulary.

For demos and tests. Each thread follows its own part of the script: after a promise the parent goes on
with what stands behind the chunk, the child with the chunk. Masks, forced tokens, waiting and
cancelling work as on any engine. What the masks forbid is played as well as it can be: a forbidden
promise writes its chunk in place, any other forbidden tag is left out, any other forbidden token is
replaced by the smallest allowed id. A script that is over ends its thread.

Every scripted token is certain: its log-probability is 0.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TypeAlias

from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path, SampledToken, TokenSet
from pastalm.core.language import AsyncClose, Promise, Sync, Text, render_mark
from pastalm.core.params import Request
from pastalm.core.vocabulary import Tags, Vocabulary
from pastalm.engines.base import Capabilities, Schedule
from pastalm.errors import CapabilityError, RequestError
from pastalm.records.documents import Async, Document, encode, normalize, parse, strip
from pastalm.records.xml import Scanner

Script: TypeAlias = "str | Document"
"""PASTA-LANG, as text or as values."""

EOS = 256


def byte_vocabulary(prepared: bool = True) -> Vocabulary:
    """One id a byte (0..255), 256 the end, and in a prepared one 257..262 the six tags."""
    return Vocabulary(
        size=263 if prepared else 257,
        eos=frozenset({EOS}),
        encode=lambda text: list(text.encode()),
        piece=lambda token: bytes([token]) if token < 256 else b"",
        scanner=Scanner,
        tags=Tags(*range(257, 263)) if prepared else None,
    )


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A promise of a script: its tokens stand at start..after, `body` is what keeps it."""

    start: int
    after: int
    body: Document


@dataclass(slots=True)
class _Thread:
    """A thread that plays `ids` from `at`; what stands in `instead` comes first."""

    ids: list[int]
    chunks: list[_Chunk]
    at: int = 0
    instead: deque[int] = field(default_factory=deque)
    live: bool = True
    allowed: TokenSet | None = None

    @property
    def script_token(self) -> int | None:
        return self.ids[self.at] if self.at < len(self.ids) else None


@dataclass(slots=True)
class _Playing:
    request: Request
    script: Document
    threads: dict[Path, _Thread] = field(default_factory=dict)


CAPABILITIES = Capabilities(
    name="scripted",
    weights="plays scripts, no weights",
    positions=("promised", "overlap"),
)


class ScriptedEngine:
    """Plays `scripts` in the order in which requests come, again from the first after the last.

    schedule: which threads decode in a step (None: all). step_seconds: how long a step takes, so that
    a demo can be watched. Raises LanguageError for a script that is not PASTA-LANG, RequestError
    where there is none.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        scripts: Sequence[Script],
        *,
        max_num_seqs: int = 8,
        max_model_len: int = 65536,
        schedule: Schedule | None = None,
        step_seconds: float = 0.0,
    ) -> None:
        if not scripts:
            raise RequestError("a scripted engine needs at least one script")
        self._vocabulary = vocabulary
        self._scripts = [parse(s) if isinstance(s, str) else normalize(s) for s in scripts]
        self._turn = count()
        self._schedule = schedule
        self._step_seconds = step_seconds
        self._playing: dict[str, _Playing] = {}
        self._capabilities = replace(CAPABILITIES, max_model_len=max_model_len, max_num_seqs=max_num_seqs)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def add(self, request: Request) -> None:
        """Takes a request; beyond max_num_seqs it waits. Raises RequestError if it never could fit,
        CapabilityError if it asks for what is not offered."""
        self._capabilities.check(request)
        length = len(request.prompt_token_ids) + request.params.max_tokens
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty: give some text")
        if length > self._capabilities.max_model_len:
            raise RequestError(
                f"prompt and max_tokens need {length} places, the engine has "
                f"{self._capabilities.max_model_len}: shorten the prompt or lower max_tokens"
            )
        script = self._scripts[next(self._turn) % len(self._scripts)]
        self._playing[request.id] = _Playing(request, script)

    def apply(self, request_id: str, event: Event) -> None:
        """Does what an event means to the script of its thread."""
        playing = self._playing[request_id]
        if isinstance(event, Forked):
            self._fork(playing, event.path)
        thread = playing.threads[event.path]
        if isinstance(event, Blocked):
            thread.live = False
        elif isinstance(event, Joined):
            thread.live = True
            if event.children:
                self._play(thread, event.forced)
        elif isinstance(event, Decoded):
            self._play(thread, (event.token, *event.forced))
        elif isinstance(event, Finished):
            del playing.threads[event.path]
            if not playing.threads:
                del self._playing[request_id]
        thread.allowed = event.allowed

    def step(self) -> list[SampledToken]:
        """The next token of every live thread that the schedule picks."""
        if self._step_seconds:
            time.sleep(self._step_seconds)
        running = list(self._playing.values())[: self._capabilities.max_num_seqs]
        live = [(p.request.id, path) for p in running for path, t in p.threads.items() if t.live]
        return [self._sample(*chosen) for chosen in (self._schedule(live) if self._schedule else live)]

    def score(self, token_ids: Sequence[int], logprobs: int) -> list[SampledToken] | None:
        """Raises CapabilityError: it has no logits of a prompt."""
        raise CapabilityError("the scripted engine gives no log-probabilities of prompts")

    def has_unfinished(self) -> bool:
        return bool(self._playing)

    def cancel(self, request_id: str) -> None:
        self._playing.pop(request_id, None)

    # ------------------------------------------------------------------ scripts

    def _fork(self, playing: _Playing, path: Path) -> None:
        """Gives a new thread its part; its parent goes on behind the promise, however it was spelled."""
        if not path:
            playing.threads[path] = self._thread(playing.script, sorted(self._vocabulary.eos)[:1])
            return
        parent = playing.threads[path[:-1]]
        chunk = next(c for c in parent.chunks if c.start < parent.at <= c.after)
        parent.at = chunk.after
        tags = self._vocabulary.tags
        close = [tags.async_close] if tags else self._vocabulary.encode(render_mark(AsyncClose()))
        playing.threads[path] = self._thread(chunk.body, close)

    def _thread(self, script: Document, end: Sequence[int]) -> _Thread:
        ids: list[int] = []
        chunks: list[_Chunk] = []
        start = 0
        for node in script:
            if isinstance(node, Async):
                chunks.append(_Chunk(start, len(ids), node.body))
            else:
                start = len(ids)
                ids += self._spell(node)
        return _Thread([*ids, *end], chunks)

    def _spell(self, node: Text | Promise | Sync) -> Sequence[int]:
        if self._vocabulary.tags is not None:
            return encode((node,), self._vocabulary)
        return self._vocabulary.encode(render_mark(node))

    def _sample(self, request_id: str, path: Path) -> SampledToken:
        playing = self._playing[request_id]
        token = self._next(playing.threads[path])
        logprobs = playing.request.params.logprobs
        return SampledToken(
            request_id=request_id,
            path=path,
            token=token,
            logprob=None if logprobs is None else 0.0,
            top_logprobs=((token, 0.0),) if logprobs else (),
        )

    def _next(self, thread: _Thread) -> int:
        """What the script says, or the nearest to it that is allowed."""
        tags = self._vocabulary.tags
        allowed = thread.allowed
        while (token := thread.instead[0] if thread.instead else thread.script_token) is not None:
            if allowed is None or token in allowed:
                return token
            if tags is not None and token == tags.promise:
                chunk = next(c for c in thread.chunks if c.start == thread.at)
                thread.at = chunk.after
                thread.instead.extend(self._vocabulary.encode(strip(chunk.body)))
            elif tags is not None and token == tags.sync:
                thread.at += 1
            else:
                break
        return next(i for i in range(self._vocabulary.size) if allowed is None or i in allowed)

    def _play(self, thread: _Thread, tokens: Sequence[int]) -> None:
        """Moves on in the script by tokens that were decoded; those it does not hold move nothing."""
        tags = self._vocabulary.tags
        for token in tokens:
            if thread.instead:
                if token == thread.instead[0]:
                    thread.instead.popleft()
            elif token == thread.script_token:
                thread.at += 1
            elif tags is not None and token == tags.tokens:  # a topic that was cut short
                thread.at = thread.ids.index(token, thread.at) + 1
