"""The engine over an OpenAI-compatible completions server: vLLM, SGLang, llama.cpp's, or another.

Each part of a thread between syncs is one streamed completion. Its prompt is the linear form of everything that the
thread may see (policy `serial`). A promise starts a further completion on a prefix that the server has cached, while
the main thread's completion continues. A sync ends a thread's completion; the next one starts from the linear form with
the joined chunks. (PASTA section 4.)

A step returns what has arrived: at most one token of each live thread. Further tokens wait here. If the interpreter
decides otherwise (it replaced a token, forced another one, or joined), they are dropped, and a new completion is
requested from the thread's current text. So masks need not be sent; only a response without tags has one.

Prompts and replies are token ids if the server supports them (vLLM), else text (`Pieces`); see `discovery`. vLLM shares
the cached blocks of running requests. SGLang only shares those of finished ones, so there the parent's completion ends
at a promise and is requested again beside the child's (`shares`).

Failures are handled for each thread: the openai client retries requests (Retry-After included), and a completion that
breaks off or stalls is requested again from its last token. After `retries` failures without a token, the thread waits
until no other thread of its response decodes. If that fails as often, it is lost: it ends, and the others continue.
Permanent errors (invalid key, unknown model, no server) raise RemoteError and end the run.
"""

from __future__ import annotations

import queue
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
    checks=True,
)
MOMENT = 0.05
"""Seconds that a step waits for a token, so that its caller can do something else in between."""
MAX_NUM_SEQS = 64
UNKNOWN = 1 << 30
"""The context length, if only the server knows it."""
FORBIDDEN = -100.0
"""The logit bias that forbids a token, by the API's definition."""
OTHERWISE = 0.7
"""The least temperature of a completion whose first token was refused before."""


@dataclass(slots=True)
class _Thread:
    """A thread as the engine knows it.

    live: it decodes; False: it waits or has finished.
    allowed: ids that may come next.
    number: of its completion; None: none is open, or all of its tokens are taken.
    future: cancels the completion.
    received_count: tokens received from the completion.
    received: of these, those not taken yet, and the end of the completion.
    expected: forced tokens that the completion should generate itself next.
    sampled: the token that was sampled last.
    count: tokens of the thread.
    failures: since the last token.
    not_before: time before which no completion is requested, by time.monotonic().
    postponed: waits until no other thread of its response decodes.
    alone: no other thread of its response decoded when its completion was requested.
    refused: times since its last token that the interpreter took none and asked for another completion.
    guided: its completion is held to a guide. guidable: the server has not refused that.
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
    sampled: int | None = None
    count: int = 0
    failures: int = 0
    not_before: float = 0.0
    postponed: bool = False
    alone: bool = False
    refused: int = 0
    guided: bool = False
    guidable: bool = True


@dataclass(slots=True)
class _Response:
    request: Request
    layout: SerialLayout
    threads: dict[Path, _Thread] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Server:
    """What differs between servers.

    shares: whose cached blocks a new request can use.
    known: whether it supports more than OpenAI's API: top_k, min_p, ignore_eos and a repetition penalty.
    penalty: its name for the repetition penalty.
    every: its value of top_k for all tokens.
    guide: the fields of a request that hold its completion to a guide. guides: the kinds of guides that it takes.
    """

    shares: Shares = "running"
    known: bool = False
    penalty: str = "repetition_penalty"
    every: int = -1
    guides: tuple[str, ...] = ()
    guide: Callable[[Any], dict[str, Any]] = dict


class OpenAIEngine:
    """Decodes each thread as a completion of a server.

    connection, wire, server: as `discovery.connect` creates them.
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
            weights=f"{connection.model} at {connection.base_url}, sent as {wire.name}",
            logprobs=logprobs,
            guides=self.server.guides,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len or UNKNOWN,
        )
        self._backoff = backoff
        # running completions keep the connection alive, but without the engine nobody reads them
        weakref.finalize(self, connection.stop)
        self._responses: dict[str, _Response] = {}
        self._reading: dict[int, _Thread] = {}
        tags = wire.vocabulary.tags
        self._end = (tags.async_close,) if tags else tuple(wire.vocabulary.encode("</async>"))

    def close(self) -> None:
        """Ends all completions. The engine cannot be used any more."""
        self.connection.close()

    # ------------------------------------------------------------------ the protocol

    def add(self, request: Request) -> None:
        """Adds a request; beyond max_num_seqs it waits. Raises RequestError, CapabilityError."""
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
        if problem := complaint(checks):
            raise RequestError(problem)
        plain = params.top_k <= 0 and params.min_p == 0 and params.repetition_penalty == 1 and not params.ignore_eos
        offers = (
            (
                isinstance(self.wire, Ids) or dict(request.logit_bias) == dict(params.logit_bias or {}),
                "returns no token ids: parallelism can only be 0 or 1",
            ),
            (
                plain or self.server.known,
                "is of an unknown kind: leave out top_k, min_p, repetition_penalty and ignore_eos",
            ),
        )
        if problem := complaint(offers):
            raise CapabilityError(f"the server at {self.connection.base_url} {problem}")
        self._responses[request.id] = _Response(request, SerialLayout(request.prompt_token_ids))

    def apply(self, request_id: str, event: Event) -> None:
        """Applies an event; completions are requested in the next step. Raises RequestError if the event cannot follow
        those before."""
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
            thread.refused = 0
            self._continue(thread, event)
        elif isinstance(event, Forked):
            if path and self.server.shares == "finished":
                self._drop(threads[path[:-1]])
        else:
            self._drop(thread)
            thread.refused += isinstance(event, Joined) and thread.live and not event.forced
            thread.live = isinstance(event, Joined)
            thread.finished = isinstance(event, Finished)
        if all(t.finished for t in threads.values()):
            self.cancel(request_id)

    def step(self) -> list[SampledToken]:
        """At most one token of each live thread; waits a moment for the first.

        Raises RemoteError if the server cannot be used any more, EngineError.
        """
        until = time.monotonic() + MOMENT
        self._listen(0.0)
        while not (sampled := list(self._sampled())):
            left = until - time.monotonic()
            if left <= 0 or not any(t.live for r in self._responses.values() for t in r.threads.values()):
                break
            self._listen(left)
        return sampled

    def score(self, token_ids: Sequence[int], logprobs: int) -> list[SampledToken] | None:
        """Raises CapabilityError: completions servers give no logits of a prompt."""
        raise CapabilityError("the openai engine gives no log-probabilities of prompts")

    def has_unfinished(self) -> bool:
        return bool(self._responses)

    def cancel(self, request_id: str) -> None:
        """Ends the request's completions now. Unknown ids are ignored."""
        response = self._responses.pop(request_id, None)
        if response is not None:
            for thread in response.threads.values():
                self._drop(thread)

    # ------------------------------------------------------------------ receiving

    def _listen(self, seconds: float) -> None:
        """Receives what has arrived; waits at most so many seconds for the first item."""
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
        """The next token of each live thread that has one. Requests completions for threads that need one."""
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
            received_count = thread.received_count
            self._drop(thread)
            if isinstance(item, Exception):
                raise EngineError(f"reading from the server failed: {type(item).__name__}: {item}") from item
            if item.eos:
                return self._take(response, thread, CompletionToken(min(self.wire.vocabulary.eos)))
            if not received_count and not item.why:
                item = CompletionEnd(why=f"{self.connection.base_url} ends without a token")
            if item.why and (lost := self._failed(response, thread, item)):
                return lost
        if thread.number is None and self._may_open(response, thread):
            self._open(response, thread)
        return None

    @staticmethod
    def _take(response: _Response, thread: _Thread, item: CompletionToken) -> SampledToken:
        thread.sampled, thread.failures = item.token, 0
        logprobs = response.request.params.logprobs
        return SampledToken(
            request_id=response.request.id,
            path=thread.path,
            token=item.token,
            logprob=None if logprobs is None else item.logprob,
            top_logprobs=item.top[:logprobs] if logprobs else (),
        )

    def _continue(self, thread: _Thread, event: Decoded) -> None:
        """Keeps the completion if its token was accepted; the forced tokens are then expected next. Else drops it."""
        if event.token != thread.sampled:
            self._drop(thread)
        if thread.number is not None:
            thread.expected.extend(event.forced)

    def _drop(self, thread: _Thread) -> None:
        """Ends a thread's completion and drops its tokens that were not taken."""
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
        """Handles a failed completion: requests it again, now or when the thread is alone, or loses the thread."""
        if end.fatal:
            raise RemoteError(end.why)
        thread.failures += 1
        if end.final and end.opening and thread.guided:  # a form that the server cannot hold: without it
            thread.guidable, thread.failures = False, 0
            self.traffic.again += 1
            return None
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
    def _has_company(response: _Response, thread: _Thread) -> bool:
        """Whether another thread of the response decodes, or is postponed and comes before this one."""
        return any(
            t.live and t is not thread and (not t.postponed or thread.postponed and t.path < thread.path)
            for t in response.threads.values()
        )

    # ------------------------------------------------------------------ requesting

    def _may_open(self, response: _Response, thread: _Thread) -> bool:
        if thread.postponed:
            if self._has_company(response, thread):
                return False
            thread.postponed = False
        return time.monotonic() >= thread.not_before

    def _open(self, response: _Response, thread: _Thread) -> None:
        body = self._body(response, thread)
        self.traffic.completions += 1
        thread.alone = not self._has_company(response, thread)
        thread.received_count = 0
        thread.number, thread.future = self.connection.open(body, self.wire)
        self._reading[thread.number] = thread

    def _body(self, response: _Response, thread: _Thread) -> dict[str, Any]:
        """The request for a completion of what the thread sees now."""
        request = response.request
        params = request.params
        row = self._row(response, thread)
        left = min(params.max_tokens - response.tokens, self.capabilities.max_model_len - len(row))
        body: dict[str, Any] = {
            "prompt": self.wire.prompt(row),
            "max_tokens": max(1, left),
            "temperature": max(params.temperature, OTHERWISE) if thread.refused else params.temperature,
            "top_p": params.top_p,
        }
        extra = self.wire.options(request, self.server.shares)
        guide = request.guide(thread.path) if request.guide and thread.guidable else None
        thread.guided = guide is not None
        if guide is not None:
            extra |= self.server.guide(guide)
        if body["temperature"] > 0:
            body["seed"] = _seed(request, thread)
        if params.logprobs is not None:
            body["logprobs"] = params.logprobs
        if bias := self._bias(request, thread):
            body["logit_bias"] = bias
        if self.server.known:  # always all of them: the defaults of the server or of its model may differ
            extra["top_k"] = params.top_k if params.top_k > 0 else self.server.every
            extra["min_p"] = params.min_p
            extra[self.server.penalty] = params.repetition_penalty
            extra["ignore_eos"] = params.ignore_eos
        return body | {"extra_body": extra}

    def _row(self, response: _Response, thread: _Thread) -> list[int]:
        """The tokens that the thread sees. Where a chunk ended with an end-of-text token, the row has its tag."""
        row = response.layout.row(thread.path)
        n = len(response.request.prompt_token_ids)
        if response.request.params.ignore_eos or self.wire.vocabulary.eos.isdisjoint(row[n:]):
            return row
        ends = self.wire.vocabulary.eos
        return row[:n] + [i for token in row[n:] for i in (self._end if token in ends else (token,))]

    def _bias(self, request: Request, thread: _Thread) -> dict[str, float]:
        """The request's logit bias. In a response without tags it also forbids the tags."""
        bias = {str(token): float(value) for token, value in request.logit_bias.items()}
        allowed = thread.allowed
        if request.params.parallelism == 0 and allowed and allowed.inverted:
            bias |= {str(i): FORBIDDEN for token in allowed.ids for i in self.wire.server_ids(token)}
        return bias


def _seed(request: Request, thread: _Thread) -> int:
    """A seed that differs for every thread and for every place where a completion starts."""
    text = f"{request.seed}/{request.choice}/{'.'.join(map(str, thread.path))}/{thread.count}"
    text += f"/{thread.refused}" if thread.refused else ""
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "little") >> 1
