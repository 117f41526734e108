"""How exact the native engine is on a real model, by weight type: each token of real answers, replayed.

    python benchmarks/exact.py PROMPTS.jsonl --adapter adapters/lambda2 --limit 10

Answers are decoded greedily, then one masked forward pass of transformers in float32, with the weights that the packed
ones stand for, says how far each token's logit lies from the largest that was allowed: 0 where the engine chose as float
activations would. `perplexity`: of given answers (the first of `outputs` of a row) after their prompts, by the engine.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from forkjoin import processor

from pastalm import LLM, SamplingParams, models, prompts
from pastalm.engine import Request
from pastalm.eval.replay import load_unpacked, replay
from pastalm.events import Decoded, Forked


def answered(llm: LLM, reference: object, texts: list[str], most: int) -> list[float]:
    """Of every chosen token of the answers its distance from the largest logit."""
    gaps: list[float] = []
    for text in texts:
        stream = llm.stream([{"role": "user", "content": text}], SamplingParams(temperature=0, max_tokens=most))
        events = list(stream)
        gaps += replay(reference, stream.prompt_token_ids, events, llm.positions)
    return gaps


def surprise(llm: LLM, prompt: list[int], tokens: list[int]) -> list[float]:
    """-log p of each token after a prompt, as the engine has it."""
    engine, name, found = llm.driver.engine, "given", list[float]()
    params = SamplingParams(temperature=0, max_tokens=len(tokens) + 1)
    engine.add(Request(id=name, prompt_token_ids=tuple(prompt), params=params, positions=llm.positions))
    engine.apply(name, Forked(path=()))
    now: list[int] = []

    def take(_: str, __: object, logits: np.ndarray) -> None:
        row = logits.astype(np.float64)
        top = row.max()
        found.append(float(np.log(np.exp(row - top).sum()) + top - row[now[0]]))

    engine.on_logits = take  # type: ignore[attr-defined]
    for token in tokens:
        now[:] = [token]
        engine.step()
        engine.apply(name, Decoded(path=(), token=token))
    engine.on_logits = None  # type: ignore[attr-defined]
    engine.cancel(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--adapter", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "q8_0", "q4_0"])
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--given", type=int, default=0, help="rows whose first given answer is scored")
    parser.add_argument("--max-tokens", type=int, default=256)
    chosen = parser.parse_args()
    texts = [p.text for p in prompts.read(chosen.prompts)][: chosen.limit]
    rows = [json.loads(line) for line in chosen.prompts.read_text().splitlines()][: chosen.given]
    print("| weights | tokens | at 0 | within 1e-3 | within 1e-2 | within 0.5 | largest | perplexity |")
    print("| --- " * 8 + "|")
    for dtype in chosen.dtypes:
        llm = LLM(engine="native", adapter=chosen.adapter, dtype=dtype, max_num_seqs=1)
        reference = models.load(adapter=chosen.adapter, dtype="float32").model
        load_unpacked(reference, llm.loaded.model.tensors)
        gaps = np.array(answered(llm, reference, texts, chosen.max_tokens))
        shares = [f"{np.mean(gaps <= limit):.2%}" for limit in (0, 1e-3, 1e-2, 0.5)]
        found = []
        for row in rows:
            prompt = llm.encode([{"role": "user", "content": row["instruction"]}], SamplingParams(parallelism=0))
            found += surprise(llm, prompt, [*llm.loaded.vocabulary.encode(next(iter(row["outputs"].values())))][:512])
        perplexity = f"{math.exp(np.mean(found)):.3f}" if found else ""
        print(f"| {dtype} | {len(gaps)} | {' | '.join(shares)} | {gaps.max():.3g} | {perplexity} |", flush=True)
        llm.close()
    print(f"\n{processor()}")


if __name__ == "__main__":
    main()
