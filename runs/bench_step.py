"""Milliseconds per decoding step of the embedded model, by number of threads: `make bench`.

One request; its main thread forks at once, and all threads decode side by side in one forward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time

from pastalm import SamplingParams, models
from pastalm.engine import Request
from pastalm.engines.transformers import TransformersEngine
from pastalm.events import Decoded, Forked

THREADS = (1, 2, 4, 8, 16)


def step_times(engine: TransformersEngine, threads: int, prompt: int, steps: int) -> list[float]:
    """Seconds of each of `steps` passes over `threads` tokens, `prompt` tokens before them."""
    name = f"bench-{threads}"
    ids = tuple(100 + i % 1000 for i in range(prompt))
    engine.add(Request(id=name, prompt_token_ids=ids, params=SamplingParams(temperature=0)))
    engine.apply(name, Forked(path=()))
    for sampled in engine.step():
        engine.apply(name, Decoded(path=(), token=sampled.token))
    for child in range(threads - 1):
        engine.apply(name, Forked(path=(child,), promised=50, forced=(200 + child,)))
    times = []
    for _ in range(steps):
        begun = time.perf_counter()
        sampled_tokens = engine.step()
        times.append(time.perf_counter() - begun)
        for sampled in sampled_tokens:
            engine.apply(name, Decoded(path=sampled.path, token=sampled.token))
    engine.cancel(name)
    return times[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=models.EMBEDDED)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--plain", action="store_true", help="weights as they are, not packed")
    parser.add_argument("--prompt", type=int, default=400, help="tokens before the first")
    parser.add_argument("--steps", type=int, default=40)
    chosen = parser.parse_args()
    loaded = models.load(chosen.model, dtype=chosen.dtype)
    engine = TransformersEngine(
        loaded.model, max_num_seqs=1, max_model_len=2048, pack=not chosen.plain
    )
    step_times(engine, 2, chosen.prompt, 5)
    print(f"{loaded.name}, {loaded.model.dtype}, after {chosen.prompt} tokens\n")
    print("| threads | ms a step (median) | tokens/s |\n| --- | --- | --- |")
    for threads in THREADS:
        median = statistics.median(step_times(engine, threads, chosen.prompt, chosen.steps))
        print(f"| {threads} | {1e3 * median:.1f} | {threads / median:.0f} |", flush=True)


if __name__ == "__main__":
    main()
