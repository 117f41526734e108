"""Many requests at once: tokens/s and latency, asynchronous against sequential, on one engine.

    python benchmarks/many.py PROMPTS.jsonl                 # the embedded model, transformers
    python benchmarks/many.py PROMPTS.jsonl --model m.gguf  # on llama.cpp

All requests arrive at once; latency is the time from then to each answer's end. Text tokens are those of the reader's
text, without tags. The kinds alternate, over several rounds. Figures are medians with minimum and maximum.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np

from pastalm import LLM, SamplingParams
from pastalm.models.downloads import EMBEDDED
from pastalm.records.prompts import read


def batch(llm: LLM, prompts: list[str], parallelism: float, max_tokens: int) -> dict[str, float]:
    """Seconds and tokens of one batch."""
    llm.driver.engine.forget()  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, parallelism=parallelism)
    begun = time.perf_counter()
    running = [llm.submit([{"role": "user", "content": p}], params, keep_events=False) for p in prompts]
    ends: dict[str, float] = {}
    while llm.driver.running:
        for response in llm.driver.step():
            if response.finished:
                ends.setdefault(response.request.id, time.perf_counter() - begun)
    seconds = time.perf_counter() - begun
    text = sum(len(llm.loaded.vocabulary.encode(r.transcript.text)) for r in running)
    latency = np.array(list(ends.values()))
    return {
        "text tokens/s": text / seconds,
        "tokens/s": sum(r.transcript.tokens for r in running) / seconds,
        "p50 s": float(np.percentile(latency, 50)),
        "p95 s": float(np.percentile(latency, 95)),
        "ms a text token": 1e3 * float(np.median(latency)) * len(prompts) / text,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSONL with `instruction`")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prompts = [p.text for p in read(args.prompts) if len(p.text) < 1000]
    random.Random(args.seed).shuffle(prompts)
    llm = LLM(args.model, engine=args.engine, max_num_seqs=max(args.requests), max_model_len=1024)
    batch(llm, prompts[:1], 1, 16)
    print("| requests | decoding | text tokens/s (range) | tokens/s | p50 s | p95 s | ms a text token |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for n in args.requests:
        results: dict[str, list[dict[str, float]]] = {"asynchronous": [], "sequential": []}
        for turn in range(args.rounds):
            kinds = list(results) if turn % 2 == 0 else list(results)[::-1]
            for kind in kinds:
                own = [prompts[(turn * n + i) % len(prompts)] for i in range(n)]
                results[kind].append(batch(llm, own, float(kind == "asynchronous"), args.max_tokens))
        for kind, rounds in results.items():
            values = {key: sorted(r[key] for r in rounds) for key in rounds[0]}
            median = {key: float(np.median(v)) for key, v in values.items()}
            speeds = values["text tokens/s"]
            print(
                f"| {n} | {kind} | {median['text tokens/s']:.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f}) "
                f"| {median['tokens/s']:.0f} | {median['p50 s']:.1f} | {median['p95 s']:.1f} "
                f"| {median['ms a text token']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
