"""A running server under load: tokens/s and latency as clients see them, asynchronous against sequential.

    pasta serve --max-num-seqs 64 --max-queue 128 --max-model-len 1024
    OPENAI_API_KEY=none python benchmarks/serving.py PROMPTS.jsonl --clients 64 --requests 512

Each client sends a request, reads its stream to the end, and sends the next. Every kind gets the same requests, greedy,
and the kinds take turns. With `lowered` the server decides how much answers fork. First text is the time until the
reader sees the first character, latency the time until the answer ends. Characters are those that the reader sees,
without tags; tokens are all decoded tokens, as the server counts them. Answers have mixed lengths. One request in ten
disconnects in the middle, one in twenty is malformed, and one in twenty is over a limit. `lost` counts the others
without a whole answer, and invalid requests that were accepted. Figures are medians over rounds; characters/s also with
minimum and maximum.

    pasta serve --max-num-seqs 64 --max-queue 128 --max-model-len 1024 --dtype float32
    OPENAI_API_KEY=none python benchmarks/serving.py PROMPTS.jsonl --check

sends each request once in both kinds, with events in the streams, and replays every answer through plain transformers
in float32. A token of another request, or one that other requests changed, would be far below the largest logit.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from openai import OpenAI, OpenAIError
from prometheus_client.parser import text_string_to_metric_families

from pastalm import LLM, SamplingParams
from pastalm.core.events import Event
from pastalm.core.transcript import Transcript
from pastalm.eval.replay import replay, summary
from pastalm.models.downloads import EMBEDDED
from pastalm.records.prompts import read
from pastalm.records.traces import from_json

KINDS: dict[str, float | None] = {"asynchronous": 1.0, "lowered": None, "sequential": 0.0}
LENGTHS = (32, 96, 192, 384)
"""Token limits of answers, evenly mixed."""
SHARES = {"whole": 0.8, "leaves": 0.1, "malformed": 0.05, "over": 0.05}
BUSY = ("pasta_unfinished_answers", "pasta_running_answers", "pasta_live_threads")


@dataclass(frozen=True)
class Request:
    """A request.

    prompt: its text.
    max_tokens: limit of the answer.
    manner: one of SHARES.
    leaves: number of chunks after which it disconnects, if its manner is `leaves`.
    """

    prompt: str
    max_tokens: int
    manner: str = "whole"
    leaves: int = 0


@dataclass
class Timed:
    """The result of a request.

    first, seconds: from sending it to the first text, and to the end.
    lost: why there is no whole answer, or how an invalid request was accepted.
    """

    request: Request
    first: float = 0.0
    seconds: float = 0.0
    text: str = ""
    tokens: int = 0
    threads: int = 0
    events: list[Event] = field(default_factory=list)
    lost: str = ""


def planned(prompts: Sequence[str], count: int, seed: int) -> list[Request]:
    """Random requests of mixed lengths and manners."""
    rng = random.Random(seed)
    manners = rng.choices(list(SHARES), list(SHARES.values()), k=count)
    return [
        Request(prompts[i % len(prompts)], rng.choice(LENGTHS), manner, rng.randint(1, 60))
        for i, manner in enumerate(manners)
    ]


@dataclass
class Clients:
    """The clients of one server.

    url: of the API.
    model: its name on the server.
    events: request events in the streams.
    """

    url: str
    model: str
    events: bool = False

    def __post_init__(self) -> None:
        self.openai = OpenAI(base_url=self.url, timeout=3600, max_retries=50)
        self.http = httpx2.Client(headers={"Authorization": f"Bearer {self.openai.api_key}"}, timeout=600)

    def send(self, request: Request, parallelism: float | None) -> Timed:
        timed = Timed(request)
        try:
            if request.manner in ("whole", "leaves"):
                self._stream(timed, parallelism)
            else:
                timed.lost = self._refused(request)
        except OpenAIError as error:
            timed.lost = f"{type(error).__name__}: {error}"
        return timed

    def _stream(self, timed: Timed, parallelism: float | None) -> None:
        request, begun = timed.request, time.perf_counter()
        pasta: dict[str, Any] = {} if parallelism is None else {"parallelism": parallelism}
        with self.openai.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": request.prompt}],
            temperature=0,
            max_tokens=request.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"pasta": pasta | ({"events": True} if self.events else {})},
        ) as stream:
            ended = False
            for number, chunk in enumerate(stream, 1):
                if request.manner == "leaves" and number > request.leaves:
                    return
                piece = chunk.choices[0].delta.content if chunk.choices else None
                if piece and not timed.text:
                    timed.first = time.perf_counter() - begun
                timed.text += piece or ""
                events = (chunk.model_extra or {}).get("pasta", {}).get("events", [])
                timed.events += [from_json(json.dumps(event)) for event in events]
                ended = ended or bool(chunk.choices and chunk.choices[0].finish_reason)
                if chunk.usage is not None:
                    timed.tokens = chunk.usage.completion_tokens
                    timed.threads = chunk.usage.pasta["choices"][0]["threads"]  # type: ignore[attr-defined]
        timed.seconds = time.perf_counter() - begun
        timed.first = timed.first or timed.seconds
        if request.manner == "whole" and not (ended and timed.tokens):
            timed.lost = "the stream ended without a finish_reason"

    def _refused(self, request: Request) -> str:
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": request.prompt}]}
        wrong = {"malformed": ["{", {**body, "tools": [1]}, {**body, "messages": "x"}]}
        wrong["over"] = [{**body, "max_tokens": 10**6}, {**body, "max_tokens": 1, "stop": "x" * (1 << 20)}]
        kinds = wrong[request.manner]
        invalid = kinds[request.leaves % len(kinds)]
        content = invalid if isinstance(invalid, str) else json.dumps(invalid)
        headers = {"Content-Type": "application/json"}
        while True:
            reply = self.http.post(f"{self.url}/chat/completions", content=content, headers=headers)
            if reply.status_code != 429:
                break
            time.sleep(0.1)
        return "" if reply.status_code in (400, 413) else f"{request.manner}: {reply.status_code}"

    def metrics(self) -> dict[str, float]:
        text = self.http.get(self.url.removesuffix("/v1") + "/metrics").text
        return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


def load(clients: Clients, many: int, requests: Sequence[Request], kind: str) -> tuple[dict[str, float], list[Timed]]:
    """Sends all requests of one kind, from so many clients at once. Returns the figures and the results."""
    before, begun = clients.metrics(), time.perf_counter()
    with ThreadPoolExecutor(many) as threads:
        each = list(threads.map(lambda r: clients.send(r, KINDS[kind]), requests))
    seconds = time.perf_counter() - begun
    after = clients.metrics()
    while any(after[name] for name in BUSY) and time.perf_counter() < begun + seconds + 10:
        time.sleep(0.05)
        after = clients.metrics()
    tokens, path = (after[n] - before[n] for n in ("pasta_tokens_total", "pasta_critical_path_tokens_total"))
    whole = [t for t in each if t.request.manner == "whole"]
    firsts, seconds_each = [t.first for t in whole], [t.seconds for t in whole]
    return {
        "characters/s": sum(len(t.text) for t in whole) / seconds,
        "tokens/s": tokens / seconds,
        "first text p50": float(np.percentile(firsts, 50)),
        "first text p95": float(np.percentile(firsts, 95)),
        "latency p50": float(np.percentile(seconds_each, 50)),
        "latency p95": float(np.percentile(seconds_each, 95)),
        "ms a character": 1000 * float(np.median([t.seconds / max(1, len(t.text)) for t in whole])),
        "tokens / critical path": tokens / path,
        "threads": float(np.mean([t.threads for t in whole])),
        "lost": sum(bool(t.lost) for t in each),
        "still running": sum(after[name] for name in BUSY),
    }, each


def check(each: Sequence[Timed], reference: LLM, kind: str) -> str:
    """Replays every token of every whole answer, and compares its text with its events."""
    gaps: list[float] = []
    many = crossed = 0
    params = SamplingParams(parallelism=KINDS[kind] or 0.0)
    for one in each:
        if one.request.manner != "whole" or one.lost:
            continue
        many += 1
        prompt = reference.encode([{"role": "user", "content": one.request.prompt}], params)
        crossed += Transcript(one.events).text != one.text
        gaps += replay(reference.loaded.model, prompt, one.events)
    return f"{many} answers, {crossed} whose text differs from their events; {summary(gaps)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSONL with `instruction`")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--adapter", default="auto", help="with --check: the server's")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--pid", type=int, help="the server's, for its memory")
    parser.add_argument("--check", action="store_true", help="replay the answers through transformers")
    args = parser.parse_args()
    every = [prompt.text for prompt in read(args.prompts) if len(prompt.text) < 1000]
    random.Random(args.seed).shuffle(every)
    requests = planned(every, args.requests, args.seed)
    kinds = [kind for kind in args.kinds if not args.check or KINDS[kind] is not None]
    process = psutil.Process(args.pid) if args.pid else None
    clients = Clients(args.url, args.model, events=args.check)
    clients.send(Request(every[0], 16), 1.0)
    options = {"engine": "transformers", "adapter": args.adapter, "dtype": "float32", "max_num_seqs": 1}
    reference = LLM(args.model, **options) if args.check else None
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    lost = Counter[str]()
    for turn in range(1 if args.check else args.rounds):
        for kind in list(results)[:: 1 if turn % 2 == 0 else -1]:
            figures, each = load(clients, args.clients, requests, kind)
            results[kind].append(figures)
            if process is not None:
                figures["resident MiB"] = process.memory_info().rss / 2**20
            lost.update(t.lost for t in each if t.lost)
            if reference is not None:
                print(f"{kind}: {check(each, reference, kind)}", flush=True)
    names = list(next(iter(results.values()))[0])
    print(f"| decoding | characters/s (range) | {' | '.join(names[1:])} |")
    print("| --- | --- |" + " --- |" * len(names[1:]))
    for kind, rounds in results.items():
        speeds = sorted(r["characters/s"] for r in rounds)
        medians = [f"{np.median([r[name] for r in rounds]):.4g}" for name in names[1:]]
        middle = f"{np.median(speeds):.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f})"
        print(f"| {kind} | {middle} | {' | '.join(medians)} |", flush=True)
    for why, count in lost.items():
        print(f"{count} lost: {why}")


if __name__ == "__main__":
    main()
