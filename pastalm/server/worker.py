"""The engine's thread. It owns the driver; the asyncio side talks to it only by messages.

Requests of all clients are decoded together. Between two steps the thread handles new messages, so a dropped request
frees its slots before the next step. If a step fails, every running request gets the error, and the thread continues.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread

from pastalm.core.driver import Response
from pastalm.core.events import Event, Finished, Forked, SampledToken
from pastalm.core.params import SamplingParams
from pastalm.errors import EngineError, PastaError
from pastalm.llm import LLM

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Job:
    """A request of a client: `params.n` answers to each prompt, numbered prompt by prompt. noise: of each prompt its
    seed and the number of its first choice. scored: how many likeliest tokens to tell beside each prompt's own, whose
    scores are there before the first update (None: none). decodes: whether the prompts are answered at all. updates:
    what happened, (number, events of one step) or the error that ended all of it."""

    prompts: list[list[int]]
    params: SamplingParams
    noise: list[tuple[int, int]]
    scored: int | None = None
    decodes: bool = True
    scores: list[list[SampledToken]] = field(default_factory=list)
    updates: asyncio.Queue[tuple[int, list[Event]] | PastaError] = field(default_factory=asyncio.Queue)

    async def next(self) -> tuple[int, list[Event]]:
        """The next update. Raises what ended the job."""
        update = await self.updates.get()
        if isinstance(update, PastaError):
            raise update
        return update


@dataclass(frozen=True, slots=True)
class _Ask:
    job: Job


@dataclass(frozen=True, slots=True)
class _Drop:
    job: Job


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Update = tuple[Job, tuple[int, list[Event]] | PastaError]


class Worker:
    """Owns an LLM's driver on a thread of its own. live_threads: decoding now, waiting answers' first ones too.
    failures: steps that failed."""

    def __init__(self, llm: LLM) -> None:
        self.live_threads = 0
        self.failures = 0
        self._llm = llm
        self._inbox: SimpleQueue[_Ask | _Drop | _Stop] = SimpleQueue()
        self._jobs: dict[str, tuple[Job, int, Response]] = {}  # until they are dropped
        self._to_score: deque[Job] = deque()
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------ the asyncio side

    def start(self) -> None:
        """Starts the thread; updates go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Stops the thread after the current step and cancels all requests."""
        self._inbox.put(_Stop())
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def ask(self, job: Job) -> None:
        """Submits a request. Its first update says that it was accepted, or is the error."""
        self._inbox.put(_Ask(job))

    def drop(self, job: Job) -> None:
        """Drops a request and cancels what is still decoding; its slots are free before the next step. Call it once for
        each request."""
        self._inbox.put(_Drop(job))

    # ------------------------------------------------------------------ the engine's side

    def _run(self) -> None:
        going_on = True
        while going_on:
            try:
                going_on = self._turn()
            except Exception as error:
                self._fail(error)

    def _turn(self) -> bool:
        """Handles waiting messages, then takes one step. Returns False if the thread is to stop."""
        driver = self._llm.driver
        for message in self._received():
            if isinstance(message, _Ask):
                job = message.job
                self._begin(job) if job.scored is None else self._to_score.append(job)
            elif isinstance(message, _Drop):
                self._end(message.job)
            else:
                for response in list(driver.running.values()):
                    response.cancel()
                return False
        self._score()
        changed = driver.step() if driver.running else ()
        self._tell([self._update(response) for response in changed])
        self.live_threads = sum(
            thread.state == "live"
            for response in driver.running.values()
            for thread in response.transcript.threads.values()
        )
        return True

    def _update(self, response: Response) -> _Update:
        """What is new of an answer, for its client."""
        job, number, _ = self._jobs[response.request.id]
        return job, (number, response.take())

    def _received(self) -> Iterator[_Ask | _Drop | _Stop]:
        """The waiting messages; blocks for one if there is nothing else to do."""
        if not (self._llm.driver.running or self._to_score):
            yield self._inbox.get()
        with contextlib.suppress(Empty):
            while True:
                yield self._inbox.get_nowait()

    def _score(self) -> None:
        """Scores one prompt if one is waiting and there is room; one only, so that decoding is not delayed."""
        if not self._to_score:
            return
        job = self._to_score[0]
        try:
            scores = self._llm.driver.engine.score(job.prompts[len(job.scores)], job.scored or 0)
        except Exception as error:
            self._to_score.popleft()
            self._tell([(job, error if isinstance(error, PastaError) else _client_error(error))])
            return
        if scores is not None:
            job.scores.append(scores)
            if len(job.scores) == len(job.prompts):
                self._begin(self._to_score.popleft())

    def _begin(self, job: Job) -> None:
        updates: list[_Update] = []
        numbers = range(len(job.prompts) * job.params.n)
        if not job.decodes:
            nothing: list[Event] = [Forked(path=()), Finished(path=(), reason="length")]
            self._tell([(job, (number, nothing)) for number in numbers])
            return
        try:
            for number in numbers:
                place, choice = divmod(number, job.params.n)
                seed, first = job.noise[place]
                prompt = job.prompts[place]
                response = self._llm.submit(prompt, job.params, choice=first + choice, seed=seed)
                self._jobs[response.request.id] = (job, number, response)
                updates.append(self._update(response))
        except Exception as error:
            self._end(job)
            updates = [(job, error if isinstance(error, PastaError) else _client_error(error))]
        self._tell(updates)

    def _end(self, job: Job) -> None:
        with contextlib.suppress(ValueError):
            self._to_score.remove(job)
        for request_id in [i for i, (owner, _, _) in self._jobs.items() if owner is job]:
            self._jobs.pop(request_id)[2].cancel()

    def _fail(self, error: Exception) -> None:
        """Every request under way gets the error; the driver has cancelled what it decoded."""
        self.failures += 1
        failure = _client_error(error)
        log.error("a step failed, %d answers with it: %s", len(self._jobs), failure)
        self._tell([(job, failure) for job, _, _ in self._jobs.values()])

    def _tell(self, updates: list[_Update]) -> None:
        """Hands updates to the event loop, all of a step at once; nobody listens once it is closed."""
        if updates:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_deliver, updates)


def _deliver(updates: list[_Update]) -> None:
    for job, update in updates:
        job.updates.put_nowait(update)


def _client_error(error: Exception) -> EngineError:
    """The error that clients get for an internal failure."""
    if isinstance(error, EngineError):
        return error
    log.error("internal error, please report it", exc_info=error)
    return EngineError(f"the engine failed ({type(error).__name__}): try again")
