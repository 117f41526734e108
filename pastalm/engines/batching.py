"""The common part of engines that decode all live threads in one forward pass: requests, threads, batches, sampling.

A subclass implements how a request gets a slot and gives it back, how a piece of a prompt is prefilled, and how a batch
of pending tokens becomes logits [rows, vocabulary]: NumPy arrays, unless the subclass passes another sampler. Nothing
here knows the language, nor how a cache is laid out.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pastalm.core.events import Blocked, Decoded, Event, Finished, Forked, Joined, Path, SampledToken, TokenSet
from pastalm.core.layout import Layout, Placed
from pastalm.core.params import Request, SamplingParams
from pastalm.engines.base import Capabilities, Schedule
from pastalm.engines.drafts.budget import Candidate
from pastalm.engines.drafts.drafting import Drafting
from pastalm.engines.drafts.response import ResponseDrafts
from pastalm.engines.processors import chain
from pastalm.engines.processors.base import Visible
from pastalm.engines.sampling import ArraySampler, Draw, Sampled, Sampler, noise_key
from pastalm.engines.sampling import Ints as Ints
from pastalm.errors import EngineError, PastaError, RequestError, complaint

SCORED = 128
"""Tokens that `score` feeds in one pass. Each takes a row of logits."""

Bools = NDArray[np.bool_]
Rows: TypeAlias = Any
"""Logits [rows, vocabulary]: an array of the kind that the engine's sampler takes."""


@dataclass(slots=True, eq=False)
class FedGuess:
    """A guess that the last forward pass fed behind a thread's last token.

    placed: where it lies and what it sees.
    drafter: who guessed it.
    logits: [vocabulary] of the token behind it, in memory of the last pass.
    likeliest: as a thread's.
    """

    placed: Placed
    drafter: str
    logits: Any = None
    likeliest: int = -1


@dataclass(slots=True, eq=False)
class Thread:
    """A thread as the engine knows it.

    live: neither blocked nor finished.
    last: place of its last token (-1: none yet).
    count: its tokens so far.
    logits: [vocabulary] of its next token, fed in an earlier step and not sampled yet.
    likeliest: the id of the largest of its next token's logits, if the engine has told (-1: not).
    guesses: what was fed ahead and may still come true.
    drafter: who guessed the last token, if the last pass had fed it ahead, so that `logits` are there; else "".
    drafted: drafters of the guesses that were fed behind its last token.
    processors: of its logits, in order.
    visible: the ids that it sees, for processors that read them (None: there are none).
    lost: why it cannot go on ("": it can): a processor failed at what it was told.
    """

    path: Path
    live: bool = False
    finished: bool = False
    allowed: TokenSet | None = None
    last: int = -1
    count: int = 0
    logits: Any = None
    likeliest: int = -1
    guesses: list[FedGuess] = field(default_factory=list)
    drafter: str = ""
    drafted: tuple[str, ...] = ()
    processors: chain.Chain = ()
    visible: Visible | None = None
    lost: str = ""

    def may_sample(self, token: int) -> bool:
        return self.allowed is None or token in self.allowed


@dataclass(slots=True, eq=False)
class RequestState:
    """A request that waits or runs, its threads and its tokens.

    tokens: [places], by place.
    count: how many tokens there are, the prompt's included.
    live: the live threads, by path.
    pending: tokens that have a place and were not fed yet, in order.
    processors: of the main thread, when it begins.
    simple: whether each token is the likeliest that is allowed: greedy, without processors and log-probabilities.
    slot: what the engine gave it.
    cached: how many of the prompt's tokens are in the cache.
    drafts: guesses at its next tokens (None: it wants none).
    """

    request: Request
    layout: Layout
    tokens: Ints
    count: int
    processors: chain.Chain
    simple: bool
    threads: dict[Path, Thread] = field(default_factory=dict)
    live: list[Thread] = field(default_factory=list)
    unfinished: int = 0
    pending: list[Placed] = field(default_factory=list)
    slot: int = -1
    cached: int = 0
    drafts: ResponseDrafts | None = None

    @property
    def prompt(self) -> Ints:
        return self.tokens[: len(self.request.prompt_token_ids)]

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt is in the cache, so that its threads can decode."""
        return self.cached == len(self.request.prompt_token_ids)

    @property
    def main(self) -> Thread:
        return self.threads[()]

    def wake(self, thread: Thread) -> None:
        if not thread.live:
            thread.live = True
            insort(self.live, thread, key=_path)

    def rest(self, thread: Thread) -> None:
        if thread.live:
            thread.live = False
            self.live.remove(thread)

    def due(self, chosen: set[Path] | None) -> list[Placed]:
        """The pending tokens of the chosen threads (None: of all) and those that they see."""
        if chosen is None:
            return self.pending
        needed = 0
        for token in self.pending:
            if token.path in chosen:
                needed |= token.sees
        return [token for token in self.pending if needed >> token.place & 1]

    def fed(self, due: Sequence[Placed]) -> None:
        if len(due) == len(self.pending):
            self.pending = []
            return
        places = {token.place for token in due}
        self.pending = [token for token in self.pending if token.place not in places]


Batch = list[tuple[RequestState, list[Placed]]]


@dataclass(slots=True)
class Part:
    """What a pass feeds of one request. ends: the threads that have no token behind those of `due`, each with the index
    of its last one there."""

    state: RequestState
    due: list[Placed]
    ends: list[tuple[int, Thread]]


Fed = tuple[Rows, list[Thread]]
Chosen = dict[str, set[Path]] | None
"""The threads that decode in a step, by request (None: all that live)."""


def _path(thread: Thread) -> Path:
    return thread.path


def common_prefix(a: Ints, b: Ints) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


PREFILL_CHUNK = 512
"""Tokens of a prompt in one pass, where nothing decodes."""
PREFILL_BUDGET = 64
"""Tokens of prompts in a step in which others decode. A processor reads 64 nearly as fast as it can
(benchmarks/README.md), and they delay a step by tens of milliseconds."""


class BatchingEngine(ABC):
    """Decodes all threads of all requests in one forward pass per step, and prefills new prompts in pieces beside it.

    capabilities: of the engine.
    vocabulary_size: number of token ids.
    schedule: which live threads decode in a step (None: all). Pending tokens that a chosen thread sees are fed with it.
    sampler: samples from the arrays that `_forward` returns (None: NumPy arrays).
    prefill_chunk: most prompt tokens in one pass.
    prefill_budget: most prompt tokens in a step in which other threads decode, so that a prompt does not delay them
    (Sarathi-Serve, arXiv 2403.02310).
    prefill_block: a prompt is read in passes of so many tokens, and cached prompts are reused in whole blocks, so that
    the prefix cache does not change rounding (1: passes begin and end anywhere).

    on_logits: if set, it is called for every sampled token with the request's id, the thread's path and the raw logits
    [vocabulary], an array that is valid until it returns.

    Raises RequestError if `prefill_chunk` or `prefill_budget` is below 1.
    """

    _page = 1
    """Places that a thread takes at once."""
    _rows_alike = False
    """Whether a row of a pass is the same to the last bit whatever other rows it has. The end of a prompt that given
    tokens follow is then fed with them."""

    def __init__(
        self,
        capabilities: Capabilities,
        *,
        vocabulary_size: int,
        schedule: Schedule | None = None,
        sampler: Sampler | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        prefill_budget: int = PREFILL_BUDGET,
        prefill_block: int = 1,
    ) -> None:
        if min(prefill_chunk, prefill_budget) < 1:
            raise RequestError("prefill_chunk and prefill_budget must be 1 or more")
        self.capabilities = replace(capabilities, prompt_logprobs=True, processors=True)
        self.on_logits: Callable[[str, Path, Any], None] | None = None
        self._capacity = capabilities.max_model_len
        self._size = vocabulary_size
        self._schedule = schedule
        self._chunk, self._budget = prefill_chunk, min(prefill_budget, prefill_chunk)
        self._block = min(prefill_block, prefill_chunk)
        self._sampler = sampler if sampler is not None else ArraySampler(vocabulary_size)
        self._drafting = Drafting(learns=self._rows_alike)
        self._rows = 0
        self._likeliest: Sequence[int] = ()
        """The id of the largest logit of each row of the last `_forward`, the first of equal ones (-1: not told).
        Empty where the engine tells of none."""
        self._waiting: dict[str, RequestState] = {}
        self._running: dict[str, RequestState] = {}

    # ------------------------------------------------------------------ what an engine must do

    @abstractmethod
    def _place(self, state: RequestState) -> bool:
        """Gives a waiting request its place; False if there is no room yet.

        `state.cached` becomes how many of the prompt's tokens the place holds already, at most all but the last.
        """

    @abstractmethod
    def _prefill(self, state: RequestState, stop: int, logits: bool) -> Any:
        """Feeds the prompt's tokens `state.cached` .. stop - 1 in one pass. The logits [vocabulary] of the last of
        them, in memory of their own, if they are wanted."""

    def _remember(self, state: RequestState, logits: Any) -> None:  # noqa: B027 - an engine may have no memory
        """The prompt's tokens up to `state.cached` are in the cache. logits: [vocabulary] behind the last of them, if
        they are known."""

    @abstractmethod
    def _leave(self, state: RequestState) -> None:
        """Takes the place of a running request back."""

    @abstractmethod
    def _forward(self, batch: Batch, keep: list[int]) -> Rows:
        """Feeds the due tokens; logits [len(keep), vocabulary] of those at `keep` of all of them. Their memory
        may be written anew by the next call of this or of `_place`: what is kept longer is copied here."""

    def _room(self, request: Request) -> int:
        """How many places the request's tokens may lie among: at least as many as it may come to have tokens."""
        return self._capacity

    def _feedable(self, state: RequestState, due: list[Placed]) -> list[Placed]:
        """Which of the due tokens can be fed in this step; a thread whose tokens wait samples nothing."""
        return due

    @abstractmethod
    def forget(self) -> None:
        """Clears the prefix cache: the next request is prefilled whole."""

    # ------------------------------------------------------------------ the protocol

    def add(self, request: Request) -> None:
        """Takes a request; it waits while there is no room. Raises RequestError if it can never fit."""
        self._check(request)
        processors = chain.begin(request)
        n, places = len(request.prompt_token_ids), self._room(request)
        tokens = np.zeros(places, dtype=np.int64)
        tokens[:n] = request.prompt_token_ids
        layout = Layout(n, places, request.positions, page=self._page)
        drafts = self._drafting.of(request) if self.capabilities.drafts else None
        simple = request.params.greedy and request.params.logprobs is None and not processors
        self._waiting[request.id] = RequestState(request, layout, tokens, n, processors, simple, drafts=drafts)

    def apply(self, request_id: str, event: Event) -> None:
        """Updates the request by an event. Raises RequestError if the event cannot follow those before it."""
        state = self._running.get(request_id) or self._waiting.get(request_id)
        if state is None:
            if isinstance(event, Finished):
                return
            raise RequestError(f"no unfinished request {request_id!r}: add it first")
        thread = self._addressed(state, event)
        self._lay(state, thread, event)
        if thread.processors and not thread.lost:
            self._tell(state, thread, event)
        thread.allowed = event.allowed
        if isinstance(event, (Blocked, Finished)):
            state.rest(thread)
        elif isinstance(event, Joined):
            state.wake(thread)
        if isinstance(event, Finished) and not thread.finished:
            thread.finished = True
            state.unfinished -= 1
            if not state.unfinished:
                self.cancel(request_id)

    def step(self) -> list[SampledToken]:
        """Admits the requests that fit, then makes one forward pass over all pending tokens. Raises EngineError if it
        fails; the tokens stay pending then.

        Where guesses came true, their threads sample from the logits that are there, and there is no pass."""
        try:
            ahead = self._ahead()
            if not ahead:
                self._drop_guesses()
                self._admit()
                self._read()
            chosen = self._chosen()
            begun = time.perf_counter()
            fed = None if ahead else self._feed(chosen)
        except PastaError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            raise EngineError(f"the forward pass failed: {type(error).__name__}: {reason[0]}") from error
        sampled = self._sample(chosen, fed)
        if fed:
            self._drafting.costs.note(self._rows, time.perf_counter() - begun)
        if not (fed or sampled) and chosen is None and any(r.pending and r.prefilled for r in self._running.values()):
            raise EngineError("no thread finds a place in the cache: lower max_threads or max_num_seqs")
        return sampled

    def score(self, token_ids: Sequence[int], logprobs: int) -> list[SampledToken] | None:
        """Each given token but the first with its log-probability; None while there is no room. The first is a prompt,
        the others are forced behind it, `SCORED` of them in a pass. Raises RequestError."""
        first, *rest = token_ids
        if not rest:
            return []
        params = SamplingParams(temperature=0, max_tokens=len(rest), logprobs=logprobs, parallelism=0, drafts="off")
        request = Request(id="score", prompt_token_ids=(first,), params=params)
        self.add(request)
        self.apply(request.id, Forked(path=()))
        state = self._waiting.pop(request.id)
        if not self._place(state):
            return None
        try:
            state.cached = 0
            logits = self._prefill(state, 1, True)
            scored = self._scores(state, self._sampler.stack([logits]), rest[:1])
            self._lay(state, state.main, Joined(path=(), forced=tuple(rest[:-1])))
            for start in range(1, len(rest), SCORED):
                tokens = rest[start : start + SCORED]
                due, state.pending = state.pending[: len(tokens)], state.pending[len(tokens) :]
                scored += self._scores(state, self._forward([(state, due)], list(range(len(due)))), tokens)
        finally:
            self._leave(state)
        return scored

    def _scores(self, state: RequestState, logits: Rows, tokens: Sequence[int]) -> list[SampledToken]:
        """Given tokens with their log-probabilities by the logits [len(tokens), vocabulary]."""
        params = state.request.params
        draws = [Draw(params, allowed=TokenSet(frozenset({token}))) for token in tokens]
        scored = [_token(state, state.main, sampled) for sampled in self._sampler(logits, draws)]
        if lost := next((each.lost for each in scored if each.lost), ""):
            raise RequestError(lost)
        return scored

    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def cancel(self, request_id: str) -> None:
        """Frees the request's place at once; unknown ids are ignored."""
        self._waiting.pop(request_id, None)
        state = self._running.pop(request_id, None)
        if state is not None:
            self._leave(state)
            if state.drafts is not None:
                state.drafts.close()

    # ------------------------------------------------------------------ requests and events

    def _check(self, request: Request) -> None:
        n, most = len(request.prompt_token_ids), request.params.max_tokens
        size = self._size
        self.capabilities.check(request)
        odd = [t for t in (*request.prompt_token_ids, *request.logit_bias) if not 0 <= t < size]
        checks = (
            (
                request.id not in self._waiting and request.id not in self._running,
                f"request {request.id!r} is unfinished",
            ),
            (n > 0, "the prompt is empty: give at least one token"),
            (not odd, f"token id {odd[:1]} is outside the model's vocabulary of {size}"),
            (
                n + most <= self._capacity,
                f"prompt ({n}) + max_tokens ({most}) exceed max_model_len ({self._capacity}): shorten one",
            ),
        )
        if problem := complaint(checks):
            raise RequestError(problem)

    def _addressed(self, state: RequestState, event: Event) -> Thread:
        """The thread of an event; a new one for `Forked`."""
        path, threads = event.path, state.threads
        forked = isinstance(event, Forked)
        if forked == (path in threads) or (forked and path and path[:-1] not in threads):
            name = type(event).__name__
            raise RequestError(f"{name} of thread {path} cannot follow in {state.request.id!r}")
        if forked:
            threads[path] = self._begun(state, path)
            state.unfinished += 1
            state.wake(threads[path])
            if state.drafts is not None:
                state.drafts.begin(path)
        return threads[path]

    def _lay(self, state: RequestState, thread: Thread, event: Event) -> None:
        """Gives the event's tokens their places and queues them to be fed."""
        tokens = (event.token, *event.forced) if isinstance(event, Decoded) else event.forced
        for token in tokens:
            if not 0 <= token < self._size:
                raise RequestError(f"token id {token} is outside the model's vocabulary")
        if state.count + len(tokens) > self._capacity:
            raise self._overlong(state)
        try:
            placed = state.layout.apply(event)
        except IndexError:
            raise self._overlong(state) from None
        if thread.visible is not None:
            self._note_visible(state, thread.visible, event, placed)
        if not placed:
            return
        state.count += len(placed)
        for each in placed:
            state.tokens[each.place] = each.token
        state.pending += placed[self._confirm(state, thread, placed) :]
        thread.count += len(placed)
        thread.last = placed[-1].place

    def _confirm(self, state: RequestState, thread: Thread, placed: list[Placed]) -> int:
        """How many of a thread's new tokens have been fed as guesses. If all, its next logits are there already."""
        guesses, thread.guesses, thread.logits, thread.drafter = thread.guesses, [], None, ""
        thread.likeliest = -1
        if state.drafts is not None:
            for each in placed:
                state.drafts.write(each)
        if not guesses:
            return 0
        right = 0
        while right < min(len(guesses), len(placed)) and placed[right] == guesses[right].placed:
            right += 1
        if right == len(placed):
            last, thread.guesses = guesses[right - 1], guesses[right:]
            thread.logits, thread.likeliest, thread.drafter = last.logits, last.likeliest, last.drafter
        return right

    @staticmethod
    def _tell(state: RequestState, thread: Thread, event: Event) -> None:
        """Tells a thread's processors what it joins and writes. If one fails, the thread is lost."""
        try:
            if isinstance(event, Joined):
                children = [state.threads[child] for child in event.children]
                chain.join(thread.processors, [child.processors for child in children if not child.lost])
            chain.write(thread.processors, event)
        except PastaError as error:
            thread.lost = str(error)

    @staticmethod
    def _begun(state: RequestState, path: Path) -> Thread:
        """A thread that begins: its processors come from its parent's, and it sees what that sees."""
        if path:
            parent = state.threads[path[:-1]]
            visible = None if parent.visible is None else parent.visible.fork()
            thread = Thread(path, visible=visible, lost=parent.lost)
            if not thread.lost:
                try:
                    thread.processors = chain.fork(parent.processors, path)
                except PastaError as error:
                    thread.lost = str(error)
            return thread
        visible = Visible(state.request.prompt_token_ids) if chain.reads_visible(state.processors) else None
        return Thread(path, processors=state.processors, visible=visible)

    @staticmethod
    def _note_visible(state: RequestState, visible: Visible, event: Event, placed: Sequence[Placed]) -> None:
        """Adds what a thread comes to see by an event: joined chunks, then its own tokens."""
        if isinstance(event, Joined):
            joined = [state.threads[child].visible for child in event.children]
            visible.join([each for each in joined if each is not None])
        for token in placed:
            visible.write(token.token)

    def _overlong(self, state: RequestState) -> RequestError:
        return RequestError(f"request {state.request.id!r} is past max_model_len ({self._capacity})")

    # ------------------------------------------------------------------ decoding

    def _admit(self) -> None:
        """Places waiting requests that have been started, first come first, while there is room."""
        for state in [r for r in self._waiting.values() if r.threads]:
            if not self._place(state):
                return
            self._running[state.request.id] = self._waiting.pop(state.request.id)

    def _read(self) -> None:
        """Prefills the prompts of new requests, first come first: in this step only as many tokens as the budget has if
        others decode, else one chunk."""
        new = [r for r in self._running.values() if not r.prefilled]
        left = self._chunk if len(new) == len(self._running) else self._budget
        for state in new:
            n = len(state.prompt)
            if left > 0:
                self._recall(state)
            while left > 0 and not state.prefilled:
                stop = min(n, state.cached + left)
                if self._block > 1:
                    stop = min(n, (state.cached // self._block + 1) * self._block)
                left -= stop - state.cached
                wanted = stop == n and state.main.last < 0
                if stop == n and not wanted and self._rows_alike and len(new) == 1:
                    # fed with what follows; of several, others may take over what one has read
                    left_over = range(state.cached, n)
                    state.pending[:0] = [Placed((), int(state.tokens[i]), i, i, (2 << i) - 1) for i in left_over]
                    state.cached = n
                    return
                logits = self._prefill(state, stop, wanted)
                state.cached = stop
                self._remember(state, logits)
                if wanted:
                    state.main.logits = logits

    def _recall(self, state: RequestState) -> None:  # noqa: B027 - an engine may have nothing to take over
        """Takes over a prompt that another request has read whole since this one was placed, if the engine can: several
        answers to one prompt then begin in the same step, as they do where the prompt is remembered."""

    def _chosen(self) -> Chosen:
        """The threads that decode in this step (None: all that live)."""
        if self._schedule is None:
            return None
        chosen: dict[str, set[Path]] = {}
        live = [(r.request.id, t.path) for r in self._decoding() for t in r.live]
        for request_id, path in self._schedule(live):
            chosen.setdefault(request_id, set()).add(path)
        return chosen

    def _decoding(self) -> Iterator[RequestState]:
        """The requests whose prompt is in the cache."""
        return (state for state in self._running.values() if state.prefilled)

    def _feed(self, chosen: Chosen) -> Fed | None:
        """One forward pass over all due tokens, if there are any, and guesses behind them. Returns the logits and the
        threads they belong to: those with no pending token left."""
        parts = [part for state in self._decoding() if (part := self._part(state, chosen)).due]
        if not parts:
            return None
        guesses = self._guesses(parts)
        batch: Batch = []
        keep: list[int] = []
        owners: list[Thread | FedGuess] = []
        n = 0
        for part in parts:
            fed = part.due
            keep += [n + i for i, _ in part.ends]
            owners += [thread for _, thread in part.ends]
            if guessed := [guess for _, thread in part.ends for guess in guesses.get(thread, ())] if guesses else []:
                keep += range(n + len(fed), n + len(fed) + len(guessed))
                owners += guessed
                fed = [*fed, *(guess.placed for guess in guessed)]
            batch.append((part.state, fed))
            n += len(fed)
        self._rows = n
        logits = self._forward(batch, keep)
        for part in parts:
            part.state.fed(part.due)
            if part.due[0].place < len(part.state.prompt):
                self._remember(part.state, None)
        return self._dealt(logits, owners, guesses)

    def _part(self, state: RequestState, chosen: Chosen) -> Part:
        """What a pass feeds of a request."""
        due = self._feedable(state, state.due(None if chosen is None else chosen.get(state.request.id, set())))
        ends = [(i, thread) for i, token in enumerate(due) if (thread := state.threads[token.path]).last == token.place]
        return Part(state, due, [(i, thread) for i, thread in ends if not thread.finished])

    def _dealt(self, logits: Rows, owners: list[Thread | FedGuess], guesses: dict[Thread, list[FedGuess]]) -> Fed:
        """The logits of threads; those behind guesses are left with the guesses."""
        for owner, token in zip(owners, self._likeliest, strict=False):
            owner.likeliest = token
        threads = [owner for owner in owners if isinstance(owner, Thread)]
        if not guesses:
            return logits, threads
        rows = []
        for owner, row in zip(owners, logits, strict=True):
            if isinstance(owner, Thread):
                rows.append(row)
            else:
                owner.logits = row
        for thread, fed in guesses.items():
            thread.guesses, thread.drafted = fed, tuple(guess.drafter for guess in fed)
        return self._sampler.stack(rows), threads

    # ------------------------------------------------------------------ drafts

    def _guesses(self, parts: Sequence[Part]) -> dict[Thread, list[FedGuess]]:
        """What is fed ahead in a pass: the guesses that are worth their rows, in places kept for them."""
        owners: list[tuple[RequestState, Thread]] = []
        candidates: list[Candidate] = []
        rows, tokens = sum(len(part.due) for part in parts), sum(len(part.ends) for part in parts)
        if not self._drafting.pays(rows, tokens):
            return {}
        for part in parts:
            state, drafts = part.state, part.state.drafts
            if drafts is None:
                continue
            for _, thread in part.ends:
                if thread.live and (most := self._most_guesses(state, thread)) > 0:
                    context = drafts.context(thread.path, state.layout.sees(thread.path))
                    owners.append((state, thread))
                    candidates.append(Candidate(drafts, context, most, thread.may_sample))
        if candidates:
            self._drafting.choose(candidates, rows)
        guesses: dict[Thread, list[FedGuess]] = {}
        for (state, thread), candidate in zip(owners, candidates, strict=True):
            if candidate.guesses and (
                placed := state.layout.guess(thread.path, [guess.token for guess in candidate.guesses])
            ):
                guesses[thread] = [
                    FedGuess(at, guess.drafter) for at, guess in zip(placed, candidate.guesses, strict=False)
                ]
        return guesses

    def _most_guesses(self, state: RequestState, thread: Thread) -> int:
        """How many guesses a thread can take: what is left of the model's positions, and of the request's tokens."""
        positions = self.capabilities.max_position or 2**31
        return min(self._capacity - state.count, positions - state.layout.next_position(thread.path)) - 1

    def _ahead(self) -> bool:
        """Whether a live thread has logits behind a guess that came true, and may decode now."""
        if self._schedule is not None:
            return False
        return any(thread.drafter for state in self._running.values() for thread in state.live)

    def _drop_guesses(self) -> None:
        """Forgets guesses before the memory of their logits is written anew; logits that a thread has stay."""
        for state in self._running.values():
            if state.drafts is None:
                continue
            for thread in state.threads.values():
                thread.guesses = []
                if thread.drafter and thread.logits is not None:
                    thread.logits = self._sampler.copy(thread.logits)

    # ------------------------------------------------------------------ sampling

    def _sample(self, chosen: Chosen, fed: Fed | None) -> list[SampledToken]:
        """Samples every live, chosen thread."""
        owners, threads = self._deciding(chosen)
        logits, ready = fed if fed is not None else ((), [])
        apart = ready != threads  # else: what the forward gave, as it lies
        if apart:
            for thread, row in zip(ready, logits, strict=True):
                thread.logits = row
            self._check_waiting(owners, threads)
            owners = [r for r, t in zip(owners, threads, strict=True) if t.logits is not None]
            threads = [t for t in threads if t.logits is not None]
            logits = self._sampler.stack([t.logits for t in threads]) if threads else ()
        sampled = self._sampled(owners, threads, logits) if threads else []
        if apart:
            for thread in threads:
                thread.logits = None
            for thread in ready:
                if thread.logits is not None:
                    thread.logits = self._sampler.copy(thread.logits)
        return sampled

    def _deciding(self, chosen: Chosen) -> tuple[list[RequestState], list[Thread]]:
        """The live, chosen threads by request, then by path, each with the state of its request."""
        owners: list[RequestState] = []
        threads: list[Thread] = []
        for state in self._decoding():
            live = state.live
            if chosen is not None:
                live = [t for t in live if t.path in chosen.get(state.request.id, ())]
            owners += [state] * len(live)
            threads += live
        return owners, threads

    def _sampled(self, owners: list[RequestState], threads: list[Thread], logits: Rows) -> list[SampledToken]:
        """A token for each thread, of the logits [threads, vocabulary]. A thread whose row fails is lost."""
        left = [i for i, (r, t) in enumerate(zip(owners, threads, strict=True)) if not _told(r, t)]
        drawn: dict[int, Sampled] = {}
        if left:
            rows = logits if len(left) == len(threads) else self._sampler.stack([logits[i] for i in left])
            draws = [self._draw(owners[i], threads[i]) for i in left]
            drawn = dict(zip(left, self._sampler(rows, draws), strict=True))
        if self.on_logits is not None:
            for state, thread, row in zip(owners, threads, logits, strict=True):
                self.on_logits(state.request.id, thread.path, row)
        tokens = [
            _token(r, t, drawn[i] if i in drawn else Sampled(t.likeliest))
            for i, (r, t) in enumerate(zip(owners, threads, strict=True))
        ]
        for thread in threads:
            thread.drafter, thread.drafted, thread.likeliest = "", (), -1
        return tokens

    @staticmethod
    def _check_waiting(owners: list[RequestState], threads: list[Thread]) -> None:
        """Raises EngineError if a thread has neither logits nor a token that is to be fed."""
        for state, thread in zip(owners, threads, strict=True):
            if thread.logits is None and all(token.path != thread.path for token in state.pending):
                raise EngineError(
                    f"thread {thread.path} of {state.request.id!r} has no token to go on from: "
                    "apply what follows from a sampled token before the next step"
                )

    def _draw(self, state: RequestState, thread: Thread) -> Draw:
        request, params = state.request, state.request.params
        key = 0
        if not params.greedy:
            key = noise_key(request.seed, request.choice, thread.path, thread.count)
        processors = () if thread.lost else thread.processors
        return Draw(params, key, processors, thread.allowed, thread.visible or chain.NOTHING)


def _told(state: RequestState, thread: Thread) -> bool:
    """Whether the id that the engine has told is the thread's next token."""
    return state.simple and thread.likeliest >= 0 and thread.may_sample(thread.likeliest)


def _token(state: RequestState, thread: Thread, sampled: Sampled) -> SampledToken:
    return SampledToken(
        request_id=state.request.id,
        path=thread.path,
        token=sampled.token,
        logprob=sampled.logprob,
        top_logprobs=sampled.top_logprobs,
        lost=thread.lost or sampled.lost,
        drafter=thread.drafter,
        drafted=thread.drafted,
    )
