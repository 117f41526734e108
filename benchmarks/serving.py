"""A running server under load: tokens/s and latency as clients see them, asynchronous against sequential.

    pasta serve --max-num-seqs 64 --max-queue 128 --max-model-len 1024
    OPENAI_API_KEY=none python benchmarks/serving.py PROMPTS.jsonl --clients 64 --requests 512

Each client asks, reads its stream to the end and asks again; all requests are the same in each kind, greedy, and the
kinds take turns. `lowered` leaves it to the server how much answers fork. First text is when the reader sees the
first character, latency when the answer ends, both from when it was asked. Characters are the reader's, so that tags
count for nothing; tokens are all that was decoded, by the server's own count. Answers are of mixed lengths. Of the
requests one in ten leaves somewhere in the middle, one in twenty is malformed and one in twenty over a limit; `lost`
counts the others that got no whole answer, and the rude ones that were not refused. Figures are medians over rounds, of
characters/s with the smallest and the largest.

    pasta serve --max-num-seqs 64 --max-queue 128 --max-model-len 1024 --dtype float32
    OPENAI_API_KEY=none python benchmarks/serving.py PROMPTS.jsonl --check

asks once, asynchronously and sequentially, with the events in the streams, and replays every answer through plain
transformers in float32: a token that is another request's, or that the company changed, would lie far from the largest
logit.
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
"""Most tokens of an answer, evenly mixed."""
SHARES = {"whole": 0.8, "leaves": 0.1, "malformed": 0.05, "over": 0.05}
BUSY = ("pasta_unfinished_answers", "pasta_running_answers", "pasta_live_threads")


@dataclass(frozen=True)
class Request:
    """manner: of SHARES. leaves: after so many chunks."""

    prompt: str
    max_tokens: int
    manner: str = "whole"
    leaves: int = 0


@dataclass
class Timed:
    """What came of a request. first, seconds: from asking to the first text and to the end; lost: why no whole answer
    came, or why a rude request got one."""

    request: Request
    first: float = 0.0
    seconds: float = 0.0
    text: str = ""
    tokens: int = 0
    threads: int = 0
    events: list[Event] = field(default_factory=list)
    lost: str = ""


def planned(prompts: Sequence[str], many: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    manners = rng.choices(list(SHARES), list(SHARES.values()), k=many)
    return [
        Request(prompts[i % len(prompts)], rng.choice(LENGTHS), manner, rng.randint(1, 60))
        for i, manner in enumerate(manners)
    ]


@dataclass
class Clients:
    """All that ask one server."""

    url: str
    model: str
    events: bool = False

    def __post_init__(self) -> None:
        self.openai = OpenAI(base_url=self.url, timeout=3600, max_retries=50)
        self.http = httpx2.Client(headers={"Authorization": f"Bearer {self.openai.api_key}"}, timeout=600)

    def ask(self, request: Request, parallelism: float | None) -> Timed:
        found = Timed(request)
        try:
            if request.manner in ("whole", "leaves"):
                self._stream(found, parallelism)
            else:
                found.lost = self._refused(request)
        except OpenAIError as error:
            found.lost = f"{type(error).__name__}: {error}"
        return found

    def _stream(self, found: Timed, parallelism: float | None) -> None:
        request, begun = found.request, time.perf_counter()
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
                if piece and not found.text:
                    found.first = time.perf_counter() - begun
                found.text += piece or ""
                told = (chunk.model_extra or {}).get("pasta", {}).get("events", [])
                found.events += [from_json(json.dumps(event)) for event in told]
                ended = ended or bool(chunk.choices and chunk.choices[0].finish_reason)
                if chunk.usage is not None:
                    found.tokens = chunk.usage.completion_tokens
                    found.threads = chunk.usage.pasta["choices"][0]["threads"]  # type: ignore[attr-defined]
        found.seconds = time.perf_counter() - begun
        found.first = found.first or found.seconds
        if request.manner == "whole" and not (ended and found.tokens):
            found.lost = "the stream ended without an end"

    def _refused(self, request: Request) -> str:
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": request.prompt}]}
        wrong = {"malformed": ["{", {**body, "tools": [1]}, {**body, "messages": "x"}]}
        wrong["over"] = [{**body, "max_tokens": 10**6}, {**body, "max_tokens": 1, "stop": "x" * (1 << 20)}]
        kinds = wrong[request.manner]
        sent = kinds[request.leaves % len(kinds)]
        content = sent if isinstance(sent, str) else json.dumps(sent)
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
    """All requests of one kind, from so many clients."""
    before, begun = clients.metrics(), time.perf_counter()
    with ThreadPoolExecutor(many) as threads:
        each = list(threads.map(lambda r: clients.ask(r, KINDS[kind]), requests))
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
    """Every token of every whole answer, replayed; and its text against its events."""
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
    return f"{many} answers, {crossed} of another text than their events; {summary(gaps)}"


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
    chosen = parser.parse_args()
    every = [prompt.text for prompt in read(chosen.prompts) if len(prompt.text) < 1000]
    random.Random(chosen.seed).shuffle(every)
    requests = planned(every, chosen.requests, chosen.seed)
    kinds = [kind for kind in chosen.kinds if not chosen.check or KINDS[kind] is not None]
    process = psutil.Process(chosen.pid) if chosen.pid else None
    clients = Clients(chosen.url, chosen.model, events=chosen.check)
    clients.ask(Request(every[0], 16), 1.0)
    options = {"engine": "transformers", "adapter": chosen.adapter, "dtype": "float32", "max_num_seqs": 1}
    reference = LLM(chosen.model, **options) if chosen.check else None
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    said = Counter[str]()
    for turn in range(1 if chosen.check else chosen.rounds):
        for kind in list(found)[:: 1 if turn % 2 == 0 else -1]:
            figures, each = load(clients, chosen.clients, requests, kind)
            found[kind].append(figures)
            if process is not None:
                figures["resident MiB"] = process.memory_info().rss / 2**20
            said.update(t.lost for t in each if t.lost)
            if reference is not None:
                print(f"{kind}: {check(each, reference, kind)}", flush=True)
    names = list(next(iter(found.values()))[0])
    print(f"| decoding | characters/s (range) | {' | '.join(names[1:])} |")
    print("| --- | --- |" + " --- |" * len(names[1:]))
    for kind, rounds in found.items():
        speeds = sorted(r["characters/s"] for r in rounds)
        medians = [f"{np.median([r[name] for r in rounds]):.4g}" for name in names[1:]]
        middle = f"{np.median(speeds):.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f})"
        print(f"| {kind} | {middle} | {' | '.join(medians)} |", flush=True)
    for why, many in said.items():
        print(f"{many} lost: {why}")


if __name__ == "__main__":
    main()
