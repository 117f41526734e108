"""The engine's thread. It owns the driver; the asyncio side talks to it only by messages.

Requests of all clients are decoded together. Between two steps the thread handles new messages, so a dropped request
frees its slots before the next step. If a step fails, every running request gets the error, and the thread continues.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeAlias

from pastalm.core.driver import Response
from pastalm.core.events import Event, Finished, Forked
from pastalm.core.params import SamplingParams
from pastalm.core.transcript import Transcript
from pastalm.errors import EngineError, PastaError
from pastalm.llm import LLM
from pastalm.server.answers import Delta, Echo, ServedAnswer

log = logging.getLogger(__name__)


Update: TypeAlias = "tuple[int, Delta]"


@dataclass(slots=True, eq=False)
class Job:
    """A request of a client: `params.n` answers to each prompt, numbered prompt by prompt.

    prompts: token ids of each prompt.
    params: how each answer is sampled.
    noise: for each prompt its seed and the number of its first choice.
    echoes: for each prompt the echo that its answers start with; empty without echo.
    prompt_logprobs: how many of the most likely tokens to report for each token of the prompts (None: do not score
        the prompts). Scores are in the echoes before the first update.
    decodes: False if the prompts are only echoed.
    owner: on whose behalf, see `core.params.Request`.
    references: token ids of the references.
    answers: by number, complete before the first update.
    updates: what happened, (number, delta of one step) or the error that ended the job.
    """

    prompts: list[list[int]]
    params: SamplingParams
    noise: list[tuple[int, int]]
    echoes: list[Echo] = field(default_factory=list)
    prompt_logprobs: int | None = None
    decodes: bool = True
    owner: str = ""
    references: list[Sequence[int]] = field(default_factory=list)
    answers: list[ServedAnswer] = field(default_factory=list)
    updates: asyncio.Queue[Update | PastaError] = field(default_factory=asyncio.Queue)

    async def next(self) -> Update:
        """The next update. Raises the error that ended the job."""
        update = await self.updates.get()
        if isinstance(update, PastaError):
            raise update
        return update


@dataclass(frozen=True, slots=True)
class _Submit:
    job: Job


@dataclass(frozen=True, slots=True)
class _Drop:
    job: Job


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_JobUpdate: TypeAlias = "tuple[Job, Update | PastaError]"


class Worker:
    """Runs an LLM's driver on its own thread.

    live_threads: threads of the running answers that decode or wait for a place.
    failures: steps that failed.
    """

    def __init__(self, llm: LLM) -> None:
        self.live_threads = 0
        self.failures = 0
        self._llm = llm
        self._inbox: SimpleQueue[_Submit | _Drop | _Stop] = SimpleQueue()
        self._decoding: dict[str, tuple[Job, int, Response]] = {}
        """Job, number and response by request id, until the job is dropped."""
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

    def submit(self, job: Job) -> None:
        """Submits a request. Its first update says that it was accepted, or is the error."""
        self._inbox.put(_Submit(job))

    def drop(self, job: Job) -> None:
        """Drops a request and cancels what is still decoding; its slots are free before the next step. Call it once for
        each request."""
        self._inbox.put(_Drop(job))

    # ------------------------------------------------------------------ the engine's side

    def _run(self) -> None:
        running = True
        while running:
            try:
                running = self._turn()
            except Exception as error:
                self._fail(error)

    def _turn(self) -> bool:
        """Handles waiting messages, then takes one step. Returns False if the thread is to stop."""
        driver = self._llm.driver
        for message in self._received():
            if isinstance(message, _Submit):
                job = message.job
                self._begin(job) if job.prompt_logprobs is None else self._to_score.append(job)
            elif isinstance(message, _Drop):
                self._end(message.job)
            else:
                for response in list(driver.running.values()):
                    response.cancel()
                return False
        self._score()
        changed = driver.step() if driver.running else ()
        self._send([update for response in changed for update in self._updates(response)])
        self.live_threads = sum(
            thread.state == "live"
            for response in driver.running.values()
            for thread in response.transcript.threads.values()
        )
        return True

    def _update(self, response: Response) -> tuple[Job, Update]:
        """What is new of an answer, for its client."""
        job, number, _ = self._decoding[response.request.id]
        return job, (number, job.answers[number].take(response.take()))

    def _updates(self, response: Response) -> list[_JobUpdate]:
        """As `_update`; where an answer ends and the engine has lost a part of it, the error comes last."""
        job, (number, delta) = self._update(response)
        transcript = response.transcript
        if delta.finish_reason != "abort" or not transcript.why:
            return [(job, (number, delta))]
        error = EngineError(f"a part of the answer is missing: {transcript.why}")
        return [(job, (number, replace(delta, finish_reason=None))), (job, error)]

    def _received(self) -> Iterator[_Submit | _Drop | _Stop]:
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
        place = next(i for i, echo in enumerate(job.echoes) if echo.scores is None)
        try:
            scores = self._llm.driver.engine.score(job.prompts[place], job.prompt_logprobs or 0)
        except Exception as error:
            self._to_score.popleft()
            self._send([(job, error if isinstance(error, PastaError) else _client_error(error))])
            return
        if scores is not None:
            job.echoes[place] = replace(job.echoes[place], scores=scores)
            if place == len(job.prompts) - 1:
                self._begin(self._to_score.popleft())

    def _begin(self, job: Job) -> None:
        """Submits the answers of a job, all of them or none."""
        try:
            n = job.params.n
            updates = [self._begin_answer(job, place, i) for place in range(len(job.prompts)) for i in range(n)]
        except Exception as error:
            self._end(job)
            updates = [(job, error if isinstance(error, PastaError) else _client_error(error))]
        self._send(updates)

    def _begin_answer(self, job: Job, place: int, choice: int) -> _JobUpdate:
        """Starts an answer to prompt number `place`, and gives the first update on it."""
        number, echo = len(job.answers), job.echoes[place] if job.echoes else None
        if not job.decodes:
            events: list[Event] = [Forked(path=()), Finished(path=(), reason="length")]
            job.answers.append(ServedAnswer(Transcript(events), echo=echo))
            return job, (number, job.answers[number].take(events))
        seed, first_choice = job.noise[place]
        response = self._llm.submit(
            job.prompts[place],
            job.params,
            choice=first_choice + choice,
            seed=seed,
            owner=job.owner,
            reference_token_ids=job.references,
        )
        job.answers.append(ServedAnswer(response.transcript, job.params.stop_strings, echo))
        self._decoding[response.request.id] = (job, number, response)
        return self._update(response)

    def _end(self, job: Job) -> None:
        with contextlib.suppress(ValueError):
            self._to_score.remove(job)
        for request_id in [i for i, (owner, _, _) in self._decoding.items() if owner is job]:
            self._decoding.pop(request_id)[2].cancel()

    def _fail(self, error: Exception) -> None:
        """Every request under way gets the error; the driver has cancelled what it decoded."""
        self.failures += 1
        failure = _client_error(error)
        log.error("a step failed, %d answers with it: %s", len(self._decoding), failure)
        self._send([(job, failure) for job, _, _ in self._decoding.values()])

    def _send(self, updates: list[_JobUpdate]) -> None:
        """Hands updates to the event loop, all of a step at once. Does nothing once the loop is closed."""
        if updates:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_deliver, updates)


def _deliver(updates: list[_JobUpdate]) -> None:
    for job, update in updates:
        job.updates.put_nowait(update)


def _client_error(error: Exception) -> EngineError:
    """The error that clients get for an internal failure."""
    if isinstance(error, EngineError):
        return error
    log.error("internal error, please report it", exc_info=error)
    return EngineError(f"the engine failed ({type(error).__name__}): try again")
