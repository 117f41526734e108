"""The HTTP side: OpenAI's paths over one model, and a page at `/` that asks them.

The life of a request: `_Gate` (key, size of the body) -> a checked request (protocol.py) -> a place among the
answers that may wait -> token ids -> the engine's thread (worker.py) -> events -> deltas in document order -> one
JSON reply, or chunks. Whatever ends it early (the client leaves, a time limit, an error) frees its slots.
"""

from __future__ import annotations

import asyncio
import codecs
import hmac
import ipaddress
import json
import logging
import math
import random
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from openai.types import Completion, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from opentelemetry.trace import Span
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Discriminator, Tag
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pastalm.core.events import Event
from pastalm.core.params import SamplingParams
from pastalm.errors import CapabilityError, ModelError, PastaError, RequestError, complaint
from pastalm.llm import LLM
from pastalm.server import tracing
from pastalm.server.metrics import Metrics
from pastalm.server.protocol import (
    Answer,
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    Delta,
    DetokenizeRequest,
    Echo,
    Encoded,
    Refused,
    TokenizeChatRequest,
    TokenizeRequest,
    Tokens,
    TokensText,
    bad_value,
    events_key,
    line,
    refusal,
    tokenized,
    usage,
)
from pastalm.server.worker import Job, Worker

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""nginx's status for a client that has disconnected; only in the metrics."""

PAGE = {
    "/": "index.html",
    **{f"/{name}": name for name in ("page.css", "trace.js", "draw.js", "page.js")},
}
"""The page's paths, and its files in static/. They know each other by relative names, so that the page can be opened
as a file too."""
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    # the browser itself holds that the page loads nothing from elsewhere and runs no script but its own
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


_ORIGIN = re.compile("[a-z][a-z0-9+.-]*://[^/?#]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server behaves. Raises RequestError for bad values.

    name: the model's, for clients. api_key: what they must bring (None: nothing). parallelism: of
    requests that give none. thread_target: with more live threads than this, a new request that gives no
    parallelism does not fork (0: it always may).
    max_queue: answers that may wait beside those decoding. max_tokens: of a chat request that gives none.
    max_prompt_tokens: of one prompt (None: what the engine takes). max_body: bytes. client_timeout: seconds
    that a client may take to send its body, or to take a chunk. timeout: of a request, waiting included.
    cors_origins: of pages elsewhere that may ask ("*": all). hosts: names beside localhost by which one that comes
    over loopback without a key may call the server ("*": any); else a page elsewhere could, by a name of its own
    that it points here.
    """

    name: str
    api_key: str | None = None
    parallelism: float = 1.0
    thread_target: int = 32
    max_queue: int = 64
    max_tokens: int = 1024
    max_prompt_tokens: int | None = None
    max_body: int = 1 << 20
    client_timeout: float = 30.0
    timeout: float = 600.0
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            (self.api_key != "", "the API key is empty: give one, or leave it out"),
            (0 <= self.parallelism < math.inf, "parallelism must be 0 or more, and finite"),
            (min(self.thread_target, self.max_queue) >= 0, "thread_target and max_queue must be 0 or more"),
            (
                min(self.max_tokens, self.max_body, self.max_prompt_tokens or 1) >= 1,
                "max_tokens, max_prompt_tokens and max_body must be 1 or more",
            ),
            (min(self.client_timeout, self.timeout) > 0, "timeouts must be above 0"),
            (
                all(o == "*" or _ORIGIN.fullmatch(o) for o in self.cors_origins),
                "an origin is scheme://host or scheme://host:port, without a path, or *",
            ),
        )
        if problem := complaint(checks):
            raise RequestError(problem)


# ------------------------------------------------------------------------------ requests


class _Service:
    """What all requests share."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm, self.settings = llm, settings
        self.worker = Worker(llm)
        self.metrics = Metrics()
        self.unfinished = 0
        """Answers that were taken and are not over."""
        self._offered = llm.driver.engine.capabilities
        # one thread: a tokenizer is not made for several, and a long prompt must not stop the event loop
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.metrics.watch("pasta_unfinished_answers", "Answers that decode or wait.", lambda: self.unfinished)
        self.metrics.watch("pasta_running_answers", "Answers in the engine.", lambda: len(llm.driver.running))
        self.metrics.watch("pasta_live_threads", "Threads decoding at once.", lambda: self.worker.live_threads)
        self.metrics.watch("pasta_failed_steps", "Steps of the engine that failed.", lambda: self.worker.failures)

    @contextmanager
    def _places(self, answers: int) -> Iterator[None]:
        """Reserves places for some answers. Raises Refused if the queue has no room for them."""
        most = self._offered.max_num_seqs + self.settings.max_queue
        if answers > most:
            raise Refused(f"this server answers at most {most} at once: lower n or send fewer prompts", param="n")
        if self.unfinished + answers > most:
            raise Refused(
                f"{self.unfinished} answers are under way, of {most}: try again later",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.unfinished += answers
        try:
            yield
        finally:
            self.unfinished -= answers

    def _parallelism(self, requested: float | None) -> float:
        """The odds of forking: as asked, else the server's own, and none while more threads than its target live.
        Nothing lies between: a finetuned model is so sure of its tags that it still forks at a 256th of the odds.
        """
        if requested is not None:
            return requested
        live = max(self.worker.live_threads, self.unfinished)
        return 0.0 if 0 < self.settings.thread_target < live else self.settings.parallelism

    async def _job(self, request: ChatRequest | CompletionRequest) -> Job:
        """The request in token ids. Raises Refused, RequestError, ModelError."""
        parallelism = self._parallelism(request.pasta.parallelism)
        prompts = await self.encoded(request, parallelism)
        self._check_ids(request, prompts)
        max_tokens = self._fitting(max(map(len, prompts), default=0), request.wanted_tokens, request.about)
        if request.min_tokens > max_tokens:
            raise bad_value(f"min_tokens is above max_tokens, {max_tokens}: lower it", "min_tokens")
        params = request.params(
            max_tokens=max(1, max_tokens), logprobs=request.wanted_logprobs, parallelism=parallelism
        )
        scored = request.wanted_logprobs if request.echoes else None
        if scored is not None and not self._offered.prompt_logprobs:
            message = (
                f"the {self._offered.name} engine gives no log-probabilities of prompts: leave out echo or logprobs"
            )
            raise bad_value(message, "echo")
        return Job(prompts, params, _noise(prompts, params), scored, decodes=max_tokens > 0)

    async def encoded(self, request: Encoded, parallelism: float = 1.0) -> list[list[int]]:
        """Token ids of a request's prompts, encoded on the tokenizer's own thread. Raises Refused, ModelError."""
        loop = asyncio.get_running_loop()
        try:
            how = request.rendering()
        except RequestError as error:
            raise bad_value(str(error), "chat_template_kwargs") from None
        params = SamplingParams(parallelism=parallelism)
        encode = partial(self.llm.encode, rendering=how, add_special_tokens=request.add_special_tokens)
        try:
            ids = [await loop.run_in_executor(self._encoder, encode, prompt, params) for prompt in request.prompts]
        except RequestError as error:
            raise bad_value(str(error), request.about) from None
        return ids

    async def spelled(self, token_ids: Sequence[int]) -> list[str]:
        """Tokens as text, special ones as they are spelled. Raises Refused."""
        self.check_ids(token_ids, "tokens")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoder, self._spellings, token_ids)

    def _spellings(self, token_ids: Sequence[int]) -> list[str]:
        special = self.llm.loaded.tokenizer.added_tokens_decoder
        vocabulary = self.llm.loaded.vocabulary
        reader = codecs.getincrementaldecoder("utf-8")(errors="replace")
        strings = []
        for i, token in enumerate(token_ids):
            piece = vocabulary.piece(token)
            spelled = "" if piece or token not in special else str(special[token].content)
            strings.append(spelled or reader.decode(piece, final=i == len(token_ids) - 1))
        return strings

    def check_ids(self, token_ids: Iterable[int], param: str) -> None:
        """Raises Refused for ids that the model does not have, and where its own are not known here."""
        size = self.llm.loaded.vocabulary.size
        if size == sys.maxsize:
            raise bad_value("the model of this server is asked in text: its token ids are not known here", param)
        if (odd := next((i for i in token_ids if not 0 <= i < size), None)) is not None:
            raise bad_value(f"token id {odd} is outside the model's vocabulary of {size}", param)

    def _check_ids(self, request: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> None:
        if not all(prompts):
            raise bad_value("the prompt is empty: give some text", request.about)
        if request.logit_bias and self.llm.loaded.vocabulary.size < sys.maxsize:
            self.check_ids(map(int, request.logit_bias), "logit_bias")
        if request.stop_token_ids:
            self.check_ids(request.stop_token_ids, "stop_token_ids")
        if any(isinstance(prompt, list) and isinstance(prompt[0], int) for prompt in request.prompts if prompt):
            self.check_ids((i for prompt in prompts for i in prompt), "prompt")

    def named(self, model: str | None) -> None:
        """Raises Refused if the request names another model than the one served."""
        if model not in (None, self.settings.name):
            raise Refused(
                f"there is no model {model!r} here, only {self.settings.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def _fitting(self, prompt: int, requested: int | None, about: str) -> int:
        """The limit on new tokens: as requested, else the server's, or what is left of the context. Raises Refused."""
        room = self._offered.max_model_len
        most = min(self.settings.max_prompt_tokens or room, room - 1)
        if prompt > most:
            message = f"the prompt has {prompt} tokens, the most is {most}: shorten it"
        elif requested is not None and prompt + requested > room:
            message = f"the prompt's {prompt} tokens and max_tokens {requested} exceed {room}: lower one"
        else:
            return min(self.settings.max_tokens, room - prompt) if requested is None else requested
        raise Refused(message, code="context_length_exceeded", param="max_tokens" if prompt <= most else about)

    @asynccontextmanager
    async def asking(self, request: ChatRequest | CompletionRequest) -> AsyncIterator[_RunningRequest]:
        """A request under way: it has its places until the end, and whatever ends it frees its slots. Raises
        PastaError, TimeoutError."""
        begun = time.perf_counter()
        self.named(request.model)
        if not request.prompts:
            raise Refused("prompt is empty: give at least one", param="prompt")
        with self._places(len(request.prompts) * request.n):
            job = await self._job(request)
            operation = "chat" if isinstance(request, ChatRequest) else "text_completion"
            with tracing.span(operation, self.settings.name, job.params) as span:
                self.worker.ask(job)
                try:
                    under_way = _RunningRequest(job, self, begun)
                    await under_way.accepted(request)
                    yield under_way
                    under_way.tell(span)
                finally:
                    self.worker.drop(job)


class _RunningRequest:
    """A request in the engine: its answers, and what becomes certain of them."""

    def __init__(self, job: Job, service: _Service, begun: float) -> None:
        stops, number = job.params.stop_strings, len(job.prompts) * job.params.n
        self.answers = [Answer(stops) for _ in range(number)]
        self._vocabulary = service.llm.loaded.vocabulary
        self._prompt_tokens, self._model = sum(map(len, job.prompts)), service.settings.name
        self._job, self._begun, self._metrics = job, begun, service.metrics
        self._deadline = asyncio.get_running_loop().time() + service.settings.timeout
        self._first: tuple[int, list[Event]] | None = None

    async def accepted(self, request: ChatRequest | CompletionRequest) -> None:
        """Waits until the engine has it. Raises PastaError, TimeoutError."""
        self._first = await self._next()
        if not request.echoes:
            return
        job, vocabulary = self._job, self._vocabulary
        ends = vocabulary.eos.union(job.params.stop_token_ids or ())
        for i, answer in enumerate(self.answers):
            place = i // job.params.n
            ids, prompt = job.prompts[place], request.prompts[place]
            text = prompt if isinstance(prompt, str) else vocabulary.text(ids)
            answer.echo = Echo(text, ids, job.scores[place] if job.scores else None, ends)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What becomes certain, with the choice's index, until all is over. Raises EngineError, TimeoutError."""
        shown = False
        while not all(answer.transcript.finished for answer in self.answers):
            (index, events), self._first = self._first or await self._next(), None
            delta = self.answers[index].take(events)
            if delta.text and not shown:
                shown = True
                self._metrics.first_text.observe(time.perf_counter() - self._begun)
            yield index, delta
        self._metrics.seconds.observe(time.perf_counter() - self._begun)
        self._metrics.answered(self._prompt_tokens, self.answers)

    async def _next(self) -> tuple[int, list[Event]]:
        async with asyncio.timeout_at(self._deadline):
            return await self._job.next()

    def tell(self, span: Span) -> None:
        """What came of it."""
        tracing.answered(span, self._model, self._prompt_tokens, self.answers)

    def usage(self) -> CompletionUsage:
        return usage(self._prompt_tokens, self.answers, self._job.params.parallelism)


# ------------------------------------------------------------------------------ replies


class _Replying(Response):
    """The reply to a request; it is made while it is sent."""

    def __init__(self, service: _Service, request: ChatRequest | CompletionRequest) -> None:
        super().__init__()
        self._service, self._request = service, request
        kind = ChatReply if isinstance(request, ChatRequest) else CompletionReply
        self._reply = kind(service.settings.name, service.llm.loaded.vocabulary, request.wanted_logprobs is not None)


class _Whole(_Replying):
    """One JSON object."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        making = asyncio.ensure_future(self._made())
        disconnected = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((making, disconnected), return_when=asyncio.FIRST_COMPLETED)
            if making.done():
                await making.result()(scope, receive, send)
            else:
                self._service.metrics.disconnects.inc()
                await Response(status_code=CLIENT_LEFT)(scope, receive, send)
        finally:
            making.cancel()
            disconnected.cancel()
            await asyncio.wait((making, disconnected))

    async def _made(self) -> Response:
        async with self._service.asking(self._request) as under_way:
            async for _ in under_way.deltas():
                pass
        reply = self._reply.whole(under_way.answers, under_way.usage())
        return Response(line(reply), media_type="application/json")


async def _left(receive: Receive) -> None:
    """Waits until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Chunks(_Replying):
    """A stream of chunks. An error before the first is a reply of its own, a later one the last event."""

    _ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._service.settings
        # entered here and not in the generator, which is never closed if it never began
        async with self._service.asking(self._request) as under_way:
            stream = EventSourceResponse(
                self._events(under_way),
                sep="\n",
                send_timeout=settings.client_timeout,
                shutdown_grace_period=settings.timeout,  # what runs is finished
            )
            with suppress(SendTimeoutError):
                await stream(scope, receive, send)
        if not self._ended:
            self._service.metrics.disconnects.inc()

    async def _events(self, under_way: _RunningRequest) -> AsyncIterator[dict[str, str]]:
        try:
            async for chunk in self._chunks(under_way):
                yield {"data": line(chunk)}
            yield {"data": "[DONE]"}
        except Exception as error:
            if not isinstance(error, PastaError | TimeoutError):
                log.error("internal error, please report it", exc_info=error)
            yield {"data": json.dumps(_refused(error).body())}
        self._ended = True

    async def _chunks(self, under_way: _RunningRequest) -> AsyncIterator[ChatCompletionChunk | Completion]:
        request, reply = self._request, self._reply
        for index in range(len(under_way.answers)):
            if (opening := reply.opening(index, under_way.answers[index])) is not None:
                yield opening
        async for index, delta in under_way.deltas():
            if request.pasta.events:
                yield reply.chunk(index, delta, **events_key(delta.events))
            elif delta.text or delta.scored:
                yield reply.chunk(index, delta)
            if delta.finish_reason is not None:
                yield reply.closing(index, delta.finish_reason)
        if request.stream_options.include_usage:
            yield reply.used(under_way.usage())


def _refused(error: Exception) -> Refused:
    """The Refused to send to the client for an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, RequestValidationError):
        return refusal(error.errors(), error.body)
    if isinstance(error, HTTPException):
        return Refused(error.detail, error.status_code, headers=error.headers)
    if isinstance(error, TimeoutError):
        message = "the time for this request is over: ask for fewer tokens"
        # the same request would take as long again
        return Refused(message, 504, "timeout", headers={"x-should-retry": "false"})
    if isinstance(error, RequestError | CapabilityError | ModelError):
        return Refused(str(error), code="invalid_value")
    if isinstance(error, PastaError):
        return Refused(str(error), 500, "engine_error")
    return Refused("internal error, please report it", 500, "internal_error")


async def _error(request: Request, error: Exception) -> Response:
    refused = _refused(error)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if isinstance(error, RequestValidationError) and kind != "application/json" and not kind.endswith("+json"):
        has = f"not {kind}" if kind else "this request has no Content-Type"
        refused = Refused(f"send JSON with Content-Type: application/json, {has}", code="unsupported_content_type")
    return JSONResponse(refused.body(), refused.status, refused.headers)


# ------------------------------------------------------------------------------ the application


_OPEN = frozenset({*PAGE, "/health"})
"""Paths that need no key: the page, which asks for it, and what tells that the server is there."""


class _Gate:
    """Before any path: by which name the server is called, the API key, and how large a body may be and how long it
    may take. Counts the requests."""

    def __init__(self, app: ASGIApp, service: _Service, paths: frozenset[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = path if path in self._paths else "other"
                self._service.metrics.requests.labels(known, message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        refused = None
        if not self._called_rightly(scope, headers.get(b"host", b"")):
            message = "this server is not called by this Host: use localhost, or name it with --allowed-host"
            refused = Refused(message, status=403, code="host_not_allowed")
        elif path not in _OPEN and not self._admitted(headers.get(b"authorization", b"")):
            refused = Refused(
                "this server needs its API key: send Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if refused is not None:
            await (await _error(Request(scope), refused))(scope, receive, counted)
            return
        await self._app(scope, self._bounded(receive), counted)

    def _admitted(self, header: bytes) -> bool:
        key = self._service.settings.api_key
        scheme, _, given = header.partition(b" ")
        return key is None or scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key.encode())

    def _called_rightly(self, scope: Scope, host: bytes) -> bool:
        """Whether a request that may come from a browser on this machine names it by a name that is its own: a page
        elsewhere can point a name of its own here, and would then be of the same origin."""
        settings = self._service.settings
        here = (scope.get("server") or ("",))[0]
        if settings.api_key is not None or "*" in settings.hosts or not (host and _loopback(here)):
            return True
        name = _hostname(host.decode("latin-1"))
        return _loopback(name) or name in map(str.lower, settings.hosts)

    def _bounded(self, receive: Receive) -> Receive:
        """What comes in, as long as the body is not too large or too slow."""
        taken, whole = 0, False
        settings = self._service.settings

        async def bounded() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(settings.client_timeout):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body does not come: send it whole") from None
            taken += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if taken > settings.max_body:
                raise HTTPException(413, f"the body is larger than {settings.max_body} bytes: send less")
            return message

        return bounded


def _hostname(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")


def _loopback(name: str) -> bool:
    """Whether a name or address always means this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class ErrorObject(BaseModel):
    """What OpenAI's errors say."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """What a refused request gets."""

    error: ErrorObject


def application(llm: LLM, settings: Settings) -> FastAPI:
    """The ASGI application over a model; it owns the model's driver while it runs."""
    service = _Service(llm, settings)
    length = llm.driver.engine.capabilities.max_model_len
    only: dict[str, Any] = Model(
        id=settings.name, created=int(time.time()), object="model", owned_by="pastalm", max_model_len=length
    ).model_dump(exclude_unset=True)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorReply, "description": "An error"} for code in ("4XX", "5XX")
    }
    app = FastAPIOffline(title="pastalm", lifespan=running, responses=errors)
    for kind in (PastaError, TimeoutError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _error)
    key = [Depends(HTTPBearer(auto_error=False, description="The key of --api-key."))] if settings.api_key else []
    data = {"type": "string", "description": "With stream: a chunk, an error, or [DONE]"}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    chunks = {"text/event-stream": {"schema": event}}

    @app.post("/v1/chat/completions", dependencies=key, responses={200: {"model": ChatCompletion, "content": chunks}})
    async def chat(request: ChatRequest) -> Response:
        """Answers a conversation."""
        return (_Chunks if request.stream else _Whole)(service, request)

    @app.post("/v1/completions", dependencies=key, responses={200: {"model": Completion, "content": chunks}})
    async def complete(request: CompletionRequest) -> Response:
        """Completes raw prompts."""
        return (_Chunks if request.stream else _Whole)(service, request)

    @app.get("/v1/models", dependencies=key)
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [only]}

    @app.get("/v1/models/{model:path}", dependencies=key, responses={200: {"model": Model}})
    async def one_model(model: str) -> dict[str, Any]:
        """The one model, by its name."""
        service.named(model)
        return only

    @app.post("/tokenize", dependencies=key)
    async def tokenize(
        request: Annotated[
            Annotated[TokenizeRequest, Tag("<prompt>")] | Annotated[TokenizeChatRequest, Tag("<messages>")],
            Discriminator(tokenized),
        ],
    ) -> Tokens:
        """Token ids of a raw prompt or of a conversation, as vLLM gives them."""
        service.named(request.model)
        service.check_ids((), request.about)
        (ids,) = await service.encoded(request)
        strings = await service.spelled(ids) if request.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=length, tokens=ids, token_strs=strings)

    @app.post("/detokenize", dependencies=key)
    async def detokenize(request: DetokenizeRequest) -> TokensText:
        """The text of token ids, as vLLM gives it."""
        service.named(request.model)
        return TokensText(prompt="".join(await service.spelled(request.tokens)))

    @app.get("/tokenizer_info", dependencies=key)
    async def tokenizer_info() -> dict[str, Any]:
        """Special tokens and chat template, as vLLM gives them."""
        tokenizer = llm.loaded.tokenizer
        names = ("bos_token", "eos_token", "pad_token", "chat_template")
        held = {name: getattr(tokenizer, name, None) for name in names}
        return {"tokenizer_class": type(tokenizer).__name__, **held}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the engine's thread is there."""
        if not service.worker.alive:
            raise HTTPException(503, "the engine's thread has ended: start the server again")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    for path, name in PAGE.items():
        app.add_api_route(path, _file(name), methods=["GET"], include_in_schema=False)

    paths = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    app.add_middleware(_Gate, service=service, paths=paths)
    if settings.cors_origins:
        # outside the gate: a browser asks beforehand without the key, and reads refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


def _noise(prompts: list[list[int]], params: SamplingParams) -> list[tuple[int, int]]:
    """Of each prompt the seed, and the number of its first choice. The same prompt again goes on with other choices, as
    n more of it would; any prompt alone gets with its seed what it gets here."""
    seeds: dict[tuple[int, ...], int] = {}
    times: Counter[tuple[int, ...]] = Counter()
    noise = []
    for prompt in map(tuple, prompts):
        seed = seeds.setdefault(prompt, random.getrandbits(63) if params.seed is None else params.seed)
        noise.append((seed, times[prompt] * params.n))
        times[prompt] += 1
    return noise


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    """What answers with a file of the page."""

    async def file() -> Response:
        return FileResponse(Path(__file__).parent / "static" / name, headers=_PAGE_HEADERS)

    return file


# ------------------------------------------------------------------------------ running it


def listen(host: str, port: int) -> socket.socket:
    """A socket for clients; port 0 takes a free one. Raises RequestError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise RequestError(f"cannot listen on {host}, port {port} ({error}): give another --host or --port") from None


def serve(llm: LLM, settings: Settings, listening: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C; what runs then is finished, new clients are not taken. One that listens beyond
    loopback may be called by any name."""
    if not _loopback(listening.getsockname()[0]):
        settings = replace(settings, hosts=("*",))
    config = uvicorn.Config(
        application(llm, settings),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.timeout),
    )
    # uvicorn raises the signal once more when all is done; that it was SIGTERM is no failure
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts it in the background ignores it
    uvicorn.Server(config).run(sockets=[listening])
