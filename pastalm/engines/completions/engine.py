"""The engine over an OpenAI-compatible completions server: vLLM, SGLang, llama.cpp's, or another.

Each stretch of a thread between syncs is one streamed completion, and its prompt the linear form of all that the
thread may see: policy `serial`. A promise opens one more, on a prefix that the server has cached; the main thread's
goes on. A sync ends a thread's completion, and the linear form with its chunks begins the next. (PASTA section 4.)

A step takes what has come: at most one token of each live thread. What a completion has said beyond that waits here,
and is dropped where the interpreter decides otherwise (a token put right, another forced, a sync): then the thread is
asked for again from what stands. So no mask need be sent, and none is but for a whole response without tags.

Prompts and replies are token ids where the server takes and tells them (vLLM), else text (`Pieces`); see `discovery`.
vLLM shares the blocks of a request that still runs; SGLang only those of one that ended, so there the parent's
completion ends at a promise and is sent again beside the child's (`shares`).

Failures, thread by thread: opening one is retried by the openai client (Retry-After too), a completion that breaks
or stalls is asked for again from its last token. After `retries` failures without a token the thread waits until it
is alone, is written then, and if that fails as often it is lost: it ends there and the others go on. What cannot
get better (no such key or model, nothing at that address) is a RemoteError of the whole run.
"""

from __future__ import annotations

import queue
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from pastalm.core.events import Decoded, Event, Finished, Forked, Joined, Path, SampledToken, TokenSet
from pastalm.core.params import Request
from pastalm.engines.base import Capabilities
from pastalm.engines.completions.connection import Connection, Traffic
from pastalm.engines.completions.serial import SerialLayout
from pastalm.engines.completions.wire import CompletionEnd, CompletionToken, Ids, Item, Shares, Wire
from pastalm.errors import CapabilityError, EngineError, RemoteError, RequestError, complaint

CAPABILITIES = Capabilities(
    name="openai",
    weights="what a completions server runs: vLLM, SGLang, llama.cpp (--base-url)",
    positions=("serial",),
    masks=False,
    untagged=True,
)
MOMENT = 0.05
"""Seconds that a step waits for the first token, so that whoever drives can do something else."""
MAX_NUM_SEQS = 64
UNKNOWN = 1 << 30
"""Length of a context that only the server knows."""
FORBIDDEN = -100.0
"""The bias that the API takes for never."""


@dataclass(slots=True)
class _Thread:
    """A thread as the engine knows it.

    number: of its completion; None: none is open, or all of its tokens are taken.
    future: cancels the completion.
    received_count: tokens received.
    received: of these, not taken yet, and the end of the completion.
    expected: forced tokens that the completion has yet to say itself.
    said: the token that was sampled last.
    failures: since the last token.
    postponed: waits until no other thread of its response decodes.
    alone: no other one did when it was last requested.
    """

    path: Path
    live: bool = True
    finished: bool = False
    allowed: TokenSet | None = None
    number: int | None = None
    future: Future[None] | None = None
    received_count: int = 0
    received: deque[Item] = field(default_factory=deque)
    expected: deque[int] = field(default_factory=deque)
    said: int | None = None
    count: int = 0
    failures: int = 0
    not_before: float = 0.0
    postponed: bool = False
    alone: bool = False


@dataclass(slots=True)
class _Response:
    request: Request
    layout: SerialLayout
    threads: dict[Path, _Thread] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Server:
    """What differs between servers.

    known: whether it takes more than OpenAI's API: top_k, min_p, ignore_eos and a repetition penalty.
    penalty: its name for the repetition penalty.
    every: its top_k for all tokens.
    """

    shares: Shares = "running"
    known: bool = False
    penalty: str = "repetition_penalty"
    every: int = -1


class OpenAIEngine:
    """Decodes each thread as a completion of a server.

    connection, wire, server: `discovery.connect` makes them.
    logprobs: whether the server gives log-probabilities.
    max_num_seqs: responses at once; more wait.
    max_model_len: tokens of prompt and answer (0: only the server knows).
    backoff: seconds before the first retry of a completion, doubled for each further one.
    """

    def __init__(
        self,
        connection: Connection,
        wire: Wire,
        server: Server | None = None,
        *,
        logprobs: bool = False,
        max_num_seqs: int = MAX_NUM_SEQS,
        max_model_len: int = 0,
        backoff: float = 0.5,
    ) -> None:
        self.connection, self.wire, self.server = connection, wire, server or Server()
        self.traffic = Traffic()
        self.capabilities = replace(
            CAPABILITIES,
            weights=f"{connection.model} at {connection.base_url}, asked in {wire.name}",
            logprobs=logprobs,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len or UNKNOWN,
        )
        self._backoff = backoff
        # completions under way hold the connection: without the engine nobody reads them
        weakref.finalize(self, connection.stop)
        self._responses: dict[str, _Response] = {}
        self._reading: dict[int, _Thread] = {}
        tags = wire.vocabulary.tags
        self._end = (tags.async_close,) if tags else tuple(wire.vocabulary.encode("</async>"))

    def close(self) -> None:
        """Ends every completion; the engine cannot be used any more."""
        self.connection.close()

    # ------------------------------------------------------------------ the protocol

    def add(self, request: Request) -> None:
        """Takes a request; beyond max_num_seqs it waits. Raises RequestError, CapabilityError."""
        self.capabilities.check(request)
        params, n, room = request.params, len(request.prompt_token_ids), self.capabilities.max_model_len
        checks = (
            (request.id not in self._responses, f"request {request.id!r} is unfinished"),
            (n > 0, "the prompt is empty: give at least one token"),
            (
                n + params.max_tokens <= room,
                f"prompt ({n}) + max_tokens ({params.max_tokens}) exceed max_model_len ({room}): shorten one",
            ),
        )
        if said := complaint(checks):
            raise RequestError(said)
        plain = params.top_k <= 0 and params.min_p == 0 and params.repetition_penalty == 1 and not params.ignore_eos
        offers = (
            (
                isinstance(self.wire, Ids) or dict(request.logit_bias) == dict(params.logit_bias or {}),
                "tells no token ids: parallelism can only be 0 or 1",
            ),
            (
                plain or self.server.known,
                "is of an unknown kind: leave out top_k, min_p, repetition_penalty and ignore_eos",
            ),
        )
        if said := complaint(offers):
            raise CapabilityError(f"the server at {self.connection.base_url} {said}")
        self._responses[request.id] = _Response(request, SerialLayout(request.prompt_token_ids))

    def apply(self, request_id: str, event: Event) -> None:
        """Does what an event means; what has to be asked of the server is asked in the next step. Raises
        RequestError for an event that cannot follow."""
        response = self._responses.get(request_id)
        if response is None:
            if isinstance(event, Finished):
                return
            raise RequestError(f"no unfinished request {request_id!r}: add it first")
        path, threads = event.path, response.threads
        if isinstance(event, Forked) == (path in threads) or (path and path[:-1] not in threads):
            raise RequestError(f"{type(event).__name__} of thread {path} cannot follow in {request_id!r}")
        thread = threads.setdefault(path, _Thread(path))
        response.layout.apply(event)
        fed = isinstance(event, Decoded) + len(event.forced)
        response.tokens += fed
        thread.count += fed
        thread.allowed = event.allowed
        if isinstance(event, Decoded):
            self._go_on(thread, event)
        elif isinstance(event, Forked):
            if path and self.server.shares == "finished":
                self._drop(threads[path[:-1]])
        else:
            self._drop(thread)
            thread.live = isinstance(event, Joined)
            thread.finished = isinstance(event, Finished)
        if all(t.finished for t in threads.values()):
            self.cancel(request_id)

    def step(self) -> list[SampledToken]:
        """One token of each live thread of which one has come, after waiting a moment for the first. Raises
        RemoteError where nothing can be got from the server any more, EngineError."""
        until = time.monotonic() + MOMENT
        self._listen(0.0)
        while not (sampled := list(self._sampled())):
            left = until - time.monotonic()
            if left <= 0 or not any(t.live for r in self._responses.values() for t in r.threads.values()):
                break
            self._listen(left)
        return sampled

    def score(self, token_ids: Sequence[int], logprobs: int) -> list[SampledToken] | None:
        """Raises CapabilityError: it has no logits of a prompt."""
        raise CapabilityError("the openai engine gives no log-probabilities of prompts")

    def has_unfinished(self) -> bool:
        return bool(self._responses)

    def cancel(self, request_id: str) -> None:
        """Ends the request's completions at once; unknown ids are ignored."""
        response = self._responses.pop(request_id, None)
        if response is not None:
            for thread in response.threads.values():
                self._drop(thread)

    # ------------------------------------------------------------------ what has come

    def _listen(self, seconds: float) -> None:
        """Takes all that has come, after waiting at most so long for the first."""
        try:
            number, item = self.connection.inbox.get(timeout=seconds) if seconds else self.connection.inbox.get_nowait()
            while True:
                self._receive(number, item)
                number, item = self.connection.inbox.get_nowait()
        except queue.Empty:
            return

    def _receive(self, number: int, item: Item) -> None:
        thread = self._reading.get(number)
        token = isinstance(item, CompletionToken)
        self.traffic.tokens += token
        if thread is None:
            self.traffic.dropped += token
        else:
            thread.received_count += token
            thread.received.append(item)

    def _sampled(self) -> Iterator[SampledToken]:
        """What can be taken, one token a live thread; those without a completion are asked for."""
        for response in list(self._responses.values())[: self.capabilities.max_num_seqs]:
            for path in sorted(response.threads):
                thread = response.threads[path]
                if thread.live and (sampled := self._next(response, thread)):
                    yield sampled

    def _next(self, response: _Response, thread: _Thread) -> SampledToken | None:
        while thread.expected and thread.received:
            item = thread.received[0]
            if isinstance(item, CompletionToken) and item.token == thread.expected[0]:
                thread.received.popleft()
                thread.expected.popleft()
            else:
                self._drop(thread)
        if thread.received:
            item = thread.received.popleft()
            if isinstance(item, CompletionToken):
                return self._take(response, thread, item)
            got = thread.received_count
            self._drop(thread)
            if isinstance(item, Exception):
                raise EngineError(f"reading from the server failed: {type(item).__name__}: {item}") from item
            if item.eos:
                return self._take(response, thread, CompletionToken(min(self.wire.vocabulary.eos)))
            if not got and not item.why:
                item = CompletionEnd(why=f"{self.connection.base_url} ends without a token")
            if item.why and (lost := self._failed(response, thread, item)):
                return lost
        if thread.number is None and self._may_open(response, thread):
            self._open(response, thread)
        return None

    @staticmethod
    def _take(response: _Response, thread: _Thread, item: CompletionToken) -> SampledToken:
        thread.said, thread.failures = item.token, 0
        asked = response.request.params.logprobs
        return SampledToken(
            request_id=response.request.id,
            path=thread.path,
            token=item.token,
            logprob=None if asked is None else item.logprob,
            top_logprobs=item.top[:asked] if asked else (),
        )

    def _go_on(self, thread: _Thread, event: Decoded) -> None:
        """A completion may go on as long as it says what was decided: the token itself, and then what is forced."""
        if event.token != thread.said:
            self._drop(thread)
        if thread.number is not None:
            thread.expected.extend(event.forced)

    def _drop(self, thread: _Thread) -> None:
        """Ends a thread's completion, and forgets what it said beyond what was taken."""
        if thread.future is not None:
            thread.future.cancel()
        if thread.number is not None:
            self._reading.pop(thread.number, None)
        self.traffic.dropped += sum(isinstance(item, CompletionToken) for item in thread.received)
        thread.number = thread.future = None
        thread.received.clear()
        thread.expected.clear()

    # ------------------------------------------------------------------ failures

    def _failed(self, response: _Response, thread: _Thread, end: CompletionEnd) -> SampledToken | None:
        """What becomes of a thread whose completion failed: it is tried again soon, or alone, or it is lost."""
        if end.fatal:
            raise RemoteError(end.why)
        thread.failures += 1
        if not end.final and not end.opening and thread.failures <= self.connection.retries:
            thread.not_before = time.monotonic() + self._backoff * 2 ** (thread.failures - 1)
            self.traffic.again += 1
            return None
        if not end.final and not thread.alone:
            thread.postponed, thread.failures = True, 0
            self.traffic.again += 1
            return None
        if end.unreachable and not self._reading:
            raise RemoteError(end.why)
        return SampledToken(
            request_id=response.request.id,
            path=thread.path,
            token=min(self.wire.vocabulary.eos),
            lost=end.why,
        )

    @staticmethod
    def _company(response: _Response, thread: _Thread) -> bool:
        """Whether another thread of the response decodes, or is to be written alone before this one."""
        return any(
            t.live and t is not thread and (not t.postponed or thread.postponed and t.path < thread.path)
            for t in response.threads.values()
        )

    # ------------------------------------------------------------------ asking

    def _may_open(self, response: _Response, thread: _Thread) -> bool:
        if thread.postponed:
            if self._company(response, thread):
                return False
            thread.postponed = False
        return time.monotonic() >= thread.not_before

    def _open(self, response: _Response, thread: _Thread) -> None:
        body = self._body(response, thread)
        self.traffic.completions += 1
        thread.alone = not self._company(response, thread)
        thread.received_count = 0
        thread.number, thread.future = self.connection.open(body, self.wire)
        self._reading[thread.number] = thread

    def _body(self, response: _Response, thread: _Thread) -> dict[str, Any]:
        """The completion that goes on from what the thread sees now."""
        request = response.request
        params = request.params
        row = self._row(response, thread)
        left = min(params.max_tokens - response.tokens, self.capabilities.max_model_len - len(row))
        body: dict[str, Any] = {
            "prompt": self.wire.prompt(row),
            "max_tokens": max(1, left),
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        extra = self.wire.options(request, self.server.shares)
        if not params.greedy:
            body["seed"] = _seed(request, thread)
        if params.logprobs is not None:
            body["logprobs"] = params.logprobs
        if bias := self._bias(request, thread):
            body["logit_bias"] = bias
        if self.server.known:  # all of them: a server's own defaults, or the model's there, are others
            extra["top_k"] = params.top_k if params.top_k > 0 else self.server.every
            extra["min_p"] = params.min_p
            extra[self.server.penalty] = params.repetition_penalty
            extra["ignore_eos"] = params.ignore_eos
        return body | {"extra_body": extra}

    def _row(self, response: _Response, thread: _Thread) -> list[int]:
        """What the thread sees. Where a chunk ended by an end of the text, others read it as ended by its tag."""
        row = response.layout.row(thread.path)
        n = len(response.request.prompt_token_ids)
        if response.request.params.ignore_eos or self.wire.vocabulary.eos.isdisjoint(row[n:]):
            return row
        ends = self.wire.vocabulary.eos
        return row[:n] + [i for token in row[n:] for i in (self._end if token in ends else (token,))]

    def _bias(self, request: Request, thread: _Thread) -> dict[str, float]:
        """The request's, and of a response without tags also what never changes: that they are forbidden."""
        bias = {str(token): float(value) for token, value in request.logit_bias.items()}
        allowed = thread.allowed
        if request.params.parallelism == 0 and allowed and allowed.inverted:
            bias |= {str(i): FORBIDDEN for token in allowed.ids for i in self.wire.server_ids(token)}
        return bias


def _seed(request: Request, thread: _Thread) -> int:
    """Of its own for every thread and for every place where it is asked for again."""
    text = f"{request.seed}/{request.choice}/{'.'.join(map(str, thread.path))}/{thread.count}"
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "little") >> 1
