"""What drafts bring, one answer at a time: passes saved, and answers sooner, for each drafter alone and all together.

    python benchmarks/drafts.py PROMPTS.jsonl --adapter adapters/lambda2 --limit 50

Each prompt is answered greedily by the native engine without drafts and with each set of drafters, one after the other,
so that what else the machine does meets all alike. Each set has an engine and a memory of earlier answers of its own;
each round begins with new ones. Of a prompt and a set the fastest round counts. Ratios are those to the same engine
without drafts, prompt by prompt: geometric means with 95 % bootstrap intervals. `same`: answers that are the same text.

With `--requests 1 8 64` so many prompts are answered at once instead: tokens a second over those without drafts, by the
clock and by the time that processors worked, which what else the machine does disturbs less; means over the rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from forkjoin import processor

from pastalm import LLM, SamplingParams
from pastalm.core.transcript import Transcript
from pastalm.eval.intervals import mean
from pastalm.records import prompts

SETS = ("off", "lookup", "siblings", "answers", "lookup,siblings", "auto")


def answer(llm: LLM, prompt: str, drafts: str, max_tokens: int) -> Transcript:
    llm.driver.engine.forget()  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, drafts=drafts)
    stream = llm.stream([{"role": "user", "content": prompt}], params)
    for _ in stream:
        pass
    return stream.transcript


def row(drafts: str, answers: dict[str, list[Transcript]], without: dict[str, list[Transcript]]) -> str:
    """A line of the table. answers, without: of each prompt those of all rounds."""
    fastest = {prompt: min(each.seconds for each in own) for prompt, own in answers.items()}
    faster = sorted(min(each.seconds for each in without[prompt]) / fastest[prompt] for prompt in answers)
    passes = [without[prompt][0].passes / own[-1].passes for prompt, own in answers.items()]
    every = [each for own in answers.values() for each in own]
    drafted, accepted = (sum(sum(getattr(t, name).values()) for t in every) for name in ("drafted", "accepted"))
    same = sum(own[-1].text == without[prompt][0].text for prompt, own in answers.items())
    cells = (
        mean([own[-1].tokens_per_pass for own in answers.values()], "geometric"),
        mean(passes, "geometric"),
        mean(faster, "geometric"),
        f"{faster[len(faster) // 20]:.2f}",
        f"{accepted / drafted:.2f} of {drafted}" if drafted else "",
        f"{same} of {len(answers)}",
    )
    return f"| {drafts} | " + " | ".join(map(str, cells)) + " |"


def together(texts: list[str], requests: int, chosen: argparse.Namespace) -> None:
    """Answers all texts, so many at once, with each set in turn."""
    rates: dict[str, list[tuple[float, float]]] = defaultdict(list)  # tokens by second and by second of processors
    conversations = [[{"role": "user", "content": text}] for text in texts]
    for number in range(chosen.rounds):
        for drafts in chosen.sets if number % 2 else chosen.sets[::-1]:
            params = SamplingParams(temperature=0, max_tokens=chosen.max_tokens, drafts=drafts)
            with engine(chosen, requests) as llm:
                begun, begun_busy = time.perf_counter(), time.process_time()
                outputs = llm.chat(conversations, params)
                seconds, busy = time.perf_counter() - begun, time.process_time() - begun_busy
            tokens = sum(output.outputs[0].transcript.tokens for output in outputs)
            rates[drafts].append((tokens / seconds, tokens / busy))
    for drafts in chosen.sets:
        ratios = np.array(rates[drafts]) / np.array(rates[chosen.sets[0]])  # [rounds, 2]
        means = [mean(own, "geometric") for own in ratios.T]
        cells = (
            f"{statistics.median(rate for rate, _ in rates[drafts]):.0f}",
            *(f"{ratio.mean:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" for ratio in means),
        )
        print(f"| {requests} | {drafts} | " + " | ".join(cells) + " |", flush=True)


def engine(chosen: argparse.Namespace, requests: int = 1) -> LLM:
    """A new engine, without memory of earlier answers."""
    return LLM(engine="native", adapter=chosen.adapter, dtype=chosen.dtype, max_num_seqs=requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSONL with `instruction`")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--dtype", default="q4_0", help="weights of the engine")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="drafters, off first")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, nargs="+", help="at once, in place of one at a time")
    chosen = parser.parse_args()
    texts = [prompt.text for prompt in prompts.read(chosen.prompts)]
    random.Random(chosen.seed).shuffle(texts)
    if chosen.requests:
        print("| requests | drafts | tokens a second | over those without | by processor time |")
        print("| --- " * 5 + "|")
        for count in chosen.requests:
            together(texts[: max(count, chosen.limit)], count, chosen)
        print(f"\n{chosen.dtype} weights, {chosen.rounds} rounds; {processor()}")
        return
    answers: dict[str, dict[str, list[Transcript]]] = {drafts: defaultdict(list) for drafts in chosen.sets}
    for number in range(chosen.rounds):
        llms = {drafts: engine(chosen) for drafts in chosen.sets}
        for turn, text in enumerate(texts[: chosen.limit]):
            order = chosen.sets[turn % len(llms) :] + chosen.sets[: turn % len(llms)]
            for drafts in order:
                answers[drafts][text].append(answer(llms[drafts], text, drafts, chosen.max_tokens))
        for llm in llms.values():
            llm.close()
        print(f"round {number + 1} of {chosen.rounds} done", flush=True)
    print("| drafts | tokens a pass | passes saved, times | sooner, times | at the 5th percentile | came true | same |")
    print("| --- " * 7 + "|")
    for drafts, own in answers.items():
        print(row(drafts, own, answers[chosen.sets[0]]))
    print(f"\n{chosen.dtype} weights, {len(answers[chosen.sets[0]])} prompts, {chosen.rounds} rounds; {processor()}")


if __name__ == "__main__":
    main()
