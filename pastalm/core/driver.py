"""The one loop that decodes: it steps an engine and gives every response its own events.

    driver = Driver(engine, vocabulary)
    with driver.submit(prompt_token_ids, params) as response:
        for event in response:                      # steps the engine where nothing is waiting to be read
            print(response.transcript.settled)      # leaving the loop cancels the response

A step is one forward pass of the engine for all threads of all responses. What it sampled goes to each response's
interpreter. Its events are stamped, applied to transcript and engine, and queued for the reader of that response. So
many responses can be read in turn, also from several threads, and each reader gets exactly its own events, in order.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pastalm.core.events import Event, Finished, FinishReason, Path, SampledToken, stamp
from pastalm.core.interpreter import Interpreter, Limits
from pastalm.core.layout import Policy
from pastalm.core.params import Request, SamplingParams
from pastalm.core.stops import Stops
from pastalm.core.transcript import Transcript
from pastalm.core.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pastalm.engines.base import Engine


class Threads(Protocol):
    """What turns the sampled tokens of one answer into events: the interpreter of the language, or another.

    threads: by path; `written` counts a thread's tokens. stopped: threads that a stop token has ended.
    """

    @property
    def threads(self) -> Mapping[Path, Any]: ...
    @property
    def stopped(self) -> Sequence[Path]: ...
    @property
    def finished(self) -> bool: ...
    def start(self) -> list[Event]: ...
    def advance(self, sampled: SampledToken) -> list[Event]: ...
    def finish(self, reason: FinishReason) -> list[Event]: ...


Structure: TypeAlias = "Callable[[Request, Limits], tuple[Threads, Request] | None]"
"""The threads of an answer whose form is given, and the request as the engine gets it. None: the language's form."""


class Response:
    """One answer that is being decoded, with its own queue of events.

    request: the request as the engine has it.
    transcript: the answer so far.
    error: the exception that ended it early, if a step failed.
    interrupted: called before each step that a reader causes; the response is cancelled once it returns True.

    Iterating over it, also with `async for`, gives its events in order and ends with the answer. Leaving the iteration
    early cancels it. It is a context manager, which cancels it at the end if it still decodes.
    """

    def __init__(self, driver: Driver, request: Request, interpreter: Threads, *, keep_events: bool) -> None:
        self.request = request
        self.transcript = Transcript()
        self.error: Exception | None = None
        self.interrupted: Callable[[], bool] = lambda: False
        self._driver = driver
        self._interpreter = interpreter
        self._stops = Stops(request.params.stop_strings, request.params.min_tokens)
        self._events: deque[Event] | None = deque() if keep_events else None
        self._started = time.perf_counter()
        self._steps = 0

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.request.prompt_token_ids

    @property
    def finished(self) -> bool:
        """Whether decoding has ended. Events may still wait to be read."""
        return self.transcript.finished

    def take(self) -> list[Event]:
        """The events that have not been read yet, without decoding more."""
        taken: list[Event] = []
        while self._events:
            taken.append(self._events.popleft())
        return taken

    def cancel(self) -> None:
        """Ends the response now and frees its cache. Its last events can still be read."""
        self._driver.cancel(self)

    def __iter__(self) -> Iterator[Event]:
        """Gives the events; then raises the error that ended the response early, if there is one."""
        try:
            while bool(self._events) or self._driver.advance(self):
                if self._events:
                    yield self._events.popleft()
            self.check()
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """As `__iter__`. Steps run in a worker thread, so that they do not block the event loop."""
        try:
            while bool(self._events) or await asyncio.to_thread(self._driver.advance, self):
                if self._events:
                    yield self._events.popleft()
            self.check()
        finally:
            self.cancel()

    def check(self) -> None:
        """Raises the error that ended the response early, if there is one."""
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *raised: object) -> None:
        self.cancel()


class Driver:
    """Decodes many responses on one engine. Thread-safe: one thread at a time makes a step.

    running: the responses that decode or wait, by id.
    structure: makes the threads of answers whose form a schema or a tool gives (None: there are none).
    """

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        *,
        limits: Limits | None = None,
        structure: Structure | None = None,
    ) -> None:
        limits = limits or Limits()
        if limits.max_position is None:
            limits = replace(limits, max_position=engine.capabilities.max_position)
        self.engine = engine
        self.vocabulary = vocabulary
        self.limits = limits
        self._structure = structure
        self.running: dict[str, Response] = {}
        self._ids = count()
        self._lock = RLock()

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        seed: int | None = None,
        positions: Policy = "promised",
        owner: str = "",
        reference_token_ids: Sequence[Sequence[int]] | None = None,
        keep_events: bool = True,
    ) -> Response:
        """Starts a response, which decodes from the next step on.

        prompt_token_ids: the prompt, chat template and all.
        params: how it is sampled.
        choice: number of the answer among those to one prompt; each has noise of its own.
        seed: seed of the noise (None: that of `params`, else a new one).
        positions: position policy, see `layout`.
        owner: on whose behalf, see `Request`.
        reference_token_ids: of the references of `params` (None: they are encoded here).
        keep_events: False if the events are not read. The transcript is complete either way.

        Raises RequestError if the prompt is empty or too long, CapabilityError if the engine cannot do it.
        """
        chosen = params.seed if seed is None else seed
        if reference_token_ids is None:
            reference_token_ids = self.encode_references(params)
        with self._lock:
            request = Request(
                id=str(next(self._ids)),
                prompt_token_ids=tuple(prompt_token_ids),
                params=params,
                seed=random.getrandbits(63) if chosen is None else chosen,
                choice=choice,
                logit_bias=self._bias(params),
                positions=positions,
                reference_token_ids=tuple(map(tuple, reference_token_ids)),
                owner=owner,
                vocabulary=self.vocabulary,
            )
            interpreter, request = self._threads(request)
            self.engine.add(request)
            response = Response(self, request, interpreter, keep_events=keep_events)
            self.running[request.id] = response
            self._take(response, interpreter.start())
            return response

    def check_form(self, params: SamplingParams) -> None:
        """Compiles the grammar of an answer's form, and keeps it: submitting it later takes less time.

        Raises RequestError if the schema or the tools cannot be held, or max_tokens is less than they need, and
        CapabilityError if structured answers are not supported.
        """
        self._threads(Request(id="", prompt_token_ids=(), params=params))

    def _threads(self, request: Request) -> tuple[Threads, Request]:
        """What turns the tokens of an answer into events, and the request as the engine gets it."""
        if self._structure is not None and (structured := self._structure(request, self.limits)) is not None:
            return structured
        prompt_length = len(request.prompt_token_ids)
        return Interpreter(self.vocabulary, request.params, prompt_length, self.limits), request

    def encode_references(self, params: SamplingParams) -> list[Sequence[int]]:
        """Token ids of each reference; none where nothing would be drafted from them."""
        if not self.engine.capabilities.drafts or "references" not in params.drafters:
            return []
        return [self.vocabulary.encode(text) for text in params.references or ()]

    def _bias(self, params: SamplingParams) -> dict[int, float]:
        """The request's logit bias, with what `parallelism` adds to the token that opens a promise."""
        bias = dict(params.logit_bias or {})
        if (tags := self.vocabulary.tags) is not None and params.parallelism not in (0, 1):
            bias[tags.promise] = bias.get(tags.promise, 0.0) + math.log(params.parallelism)
        return bias

    def step(self) -> list[Response]:
        """Makes one forward pass. Returns the responses that have new events, each once.

        Raises EngineError, or whatever the engine raised. Every response is then cancelled and has the error; the
        driver can be used again.
        """
        with self._lock:
            try:
                return self._step()
            except Exception as error:
                for response in list(self.running.values()):
                    response.error = error
                    self.cancel(response)
                raise

    def _step(self) -> list[Response]:
        sampled = self.engine.step()
        for request_id in {token.request_id for token in sampled}:
            self.running[request_id]._steps += 1
        changed: dict[str, Response] = {}
        for token in sampled:
            if (response := self.running.get(token.request_id)) is not None:
                self._take(response, response._interpreter.advance(token))
                changed[token.request_id] = response
        return list(changed.values())

    def advance(self, response: Response) -> bool:
        """Makes a step if a response has no event to read. Returns whether it has one, or may still get one.

        Raises as `step`, unless the response has the error: its reader raises that.
        """
        with self._lock:
            if response._events:
                return True
            if response.finished:
                return False
            if response.interrupted():
                self.cancel(response)
                return True
            try:
                self.step()
            except Exception:
                if response.error is None:
                    raise
            return True

    def run(self, responses: Sequence[Response]) -> None:
        """Steps until the given responses have ended. Raises the error that ended one of them early."""
        while not all(response.finished for response in responses):
            self.step()
        for response in responses:
            response.check()

    def cancel(self, response: Response) -> None:
        """Ends a response now and frees its cache. Does nothing if it has ended."""
        with self._lock:
            if response.request.id in self.running:
                self._take(response, response._interpreter.finish("abort"))
                self.engine.cancel(response.request.id)

    def close(self) -> None:
        """Cancels everything and closes the engine."""
        with self._lock:
            for response in list(self.running.values()):
                self.cancel(response)
            if (close := getattr(self.engine, "close", None)) is not None:
                close()

    def _take(self, response: Response, events: list[Event]) -> None:
        """Stamps events, applies them to transcript and engine and queues them. Ends the response if a stop condition
        holds."""
        batch = self._note(response, events)
        threads = response._interpreter
        response._stops.update(threads.threads[()].written, threads.stopped, response.transcript)
        cut = response._stops.cut(response.transcript)
        if cut is not None:
            batch += self._note(response, response._interpreter.finish("stop"))
            last, end = [(i, event) for i, event in enumerate(batch) if isinstance(event, Finished)][-1]
            batch[last] = replace(end, cut=cut)
            response.transcript.cut = cut
        for event in batch:
            self.engine.apply(response.request.id, event)
        if response._events is not None:
            response._events.extend(batch)
        if response._interpreter.finished:
            self.running.pop(response.request.id, None)

    @staticmethod
    def _note(response: Response, events: list[Event]) -> list[Event]:
        seconds = time.perf_counter() - response._started
        for event in events:
            stamp(event, response._steps, seconds)
            response.transcript.apply(event)
        return events
