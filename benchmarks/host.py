"""Our own share of a step: driver, interpreter, layout, events and transcript over an engine whose model costs nothing.

    python benchmarks/host.py                          # 1, 8, 64, 416 threads, 100 and 2,000 tokens written
    python benchmarks/host.py --threads 8 --profile    # where it goes

Up to 8 threads belong to one answer: its main thread waits for the others, which write text. Timed are steps once each
answer has so many tokens, so that a cost that grows with length shows; warm: one after the other; cold: 64 MB are read
before each, as a model reads its weights. `stop`: with a stop string that never comes. `stream`: with the deltas that a
server makes for each client. Figures are medians over rounds with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from pastalm import Limits, SamplingParams
from pastalm.engine import Capabilities, Request, SampledToken
from pastalm.engines.scripted import byte_vocabulary
from pastalm.events import Blocked, Event, Finished, Forked, Joined, Path
from pastalm.lang import MAX_LENGTH, Promise, Sync
from pastalm.layout import Layout
from pastalm.llm import Driver, Running
from pastalm.server.protocol import Answer

VOCABULARY = byte_vocabulary()
TEXT = VOCABULARY.encode("some words, a sentence of them. ")
PLACES = 16384
MOST = 8
"""Threads of one answer."""
STEPS = 40
"""Timed in a round."""
WEIGHTS = np.ones(2**24, dtype=np.float32)
"""Read before a step as a model's weights are, so that the step finds its own data out of the caches."""


class Free:
    """An engine without a model: gives every token its place, and says text without end."""

    def __init__(self) -> None:
        self.capabilities = Capabilities(
            name="free", weights="none", positions=("promised",), max_model_len=PLACES
        )
        self.layouts: dict[str, Layout] = {}
        self.live: dict[tuple[str, Path], deque[int]] = {}

    def begin(self, request_id: str, threads: int) -> None:
        """What the main thread is to say: so many promises, then that it waits for them."""
        marks = [Promise(f"part{i}", MAX_LENGTH) for i in range(threads)]
        said = [token for mark in marks for token in VOCABULARY.encode_document([mark])]
        if threads > 1:
            self.live[request_id, ()].extend([*said, *VOCABULARY.encode_document([Sync()])])

    def add(self, request: Request) -> None:
        self.layouts[request.id] = Layout(len(request.prompt_token_ids), PLACES, page=16)

    def apply(self, request_id: str, event: Event) -> None:
        self.layouts[request_id].apply(event)
        key = request_id, event.path
        if isinstance(event, Forked | Joined):
            self.live[key] = deque()
        elif isinstance(event, Blocked | Finished):
            self.live.pop(key, None)
        elif (said := self.live[key]) and said[0] == event.token:
            for _ in (event.token, *event.forced):
                said.popleft()

    def step(self) -> list[SampledToken]:
        return [
            SampledToken(request_id=request_id, path=path, token=said[0] if said else TEXT[0])
            for (request_id, path), said in self.live.items()
        ]

    def has_unfinished(self) -> bool:
        return bool(self.live)

    def cancel(self, request_id: str) -> None:
        self.live = {key: said for key, said in self.live.items() if key[0] != request_id}


class Load:
    """Answers of so many live threads in all, each answer with at least `written` tokens."""

    def __init__(self, threads: int, written: int, *, stop: bool, stream: bool) -> None:
        self.engine = Free()
        self.driver = Driver(self.engine, VOCABULARY, limits=Limits(max_promises=MOST, max_threads=MOST + 1))
        self.stream = stream
        self.answers: dict[str, Answer] = {}
        params = SamplingParams(max_tokens=PLACES - 8, stop="\0" if stop else None, seed=0)
        each = [MOST] * (threads // MOST) + [threads % MOST] * (threads % MOST > 0)
        begun: list[Running] = []
        for count in each:
            running, events = self.driver.submit(range(40, 80), params)
            self.engine.begin(running.request.id, count)
            self.answers[running.request.id] = Answer(params.stop_strings)
            self.answers[running.request.id].take(events)
            begun.append(running)
        while any(r.transcript.tokens < written for r in begun) or len(self.engine.live) < threads:
            self.step()
        while any(path == () for _, path in self.engine.live) and threads > 1:
            self.step()
        assert len(self.engine.live) == threads

    def step(self) -> None:
        happened = self.driver.step()
        if self.stream:
            deltas: dict[str, list[Event]] = {}
            for running, event in happened:
                deltas.setdefault(running.request.id, []).append(event)
            for request_id, events in deltas.items():
                self.answers[request_id].take(events)

    def timed(self, *, cold: bool) -> float:
        """Milliseconds a step."""
        seconds = 0.0
        for _ in range(STEPS):
            if cold:
                WEIGHTS.sum()
            begun = time.perf_counter()
            self.step()
            seconds += time.perf_counter() - begun
        return 1e3 * seconds / STEPS


def shown(values: Sequence[float], unit: float = 1.0) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{unit * middle:.3g} ({unit * low:.3g} to {unit * high:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8, 64, 416])
    parser.add_argument("--written", type=int, nargs="+", default=[100, 2000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    print("| threads | tokens written | with | ms a step, warm | µs a thread | ms a step, cold | µs a thread |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for threads in chosen.threads:
        for written in chosen.written:
            for extra in ("", "stop", "stream"):
                load = Load(threads, written, stop=extra == "stop", stream=extra == "stream")
                if chosen.profile:
                    with cProfile.Profile() as profile:
                        load.timed(cold=False)
                    pstats.Stats(profile).sort_stats("tottime").print_stats(25)
                kinds = [[load.timed(cold=cold) for _ in range(chosen.rounds)] for cold in (False, True)]
                figures = " | ".join(f"{shown(found)} | {shown(found, 1e3 / threads)}" for found in kinds)
                print(f"| {threads} | {written} | {extra} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
