"""Our own share of a step: all that is done about it in Python and in sampling, over a model that costs nothing.

    python benchmarks/host.py                          # 1, 8, 64, 416 threads, 100 and 2,000 tokens written
    python benchmarks/host.py --threads 8 --profile    # where it goes
    python benchmarks/host.py --threads 1 8 --written 1000 8000 32000 --extra "" stop logprobs penalty stream

Driver, interpreter, layout, events, transcript, the engines' common part and sampling from 49,152 logits a thread; the
forward pass itself is left out. Up to 8 threads belong to one answer: its main thread waits for the others, which write
text. Timed are steps once each answer has so many tokens, so that a cost that grows with length shows. Warm: one step
after the other. Cold: the forward pass reads 64 MB, as a model reads its weights, so that the rest finds its own data
out of the caches. `stop`: with a stop string that never comes. `stream`: with the deltas that a server makes for each
client. `logprobs`: the same with two log-probabilities a token. `penalty`: with a repetition penalty. `drawn`: at
temperature 1, the others greedy. `drafts`: with guesses looked for, and none fed. Figures are medians over rounds with
the smallest and the largest.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pastalm import Limits, SamplingParams
from pastalm.core.driver import Driver, Response
from pastalm.core.events import Path
from pastalm.core.language import MAX_LENGTH, Promise, Sync
from pastalm.engines.base import Capabilities
from pastalm.engines.batching import Batch, BatchingEngine, RequestState
from pastalm.engines.drafts.budget import StepCosts
from pastalm.engines.scripted import byte_vocabulary
from pastalm.records.documents import encode
from pastalm.server.answers import ServedAnswer

VOCABULARY = replace(byte_vocabulary(), size=49152)
TEXT = VOCABULARY.encode("some words, a sentence of them. ")
CHUNK = 2000
"""Tokens that an answer's chunks write before steps are timed; what comes before them is text of the main thread."""
MOST = 8
"""Threads of one answer."""
STEPS = 40
"""Timed in a round."""
WEIGHTS = np.ones(2**24, dtype=np.float32)
NOISE = np.random.default_rng(0).standard_normal(VOCABULARY.size, dtype=np.float32)
"""Logits as a model's: hardly two are equal."""


DEAR = StepCosts(lambda rows: max(rows, 1) ** 0.9999)
"""A further row costs nearly as much as those before: guesses are looked for and never fed."""


class Free(BatchingEngine):
    """Its forward pass makes up logits: each main thread makes its promises and waits, every other writes without
    end. seconds: spent in it."""

    _page = 16

    def __init__(self, rows: int, places: int) -> None:
        capabilities = Capabilities(
            name="free", weights="none", positions=("promised",), drafts=True, max_model_len=places, max_num_seqs=rows
        )
        super().__init__(capabilities, vocabulary_size=VOCABULARY.size)
        self.cold = False
        self.seconds = 0.0
        self.promises: dict[str, list[int]] = {}
        self._logits: NDArray[np.float32] = np.zeros((rows + 32, VOCABULARY.size), dtype=np.float32)

    def live(self) -> list[Path]:
        return [thread.path for state in self._running.values() for thread in state.live]

    def _place(self, state: RequestState) -> bool:
        return True

    def _prefill(self, state: RequestState, stop: int, logits: bool) -> NDArray[np.float32]:
        row = NOISE.copy()
        row[self._wanted(state, ())] = 60
        return row

    def _leave(self, state: RequestState) -> None:
        pass

    def _wanted(self, state: RequestState, path: Path) -> int:
        """The token that a thread writes next, far likelier than all others."""
        promises = self.promises[state.request.id] if not path else []
        count = state.threads[path].count
        return promises[count] if count < len(promises) else TEXT[count % len(TEXT)]

    def _forward(self, batch: Batch, keep: list[int]) -> NDArray[np.float32]:
        begun = time.perf_counter()
        if self.cold:
            WEIGHTS.sum()
        tokens = [(state, token.path) for state, due in batch for token in due]
        logits = self._logits[: len(keep)]
        logits[:] = NOISE
        self._likeliest = [self._wanted(*tokens[i]) for i in keep]  # as the native engine tells
        logits[np.arange(len(keep)), self._likeliest] = 60
        self.seconds += time.perf_counter() - begun
        return logits

    def forget(self) -> None:
        pass


def _promised(threads: int, before: int) -> list[int]:
    """What a main thread writes so that so many threads write: itself alone, or its children while it waits. before:
    tokens of text that it writes first."""
    if threads == 1:
        return []
    marks: list[Promise | Sync] = [Promise(f"part{i}", MAX_LENGTH) for i in range(threads)]
    text = [TEXT[i % len(TEXT)] for i in range(before)]
    return [*text, *(token for mark in [*marks, Sync()] for token in encode([mark], VOCABULARY))]


class Load:
    """Answers of so many live threads in all, each answer with at least `written` tokens."""

    def __init__(self, threads: int, written: int, extra: str) -> None:
        shares = list(_shares(threads))
        places = 2 * written + 16384
        self.engine = Free(threads + len(shares), places)  # main threads decode beside their children at first
        self.driver = Driver(self.engine, VOCABULARY, limits=Limits(max_promises=MOST, max_threads=MOST + 1))
        self.engine._drafting.costs = DEAR
        self.answers: dict[str, ServedAnswer] | None = {} if extra in ("stream", "logprobs") else None
        params = SamplingParams(
            max_tokens=places - 64,
            logprobs=2 if extra == "logprobs" else None,
            repetition_penalty=1.1 if extra == "penalty" else 1.0,
            stop="\0" if extra == "stop" else None,
            temperature=float(extra == "drawn"),
            drafts="auto" if extra == "drafts" else "off",
            seed=0,
        )
        begun = [self._begin(params, count, written - CHUNK) for count in shares]
        while any(r.transcript.tokens < written for r in begun) or not self._settled(threads):
            self.step()

    def _begin(self, params: SamplingParams, threads: int, before: int) -> Response:
        running = self.driver.submit(range(40, 80), params, keep_events=self.answers is not None)
        self.engine.promises[running.request.id] = _promised(threads, before)
        if self.answers is not None:
            self.answers[running.request.id] = ServedAnswer(running.transcript, params.stop_strings)
            self.answers[running.request.id].take(running.take())
        return running

    def _settled(self, threads: int) -> bool:
        """Whether all threads write that are to, and no other."""
        live = self.engine.live()
        return len(live) == threads and (threads == 1 or () not in live)

    def step(self) -> None:
        for response in self.driver.step():
            if self.answers is not None:
                self.answers[response.request.id].take(response.take())

    def timed(self, *, cold: bool = False) -> float:
        """Milliseconds a step, its forward pass left out."""
        self.engine.cold, self.engine.seconds = cold, 0.0
        begun = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        return 1e3 * (time.perf_counter() - begun - self.engine.seconds) / STEPS


def _shares(threads: int) -> Iterator[int]:
    """The threads of each answer."""
    while threads > 0:
        yield min(threads, MOST)
        threads -= MOST


def shown(values: Sequence[float], unit: float = 1.0) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{unit * middle:.3g} ({unit * low:.3g} to {unit * high:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8, 64, 416])
    parser.add_argument("--written", type=int, nargs="+", default=[100, 2000])
    parser.add_argument("--extra", nargs="+", default=["", "stop", "stream", "drawn"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    print("| threads | tokens written | with | ms a step, warm | µs a thread | ms a step, cold | µs a thread |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for threads in chosen.threads:
        for written in chosen.written:
            for extra in chosen.extra:
                load = Load(threads, written, extra)
                if chosen.profile:
                    with cProfile.Profile() as profile:
                        load.timed()
                    pstats.Stats(profile).sort_stats("tottime").print_stats(30)
                kinds = [[load.timed(cold=cold) for _ in range(chosen.rounds)] for cold in (False, True)]
                figures = " | ".join(f"{shown(times)} | {shown(times, 1e3 / threads)}" for times in kinds)
                print(f"| {threads} | {written} | {extra} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
