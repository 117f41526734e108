"""The engine over an OpenAI-compatible completions server: vLLM, SGLang, llama.cpp's, or another.

Each stretch of a thread between syncs is one streamed completion, and its prompt the linear form of all that the
thread may see: policy `serial`. A promise opens one more, on a prefix that the server has cached; the main thread's
goes on. A sync ends a thread's completion, and the linear form with its chunks begins the next. (PASTA section 4.)

A step takes what has come: at most one token of each live thread. What a completion has said beyond that waits here,
and is dropped where the interpreter decides otherwise (a token put right, another forced, a sync): then the thread is
asked for again from what stands. So no mask need be sent, and none is but for a whole response without tags.

Prompts and replies are token ids where the server takes and tells them (vLLM), else text (`Pieces`); see `connect`.
vLLM shares the blocks of a request that still runs; SGLang only those of one that ended, so there the parent's
completion ends at a promise and is sent again beside the child's (`shares`).

Failures, thread by thread: opening one is retried by the openai client (Retry-After too), a completion that breaks
or stalls is asked for again from its last token. After `retries` failures without a token the thread waits until it
is alone, is written then, and if that fails as often it is lost: it ends there and the others go on. What cannot
get better (no such key or model, nothing at that address) is a RemoteError of the whole run.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import count
from typing import Any, Literal, Protocol, TypeAlias

import openai

from pastalm.core.events import Decoded, Event, Finished, Forked, Joined, Path, SampledToken, TokenSet
from pastalm.core.params import Request
from pastalm.core.vocabulary import Vocabulary
from pastalm.engines.base import Capabilities
from pastalm.engines.completions.pieces import Pieces
from pastalm.engines.completions.serial import SerialLayout
from pastalm.errors import CapabilityError, EngineError, RemoteError, RequestError, complaint
from pastalm.records.chat_client import check_address, explain, key, line, no_api

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

Shares: TypeAlias = Literal["running", "finished"]
"""Whose cached blocks a new request can use: those of requests that run, or of ended ones only."""


# ------------------------------------------------------------------------------ what a server says


@dataclass(frozen=True, slots=True)
class Said:
    """One token of a completion."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A completion's end. eos: the model ended; else it is to be asked for again. why: it failed; code: with that
    status. opening: the client has already tried again. unreachable: nothing answers at all. final: asking again is
    of no use."""

    eos: bool = False
    why: str = ""
    code: int = 0
    opening: bool = False
    unreachable: bool = False
    final: bool = False

    @property
    def barred(self) -> bool:
        """Whether nothing that this run asks will be answered."""
        return self.code in (401, 403, 404)


Item: TypeAlias = "Said | Ended | Exception"


class Wire(Protocol):
    """How rows become prompts, and chunks become tokens."""

    name: str
    vocabulary: Vocabulary

    def prompt(self, row: list[int]) -> Any:
        """The request's `prompt`."""

    def options(self, request: Request, shares: Shares) -> dict[str, Any]:
        """Further fields of the request, which only some servers know."""

    def said(self, choice: Any) -> list[Said]:
        """The tokens of a chunk. Raises ValueError for what is no answer."""

    def there(self, token: int) -> Iterable[int]:
        """The server's ids of a tag, or of the end."""


class Ids:
    """Token ids both ways. Raises RequestError for a vocabulary that has no end."""

    name = "token ids"

    def __init__(self, vocabulary: Vocabulary) -> None:
        if not vocabulary.eos:
            raise RequestError("the tokenizer names no end of a text: it cannot be used with this server")
        self.vocabulary = vocabulary

    def prompt(self, row: list[int]) -> list[int]:
        return row

    def options(self, request: Request, shares: Shares) -> dict[str, Any]:
        extra: dict[str, Any] = {"return_token_ids": True}
        tags = self.vocabulary.tags
        if tags is not None and request.params.parallelism > 0:
            ends = [tags.sync, tags.async_close]
            extra["stop_token_ids"] = ends + ([tags.promise_end] if shares == "finished" else [])
        if request.params.logprobs is not None:
            extra["return_tokens_as_token_ids"] = True
        return extra

    def said(self, choice: Any) -> list[Said]:
        ids = getattr(choice, "token_ids", None) or []
        if not ids and getattr(choice, "text", None):
            raise ValueError("it says text without token ids")
        size = self.vocabulary.size
        if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < size for i in ids):
            raise ValueError(f"its token ids are not the tokenizer's: {str(ids)[:60]}")
        scores = _scores(choice)
        if len(scores) != len(ids):
            return [Said(i) for i in ids]
        return [Said(i, lp, self._ids(top)) for i, (_, lp, top) in zip(ids, scores, strict=True)]

    def there(self, token: int) -> Iterable[int]:
        return (token,)

    @staticmethod
    def _ids(top: dict[str, float]) -> tuple[tuple[int, float], ...]:
        numbers = ((name.removeprefix("token_id:"), lp) for name, lp in top.items())
        return tuple((int(n), lp) for n, lp in numbers if n.isdecimal())


class Texts:
    """Text both ways; a token is a piece of text as the server cut it. model: a prepared model's own vocabulary: a
    bias is by its ids whatever the prompt is."""

    name = "text"

    def __init__(self, pieces: Pieces, model: Vocabulary | None = None) -> None:
        self._pieces = pieces
        self.vocabulary = pieces.vocabulary
        self._there: dict[int, Iterable[int]] = {}
        if model is not None and model.tags is not None and self.vocabulary.tags is not None:
            tags = zip(self.vocabulary.tags.ids, model.tags.ids, strict=True)
            self._there = {pieces.EOS: model.eos} | {here: (there,) for here, there in tags}

    def prompt(self, row: list[int]) -> str:
        return self._pieces.text(row)

    def options(self, request: Request, shares: Shares) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if self.vocabulary.tags is not None:
            extra["skip_special_tokens"] = False
        if shares == "finished" and request.params.parallelism > 0:
            extra |= {"stop": "<|/promise|>" if self.vocabulary.tags else '"/>', "no_stop_trim": True}
        return extra

    def said(self, choice: Any) -> list[Said]:
        text = getattr(choice, "text", None) or ""
        if not isinstance(text, str):
            raise ValueError(f"its text is none: {str(text)[:60]}")
        scores = _scores(choice)
        if "".join(piece for piece, _, _ in scores) != text:
            scores = [(text, None, {})] if text else []
        found: list[Said] = []
        for piece, logprob, top in scores:
            ranked = [(self._pieces.read(t), lp) for t, lp in top.items()]
            alone = tuple((t[0], lp) for t, lp in ranked if len(t) == 1)
            for i, token in enumerate(self._pieces.read(piece)):
                # the server's token may be several of ours (a tag and digits): the first stands for it
                found.append(Said(token) if logprob is None else Said(token, 0.0) if i else Said(token, logprob, alone))
        return found

    def there(self, token: int) -> Iterable[int]:
        return self._there[token]


def _scores(choice: Any) -> list[tuple[str, float | None, dict[str, float]]]:
    """Text, log-probability and alternatives of each token of a chunk; empty where they are not told."""
    told = getattr(choice, "logprobs", None)
    tokens = getattr(told, "tokens", None) or []
    n = len(tokens)
    values = getattr(told, "token_logprobs", None) or [None] * n
    tops = getattr(told, "top_logprobs", None) or [{}] * n
    if not n or len(values) != n or len(tops) != n or not all(isinstance(t, str) for t in tokens):
        return []
    clean = [{t: float(v) for t, v in (top or {}).items() if isinstance(v, int | float)} for top in tops]
    return [
        (t, float(v) if isinstance(v, int | float) else None, top)
        for t, v, top in zip(tokens, values, clean, strict=True)
    ]


# ------------------------------------------------------------------------------ the connection


@dataclass(slots=True)
class Traffic:
    """What was asked so far. completions: opened; again: of these, after a failure; tokens: that came; dropped: of
    these, not used."""

    completions: int = 0
    again: int = 0
    tokens: int = 0
    dropped: int = 0


class Connection:
    """A model behind a base URL, read on a thread of its own that only hands on what comes.

    api_key: else OPENAI_API_KEY. retries: of opening a completion. timeout: seconds without a token after which one
    has stalled.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key: str | None = None, retries: int = 3, timeout: float = 120.0
    ) -> None:
        check_address(base_url)
        self.base_url, self.model = base_url, model
        self.retries, self.timeout = retries, timeout
        self.inbox: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
        self._numbers = count()
        self._loop = asyncio.new_event_loop()
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key(api_key),
            max_retries=retries,
            timeout=timeout,
        )
        threading.Thread(target=self._loop.run_forever, name="pastalm-openai", daemon=True).start()

    def open(self, body: dict[str, Any], wire: Wire) -> tuple[int, Future[None]]:
        """Begins a completion; its number in the inbox, and what cancels it."""
        number = next(self._numbers)
        return number, asyncio.run_coroutine_threadsafe(self._read(number, body, wire), self._loop)

    def ask(self, call: Callable[[openai.AsyncOpenAI], Any]) -> Any:
        """The reply to one call, not retried. Raises what the client raises."""
        client = self._client.with_options(max_retries=0)

        async def waited() -> Any:
            return await call(client)

        return asyncio.run_coroutine_threadsafe(waited(), self._loop).result()

    def close(self) -> None:
        """Ends every completion and the thread."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    async def _read(self, number: int, body: dict[str, Any], wire: Wire) -> None:
        try:
            end = await self._stream(number, body, wire)
        except openai.OpenAIError as error:
            end = self.failure(error)
        except Exception as error:  # a mistake of ours must not leave the driver waiting
            self.inbox.put((number, error))
            return
        self.inbox.put((number, end))

    async def _stream(self, number: int, body: dict[str, Any], wire: Wire) -> Ended:
        stream = await self._client.completions.create(model=self.model, stream=True, **body)
        async with stream:
            chunks = aiter(stream)
            last = time.monotonic()
            while True:
                try:
                    async with asyncio.timeout(max(0.0, last + self.timeout - time.monotonic())):
                        chunk = await anext(chunks, None)
                    if chunk is None:
                        return Ended(why=f"{self.base_url} broke off")
                    choices = getattr(chunk, "choices", None)
                    if not choices:
                        continue
                    choice = choices[0]
                    said = wire.said(choice)
                    end = _ending(choice, said, wire)
                except TimeoutError:
                    return Ended(why=f"{self.base_url} said nothing for {self.timeout:g} s")
                except openai.OpenAIError as error:
                    return replace(self.failure(error), opening=False, unreachable=False)
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    return Ended(why=f"{self.base_url} gave no valid answer: {line(error)}")
                for token in said:
                    self.inbox.put((number, token))
                if end is not None:
                    return end
                last = time.monotonic() if said else last

    def failure(self, error: openai.OpenAIError) -> Ended:
        """What it means that a call failed."""
        why = explain(error, self.base_url, self.timeout)
        if isinstance(error, openai.APIConnectionError):
            unreachable = not isinstance(error, openai.APITimeoutError)
            return Ended(why=why, opening=True, unreachable=unreachable)
        if isinstance(error, openai.APIStatusError):
            code = error.status_code
            return Ended(why=why, final=code < 500 and code not in (408, 409, 429), opening=True, code=code)
        return Ended(why=why, opening=True)


def _ending(choice: Any, said: list[Said], wire: Wire) -> Ended | None:
    """The end that a chunk tells, if it does; what the server left out of the text at a stop is added to `said`."""
    reason = getattr(choice, "finish_reason", None)
    if reason is None:
        return None
    if reason == "length":
        return Ended()
    if reason not in ("stop", "repetition"):
        return Ended(why=f"the server ended it: {str(reason)[:60]}", final=reason == "content_filter")
    stopped = getattr(choice, "stop_reason", None) or getattr(choice, "matched_stop", None)
    vocabulary = wire.vocabulary
    last = said[-1].token if said else None
    if isinstance(stopped, str) and isinstance(wire, Texts):
        if not str(getattr(choice, "text", "") or "").endswith(stopped):
            said += [Said(token) for token in wire._pieces.read(stopped)]
        return Ended()
    if isinstance(wire, Ids) and type(stopped) is int and 0 <= stopped < vocabulary.size:
        if stopped != last:
            said.append(Said(stopped))
        return Ended()
    if last in vocabulary.eos:
        return Ended()  # its token says so itself
    return Ended(eos=True)


# ------------------------------------------------------------------------------ the engine


@dataclass(slots=True)
class _Thread:
    """A thread as the engine knows it.

    number: of its completion (None: none is open, or what it said is all taken), future: what cancels it. got: tokens
    that it said. heard: of these, not taken yet, and its end. expected: forced tokens that it has yet to say itself.
    said: what was sampled last. failures: since the last token. parked: waits until it is alone; alone: it was when
    it was last asked for.
    """

    path: Path
    live: bool = True
    finished: bool = False
    allowed: TokenSet | None = None
    number: int | None = None
    future: Future[None] | None = None
    got: int = 0
    heard: deque[Item] = field(default_factory=deque)
    expected: deque[int] = field(default_factory=deque)
    said: int | None = None
    count: int = 0
    failures: int = 0
    not_before: float = 0.0
    parked: bool = False
    alone: bool = False


@dataclass(slots=True)
class _Response:
    request: Request
    layout: SerialLayout
    threads: dict[Path, _Thread] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Server:
    """What differs between servers. known: whether it knows more than OpenAI's API does: top_k, min_p, ignore_eos and
    a repetition penalty, which it calls `penalty`. every: its top_k for all tokens."""

    shares: Shares = "running"
    known: bool = False
    penalty: str = "repetition_penalty"
    every: int = -1


SERVERS = {
    "vllm": Server(known=True),
    "sglang": Server("finished", known=True),
    "llamacpp": Server(known=True, penalty="repeat_penalty", every=0),
    "me": Server(known=True, penalty="repeat_penalty", every=0),
}
"""By what a server calls the owner of its models; "me" is llama-cpp-python's."""


class OpenAIEngine:
    """Decodes each thread as a completion of a server.

    connection, wire, server: `connect` finds them out. max_num_seqs: responses at once; more wait. max_model_len:
    tokens of prompt and answer (0: only the server knows). retries: failures of a thread without a token before it
    waits to be alone, and then before it is lost; backoff: seconds before the first, doubled for each further.
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
                self._hear(number, item)
                number, item = self.connection.inbox.get_nowait()
        except queue.Empty:
            return

    def _hear(self, number: int, item: Item) -> None:
        thread = self._reading.get(number)
        token = isinstance(item, Said)
        self.traffic.tokens += token
        if thread is None:
            self.traffic.dropped += token
        else:
            thread.got += token
            thread.heard.append(item)

    def _sampled(self) -> Iterator[SampledToken]:
        """What can be taken, one token a live thread; those without a completion are asked for."""
        for response in list(self._responses.values())[: self.capabilities.max_num_seqs]:
            for path in sorted(response.threads):
                thread = response.threads[path]
                if thread.live and (sampled := self._next(response, thread)):
                    yield sampled

    def _next(self, response: _Response, thread: _Thread) -> SampledToken | None:
        while thread.expected and thread.heard:
            item = thread.heard[0]
            if isinstance(item, Said) and item.token == thread.expected[0]:
                thread.heard.popleft()
                thread.expected.popleft()
            else:
                self._drop(thread)
        if thread.heard:
            item = thread.heard.popleft()
            if isinstance(item, Said):
                return self._take(response, thread, item)
            got = thread.got
            self._drop(thread)
            if isinstance(item, Exception):
                raise EngineError(f"reading from the server failed: {type(item).__name__}: {item}") from item
            if item.eos:
                return self._take(response, thread, Said(min(self.wire.vocabulary.eos)))
            if not got and not item.why:
                item = Ended(why=f"{self.connection.base_url} ends without a token")
            if item.why and (lost := self._failed(response, thread, item)):
                return lost
        if thread.number is None and self._may_open(response, thread):
            self._open(response, thread)
        return None

    @staticmethod
    def _take(response: _Response, thread: _Thread, item: Said) -> SampledToken:
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
        self.traffic.dropped += sum(isinstance(item, Said) for item in thread.heard)
        thread.number = thread.future = None
        thread.heard.clear()
        thread.expected.clear()

    # ------------------------------------------------------------------ failures

    def _failed(self, response: _Response, thread: _Thread, end: Ended) -> SampledToken | None:
        """What becomes of a thread whose completion failed: it is tried again soon, or alone, or it is lost."""
        if end.barred:
            raise RemoteError(end.why)
        thread.failures += 1
        if not end.final and not end.opening and thread.failures <= self.connection.retries:
            thread.not_before = time.monotonic() + self._backoff * 2 ** (thread.failures - 1)
            self.traffic.again += 1
            return None
        if not end.final and not thread.alone:
            thread.parked, thread.failures = True, 0
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
            t.live and t is not thread and (not t.parked or thread.parked and t.path < thread.path)
            for t in response.threads.values()
        )

    # ------------------------------------------------------------------ asking

    def _may_open(self, response: _Response, thread: _Thread) -> bool:
        if thread.parked:
            if self._company(response, thread):
                return False
            thread.parked = False
        return time.monotonic() >= thread.not_before

    def _open(self, response: _Response, thread: _Thread) -> None:
        body = self._body(response, thread)
        self.traffic.completions += 1
        thread.alone = not self._company(response, thread)
        thread.got = 0
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
            bias |= {str(i): FORBIDDEN for token in allowed.ids for i in self.wire.there(token)}
        return bias


def _seed(request: Request, thread: _Thread) -> int:
    """Of its own for every thread and for every place where it is asked for again."""
    text = f"{request.seed}/{request.choice}/{'.'.join(map(str, thread.path))}/{thread.count}"
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "little") >> 1


# ------------------------------------------------------------------------------ finding out


def connect(
    base_url: str,
    model: str | None = None,
    *,
    vocabulary: Callable[[str], Vocabulary | None] = lambda _: None,
    wire: Literal["ids", "text"] | None = None,
    shares: Shares | None = None,
    api_key: str | None = None,
    retries: int = 3,
    timeout: float = 120.0,
    backoff: float = 0.5,
    max_num_seqs: int = MAX_NUM_SEQS,
) -> OpenAIEngine:
    """The engine over a server, which is asked what it is and what it offers.

    model: its name there (None: the only one). vocabulary: gives that of the model's tokenizer by the model's name;
    with it, token ids are used for a prepared model if the server takes and tells them, else text, in which such a
    model's tags must be spelled (a model that writes XML is better asked in text: the XML's tags end within its
    tokens, and a chunk would begin behind what follows). wire: ids or text, whatever the model. shares: whose blocks
    a new request can use (None: by the kind of server). Raises RemoteError.
    """
    if shares not in (None, "running", "finished"):
        raise RequestError(f"unknown shares {shares!r}: running or finished")
    connection = Connection(base_url, model or "", api_key=api_key, retries=retries, timeout=timeout)
    try:
        entry = _entry(connection, model)
        connection.model = str(getattr(entry, "id", model))
        server = SERVERS.get(str(getattr(entry, "owned_by", "")), Server())
        spoken, logprobs = _wire(connection, vocabulary(connection.model), wire)
        length = getattr(entry, "max_model_len", None)
        return OpenAIEngine(
            connection,
            spoken,
            replace(server, shares=shares or server.shares),
            logprobs=logprobs,
            max_num_seqs=max_num_seqs,
            max_model_len=length if isinstance(spoken, Ids) and isinstance(length, int) else 0,
            backoff=backoff,
        )
    except BaseException:
        connection.close()
        raise


def _entry(connection: Connection, model: str | None) -> Any:
    """What the server says of the model. Raises RemoteError if it has several and none is named."""
    reply: Any = None
    try:
        reply = connection.ask(lambda client: client.models.list())
    except openai.NotFoundError as error:
        if model is None:
            raise RemoteError(f"{connection.failure(error).why}; or give --model") from None
    except (openai.APIResponseValidationError, ValueError):
        pass
    except AttributeError:  # of the client, which takes any reply for a list
        raise RemoteError(no_api(connection.base_url)) from None
    except openai.OpenAIError as error:
        raise RemoteError(connection.failure(error).why) from None
    if isinstance(reply, str):
        raise RemoteError(no_api(connection.base_url))
    listed = list(getattr(reply, "data", None) or [])
    names = [str(getattr(entry, "id", "")) for entry in listed]
    if model is None and not listed:
        raise RemoteError(f"{connection.base_url} lists no model: load one there, or give --model")
    if model is None and len(listed) != 1:
        raise RemoteError(f"{connection.base_url} serves {', '.join(names)[:120]}: give --model, one of these")
    named = [entry for entry, name in zip(listed, names, strict=True) if name == model]
    if model is None or not named and len(listed) == 1 and getattr(listed[0], "owned_by", "") in ("me", "llamacpp"):
        return listed[0]  # llama.cpp's servers answer to any name
    if listed and not named:
        raise RemoteError(f"{connection.base_url} serves no {model!r}, but {', '.join(names)[:120]}: give one of these")
    return named[0] if named else None


def _wire(
    connection: Connection, vocabulary: Vocabulary | None, chosen: Literal["ids", "text"] | None
) -> tuple[Wire, bool]:
    """How the server is asked, and whether it gives log-probabilities: by asking for one token."""
    if vocabulary is None and chosen == "ids":
        raise RemoteError("token ids need the model's tokenizer: give --tokenizer")
    if vocabulary is not None and (chosen == "ids" or chosen is None and vocabulary.tags is not None):
        ids = Ids(vocabulary)
        row = list(vocabulary.encode("Hello"))
        extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        choice = _tried(connection, row, logprobs=0, extra_body=extra)
        if choice is not None and getattr(choice, "token_ids", None):
            try:
                (said,) = ids.said(choice)
            except ValueError:
                said = None
            if said is None or not _agree(vocabulary, said.token, str(getattr(choice, "text", ""))):
                raise RemoteError(f"the model at {connection.base_url} has another tokenizer: give its --tokenizer")
            return ids, said.logprob is not None
        if chosen == "ids":
            raise RemoteError(f"{connection.base_url} does not tell token ids: leave out wire='ids'")
    if vocabulary is not None and vocabulary.tags is not None:
        texts = Texts(Pieces(prepared=True, ends=vocabulary.ends), vocabulary)
    else:
        texts = Texts(Pieces())
    choice = _tried(connection, "Hello", logprobs=1)
    if choice is not None and _scores(choice):
        return texts, True
    if choice is None:
        _tried(connection, "Hello", needed=True)
    return texts, False


def _agree(vocabulary: Vocabulary, token: int, text: str) -> bool:
    """Whether the tokenizer has for a token the text that the server has; of part of a character it cannot be said."""
    ours = vocabulary.piece(token).decode(errors="replace")
    return ours.strip() == text.strip() or "\ufffd" in ours + text or not ours or not text


def _tried(connection: Connection, prompt: Any, *, needed: bool = False, **options: Any) -> Any:
    """The choice of a completion of one token; None if the server refuses. Raises RemoteError if it cannot be asked,
    or if it refuses what is needed."""
    try:
        reply = connection.ask(
            lambda client: client.completions.create(
                model=connection.model, prompt=prompt, max_tokens=1, temperature=0, **options
            )
        )
        if isinstance(reply, str):
            raise RemoteError(no_api(connection.base_url))
        choices = getattr(reply, "choices", None)
        if choices:
            return choices[0]
        why = f"{connection.base_url} gave no valid answer: no choices"
    except openai.OpenAIError as error:
        failure = connection.failure(error)
        if failure.unreachable or failure.barred:
            raise RemoteError(failure.why) from None
        why = failure.why
    except ValueError as error:
        why = f"{connection.base_url} gave no valid answer: {line(error)}"
    if needed:
        raise RemoteError(why)
    return None
