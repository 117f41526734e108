"""The cost before the first token: prompts, start, memory; the native engine and llama.cpp.

    pasta export q4_0.gguf --gguf Q4_0
    python benchmarks/prefill.py --gguf q4_0.gguf [--native Q4_0 Q8_0] [--model NAME] [--lengths 32 512 2048]

Prompt processing: tokens/s of a prompt with an empty cache. The systems alternate; figures are medians over rounds with
minimum and maximum. Time to first token: a prompt of 32 tokens through `LLM.stream`, from the call to the first token's
event. Start: a new process, from its start to the first token of an answer, with its peak resident memory; the model is
packed already.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from forkjoin import LlamaCpp, native, processor

from pastalm import LLM, SamplingParams
from pastalm.core.events import Decoded, Forked
from pastalm.core.params import Request
from pastalm.engines.base import Engine
from pastalm.models import downloads

START = r"""
import re, sys, time
begun = time.perf_counter()
from pastalm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype=sys.argv[2], max_num_seqs=1)
llm.chat([{"role": "user", "content": "Say hello."}], SamplingParams(temperature=0, max_tokens=1))
seconds = time.perf_counter() - begun
print(seconds, int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def prefilled(engine: Engine, prompt: list[int]) -> float:
    """Seconds to compute the logits after a prompt."""
    engine.forget()  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0, max_tokens=1)
    positions = engine.capabilities.positions[0]
    begun = time.perf_counter()
    engine.add(Request(id="a", prompt_token_ids=tuple(prompt), params=params, positions=positions))
    engine.apply("a", Forked(path=()))
    engine.step()
    seconds = time.perf_counter() - begun
    engine.cancel("a")
    return seconds


def row(name: str, what: str, values: list[float], digits: int = 0) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"| {name} | {what} | {middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}) |"


def first_token(llm: LLM) -> float:
    """Seconds to the first token of an answer to a prompt of about 32 tokens."""
    llm.driver.engine.forget()  # type: ignore[attr-defined]
    begun = time.perf_counter()
    stream = llm.stream([{"role": "user", "content": "Say hello."}], SamplingParams(temperature=0, max_tokens=4))
    seconds = 0.0
    for event in stream:
        if isinstance(event, Decoded) and not seconds:
            seconds = time.perf_counter() - begun
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=downloads.EMBEDDED)
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--native", nargs="+", default=["Q4_0", "Q8_0"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    most = max(args.lengths) + 64
    systems: dict[str, Callable[[list[int]], float]] = {}
    for kind in args.native:
        engine = native(args.model, kind, most)
        systems[f"ours, native {kind}"] = lambda prompt, engine=engine: prefilled(engine, prompt)
        print(f"{kind}: {engine._pool.slot_bytes} bytes of keys and values a token", flush=True)
    if args.gguf:
        other = LlamaCpp(args.gguf, most)
        systems["llama.cpp"] = lambda prompt: other.force(prompt, [])
    print("\n| system | what | median (smallest to largest) |\n| --- | --- | --- |")
    for n in args.lengths:
        prompt = [200 + 7 * i % 1000 for i in range(n)]
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for turn in range(args.rounds + 1):
            for name in list(systems) if turn % 2 else list(systems)[::-1]:
                seconds[name].append(systems[name](prompt))
        for name, values in seconds.items():
            print(row(name, f"prompt of {n}, tokens/s", [n / s for s in values[1:]]), flush=True)
    for kind in args.native:
        llm = LLM(args.model, dtype=kind.lower(), max_num_seqs=1)
        first = [first_token(llm) for _ in range(args.rounds + 1)][1:]
        print(row(f"ours, native {kind}", "time to first token, ms", [1e3 * s for s in first], 1))
        begins, peaks = [], []
        for _ in range(args.rounds):
            process = subprocess.run(
                [sys.executable, "-c", START, args.model, kind.lower()], capture_output=True, text=True, check=True
            )
            begin, peak = map(float, process.stdout.split())
            begins.append(begin)
            peaks.append(peak)
        print(row(f"ours, native {kind}", "start to first token, s", begins, 2))
        print(row(f"ours, native {kind}", "resident memory, MB", peaks))
    print(f"\n{processor()}")


if __name__ == "__main__":
    main()
