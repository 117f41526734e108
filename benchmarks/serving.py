"""A running server under load: tokens/s and latency as clients see them, asynchronous against sequential.

    pasta serve --max-num-seqs 16 --max-queue 64 --max-model-len 1024
    python benchmarks/serving.py PROMPTS.jsonl --model smollm2-135m-instruct

Each client asks, reads its stream to the end and asks again; all requests are the same in both kinds, which alternate
and are repeated. First text is when the reader sees the first character, latency when the answer ends, both from when
it was asked. Characters are the reader's, so that tags count for nothing; tokens are all that was decoded. Figures
are medians over rounds, of characters/s with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from openai import OpenAI

from pastalm.models import EMBEDDED
from pastalm.prompts import read

KINDS = {"asynchronous": 1.0, "sequential": 0.0}


@dataclass(frozen=True)
class Timed:
    """One request. first, seconds: from asking to the first text and to the end; path: its critical path."""

    first: float
    seconds: float
    characters: int
    tokens: int
    path: int


def ask(client: OpenAI, model: str, prompt: str, parallelism: float, max_tokens: int) -> Timed:
    """One request, streamed."""
    begun = time.perf_counter()
    first, text, tokens, path = None, "", 0, 0
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"pasta": {"parallelism": parallelism}},
    )
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece and first is None:
            first = time.perf_counter() - begun
        text += piece or ""
        if chunk.usage is not None:
            tokens, path = chunk.usage.completion_tokens, chunk.usage.pasta["choices"][0]["critical_path"]
    seconds = time.perf_counter() - begun
    return Timed(seconds if first is None else first, seconds, len(text), tokens, path)


def load(client: OpenAI, chosen: argparse.Namespace, prompts: Sequence[str], kind: str) -> dict[str, float]:
    """All requests of one kind, from so many clients."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(chosen.clients) as clients:
        each = list(
            clients.map(lambda p: ask(client, chosen.model, p, KINDS[kind], chosen.max_tokens), prompts)
        )
    seconds = time.perf_counter() - begun
    return {
        "characters/s": sum(t.characters for t in each) / seconds,
        "tokens/s": sum(t.tokens for t in each) / seconds,
        "first text p50": float(np.percentile([t.first for t in each], 50)),
        "first text p95": float(np.percentile([t.first for t in each], 95)),
        "latency p50": float(np.percentile([t.seconds for t in each], 50)),
        "latency p95": float(np.percentile([t.seconds for t in each], 95)),
        "tokens / critical path": sum(t.tokens for t in each) / sum(t.path for t in each),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSONL with `instruction`")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    every = [prompt.text for prompt in read(chosen.prompts) if len(prompt.text) < 1000]
    random.Random(chosen.seed).shuffle(every)
    prompts = [every[i % len(every)] for i in range(chosen.requests)]
    client = OpenAI(base_url=chosen.url, timeout=3600, max_retries=20)  # the key is OPENAI_API_KEY's
    ask(client, chosen.model, prompts[0], 1.0, 16)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for turn in range(chosen.rounds):
        for kind in list(KINDS)[:: 1 if turn % 2 == 0 else -1]:
            found[kind].append(load(client, chosen, prompts, kind))
    names = list(found["sequential"][0])
    print(f"| decoding | characters/s (range) | {' | '.join(names[1:])} |")
    print("| --- | --- |" + " --- |" * len(names[1:]))
    for kind, rounds in found.items():
        speeds = sorted(r["characters/s"] for r in rounds)
        medians = [f"{np.median([r[name] for r in rounds]):.2f}" for name in names[1:]]
        middle = f"{np.median(speeds):.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f})"
        print(f"| {kind} | {middle} | {' | '.join(medians)} |", flush=True)


if __name__ == "__main__":
    main()
