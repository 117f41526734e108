"""What engines that decode all live threads in one forward share: requests, threads, what is due, sampling.

A subclass says how a request gets a place and gives it up, how its prompt is prefilled, and how a
batch of due tokens becomes logits. Nothing here knows the language, nor how a cache is laid out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pastalm.engine import Capabilities, Request, SampledToken, Schedule
from pastalm.engines.sampling import Draw, Sampled, Sampler, noise_key
from pastalm.errors import EngineError, PastaError, RequestError, complaint
from pastalm.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path, TokenSet
from pastalm.layout import Layout, Placed

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(slots=True)
class Thread:
    """A thread as the engine knows it. live: neither blocked nor finished. last: place of its last
    token (-1: none yet). count: its tokens so far. logits: of its next token, fed in an
    earlier step and not sampled yet."""

    path: Path
    live: bool = True
    finished: bool = False
    allowed: TokenSet | None = None
    last: int = -1
    count: int = 0
    logits: Tensor | None = None


@dataclass(slots=True)
class Response:
    """A request, its threads and its tokens. tokens, readable: by place; readable: whether a
    penalty counts it. pending: placed but not fed yet, in order. slot: what the engine gave it."""

    request: Request
    layout: Layout
    tokens: Ints
    readable: Bools
    threads: dict[Path, Thread] = field(default_factory=dict)
    pending: list[Placed] = field(default_factory=list)
    slot: int = -1

    @property
    def prompt(self) -> Ints:
        return self.tokens[: len(self.request.prompt_token_ids)]

    @property
    def main(self) -> Thread:
        return self.threads[()]

    def due(self, chosen: set[Path] | None) -> list[Placed]:
        """The pending tokens of the chosen threads, and those that they see (None: all)."""
        if chosen is None:
            return self.pending
        needed = np.zeros(len(self.tokens), dtype=np.bool_)
        for token in self.pending:
            if token.path in chosen:
                needed |= token.row
        return [token for token in self.pending if needed[token.place]]

    def fed(self, due: Sequence[Placed]) -> None:
        places = {token.place for token in due}
        self.pending = [token for token in self.pending if token.place not in places]

    def seen(self, path: Path) -> Ints:
        """The distinct ids of reader's text and prompt that a thread sees."""
        return np.unique(self.tokens[self.layout.visible(path) & self.readable])


Batch = list[tuple[Response, list[Placed]]]
Fed = tuple[Tensor, list[Thread]]


def common_prefix(a: Ints, b: Ints) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


class BatchingEngine(ABC):
    """Decodes all threads of all requests in one forward pass per step.

    capabilities: its own; vocabulary_size: ids that it takes. schedule: which live threads decode in
    a step (all); tokens that a chosen thread needs to see are fed with it. `on_logits`, if set, is
    called with the request's id, the path and the raw logits [vocabulary] of every token sampled.
    """

    def __init__(
        self, capabilities: Capabilities, *, vocabulary_size: int, schedule: Schedule | None = None
    ) -> None:
        self.capabilities = capabilities
        self.on_logits: Callable[[str, Path, Tensor], None] | None = None
        self._capacity = capabilities.max_model_len
        self._size = vocabulary_size
        self._schedule = schedule
        self._sampler = Sampler(vocabulary_size)
        self._waiting: dict[str, Response] = {}
        self._running: dict[str, Response] = {}

    # ------------------------------------------------------------------ what an engine must do

    @abstractmethod
    def _place(self, response: Response) -> bool:
        """Gives a waiting response its place and prefills its prompt, with the logits of the main
        thread's first token; False if there is no room yet."""

    @abstractmethod
    def _leave(self, response: Response) -> None:
        """Takes a running response's place back."""

    @abstractmethod
    def _forward(self, batch: Batch, keep: list[int]) -> Tensor:
        """Feeds the due tokens; logits [len(keep), vocabulary] of those at `keep` of all of them."""

    def _feedable(self, response: Response, due: list[Placed]) -> list[Placed]:
        """Which of the due tokens can be fed in this step; a thread whose tokens wait samples nothing."""
        return due

    @abstractmethod
    def forget(self) -> None:
        """Forgets the prompts that are remembered: the next request is prefilled whole."""

    # ------------------------------------------------------------------ the protocol

    def add(self, request: Request) -> None:
        """Takes a request; it waits while there is no room. Raises RequestError if it can never fit."""
        self._check(request)
        n = len(request.prompt_token_ids)
        tokens = np.zeros(self._capacity, dtype=np.int64)
        tokens[:n] = request.prompt_token_ids
        readable = np.arange(self._capacity) < n
        layout = Layout(n, self._capacity, request.positions)
        self._waiting[request.id] = Response(request, layout, tokens, readable)

    def apply(self, request_id: str, event: Event) -> None:
        """Does what an event means. Raises RequestError for one that cannot follow."""
        response = self._running.get(request_id) or self._waiting.get(request_id)
        if response is None:
            if isinstance(event, Finished):
                return
            raise RequestError(f"no unfinished request {request_id!r}: add it first")
        thread = self._addressed(response, event)
        self._lay(response, thread, event)
        thread.allowed = event.allowed
        if isinstance(event, (Blocked, Finished)):
            thread.live = False
        elif isinstance(event, Joined):
            thread.live = True
        if isinstance(event, Finished):
            thread.finished = True
            if all(t.finished for t in response.threads.values()):
                self.cancel(request_id)

    def step(self) -> list[SampledToken]:
        """Admits what fits, then one forward pass over all that is due. Raises EngineError if it
        fails; nothing counts as fed then."""
        try:
            self._admit()
            chosen = self._chosen()
            fed = self._feed(chosen)
        except PastaError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            raise EngineError(
                f"the forward pass failed: {type(error).__name__}: {reason[0]}"
            ) from error
        sampled = self._sample(chosen, fed)
        if not (fed or sampled) and chosen is None and any(r.pending for r in self._running.values()):
            raise EngineError("no thread finds a place in the cache: lower max_threads or max_num_seqs")
        return sampled

    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def cancel(self, request_id: str) -> None:
        """Frees the request's place at once; unknown ids are ignored."""
        self._waiting.pop(request_id, None)
        response = self._running.pop(request_id, None)
        if response is not None:
            self._leave(response)

    # ------------------------------------------------------------------ requests and events

    def _check(self, request: Request) -> None:
        n, most = len(request.prompt_token_ids), request.params.max_tokens
        size = self._size
        self.capabilities.check(request)
        odd = [t for t in (*request.prompt_token_ids, *request.logit_bias) if not 0 <= t < size]
        checks = (
            (
                request.id not in self._waiting | self._running,
                f"request {request.id!r} is unfinished",
            ),
            (n > 0, "the prompt is empty: give at least one token"),
            (not odd, f"token id {odd[:1]} is outside the model's vocabulary of {size}"),
            (
                n + most <= self._capacity,
                f"prompt ({n}) + max_tokens ({most}) exceed max_model_len ({self._capacity}): shorten one",
            ),
        )
        if said := complaint(checks):
            raise RequestError(said)

    def _addressed(self, response: Response, event: Event) -> Thread:
        """The thread of an event; a new one for `Forked`."""
        path, threads = event.path, response.threads
        forked = isinstance(event, Forked)
        if forked == (path in threads) or (forked and path and path[:-1] not in threads):
            name = type(event).__name__
            raise RequestError(f"{name} of thread {path} cannot follow in {response.request.id!r}")
        if forked:
            threads[path] = Thread(path)
        return threads[path]

    def _lay(self, response: Response, thread: Thread, event: Event) -> None:
        """Gives the event's tokens their places and queues them to be fed."""
        try:
            placed = response.layout.apply(event)
        except IndexError:
            raise RequestError(
                f"request {response.request.id!r} is past max_model_len ({self._capacity})"
            ) from None
        for token in placed:
            if not 0 <= token.token < self._size:
                raise RequestError(f"token id {token.token} is outside the model's vocabulary")
            response.tokens[token.place] = token.token
            response.readable[token.place] = (
                isinstance(event, Decoded) and not event.tag and not token.forced
            )
        if placed:
            response.pending += placed
            thread.count += len(placed)
            thread.last = placed[-1].place
            thread.logits = None

    # ------------------------------------------------------------------ decoding

    def _admit(self) -> None:
        """Places waiting requests that have been started, first come first, while there is room."""
        for response in [r for r in self._waiting.values() if r.threads]:
            if not self._place(response):
                return
            self._running[response.request.id] = self._waiting.pop(response.request.id)

    def _chosen(self) -> dict[str, set[Path]] | None:
        """The threads that decode in this step (None: all that live)."""
        if self._schedule is None:
            return None
        chosen: dict[str, set[Path]] = {}
        for request_id, path in self._schedule([(s.request.id, t.path) for s, t in self._live()]):
            chosen.setdefault(request_id, set()).add(path)
        return chosen

    def _live(self) -> Iterator[tuple[Response, Thread]]:
        """The live threads, by request, then by path."""
        for response in self._running.values():
            for path in sorted(response.threads):
                if response.threads[path].live:
                    yield response, response.threads[path]

    def _feed(self, chosen: dict[str, set[Path]] | None) -> Fed | None:
        """One forward over all due tokens, if there are any; the threads that are fed up, and their logits."""
        batch = []
        for request_id, response in self._running.items():
            due = response.due(None if chosen is None else chosen.get(request_id, set()))
            if fed := self._feedable(response, due):
                batch.append((response, fed))
        if not batch:
            return None
        tokens = [(response, token) for response, due in batch for token in due]
        ready = [
            (i, thread)
            for i, (response, token) in enumerate(tokens)
            if (thread := response.threads[token.path]).last == token.place and not thread.finished
        ]
        logits = self._forward(batch, [i for i, _ in ready])
        for response, due in batch:
            response.fed(due)
        return logits, [thread for _, thread in ready]

    # ------------------------------------------------------------------ sampling

    def _sample(self, chosen: dict[str, set[Path]] | None, fed: Fed | None) -> list[SampledToken]:
        """Samples every live, chosen thread."""
        threads = [
            (response, thread)
            for response, thread in self._live()
            if chosen is None or thread.path in chosen.get(response.request.id, ())
        ]
        if fed is not None and len(fed[1]) == len(threads) and all(
            thread is ready for (_, thread), ready in zip(threads, fed[1], strict=True)
        ):
            matrix, sampling = fed[0], threads  # what the forward gave, uncopied
        else:
            for thread, row in zip(fed[1], fed[0].unbind(0), strict=True) if fed is not None else ():
                thread.logits = row
            sampling = [(r, t) for r, t in threads if t.logits is not None]
            self._check_waiting(threads)
            if not sampling:
                return []
            matrix = torch.stack([t.logits for _, t in sampling if t.logits is not None])
        draws = [self._draw(response, thread) for response, thread in sampling]
        sampled = self._sampler(matrix, draws)
        if self.on_logits is not None:
            for i, (response, thread) in enumerate(sampling):
                self.on_logits(response.request.id, thread.path, matrix[i])
        for _, thread in sampling:
            thread.logits = None
        return [_token(s, t, x) for (s, t), x in zip(sampling, sampled, strict=True)]

    @staticmethod
    def _check_waiting(threads: list[tuple[Response, Thread]]) -> None:
        """Raises EngineError if a thread has neither logits nor a token that is to be fed."""
        for response, thread in threads:
            if thread.logits is None and all(token.path != thread.path for token in response.pending):
                raise EngineError(
                    f"thread {thread.path} of {response.request.id!r} has no token to go on from: "
                    "apply what follows from a sampled token before the next step"
                )

    def _draw(self, response: Response, thread: Thread) -> Draw:
        request, params = response.request, response.request.params
        key = 0
        if not params.greedy:
            key = noise_key(request.seed, request.choice, thread.path, thread.count)
        seen = response.seen(thread.path) if params.repetition_penalty != 1 else response.tokens[:0]
        return Draw(params, key, request.logit_bias, thread.allowed, seen)


def _token(response: Response, thread: Thread, sampled: Sampled) -> SampledToken:
    return SampledToken(
        request_id=response.request.id,
        path=thread.path,
        token=sampled.token,
        logprob=sampled.logprob,
        top_logprobs=sampled.top_logprobs,
    )
