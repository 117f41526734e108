"""How exact the native engine is on a real model, by weight type: replays each token of real answers.

    python benchmarks/exact.py PROMPTS.jsonl --adapter adapters/lambda2 --limit 10

Answers are decoded greedily. One masked forward pass of transformers in float32, with the values of the packed weights,
then gives the gap of each token: the largest allowed logit minus its own. It is 0 if the engine chose as it would with
float activations. `perplexity` is that of given answers (the first of a row's `outputs`) after their prompts, in passes
of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from forkjoin import processor

from pastalm import LLM, SamplingParams
from pastalm.engines.batching import PREFILL_CHUNK as CHUNK
from pastalm.engines.native import library
from pastalm.engines.native.model import PAGE, NativeModel, Pool
from pastalm.eval.replay import load_unpacked, replay
from pastalm.models import loading
from pastalm.models.downloads import EMBEDDED
from pastalm.records import prompts


def answered(llm: LLM, reference: object, texts: list[str], most: int) -> list[float]:
    """The gap of every token of the answers that the model chose."""
    gaps: list[float] = []
    for text in texts:
        stream = llm.stream([{"role": "user", "content": text}], SamplingParams(temperature=0, max_tokens=most))
        events = list(stream)
        gaps += replay(reference, stream.prompt_token_ids, events, llm.positions)
    return gaps


def surprise(pool: Pool, prompt: list[int], tokens: list[int]) -> list[float]:
    """-log p of each token after a prompt, in one pass of at most CHUNK tokens.

    pool: of CHUNK slots.
    prompt, tokens: ids.
    """
    ids = [*prompt, *tokens][:CHUNK]
    n, pages = len(ids), -(-len(ids) // PAGE)
    where = np.arange(n, dtype=np.int32)
    words = np.packbits(np.arange(pages * PAGE) <= where[:, None], axis=1, bitorder="little")
    groups = (library.Group * 1)(library.Group(0, n, 0, pages, words.ctypes.data))
    logits = pool.step(np.array(ids, np.int32), where, where, groups, where[len(prompt) - 1 : -1]).astype(np.float64)
    targets = np.array(ids[len(prompt) :])
    top = logits.max(1)
    return list(np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(targets)), targets])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--adapter", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "q8_0", "q4_0"])
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--given", type=int, default=0, help="rows whose first given answer is scored")
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()
    texts = [p.text for p in prompts.read(args.prompts)][: args.limit]
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()][: args.given]
    print("| weights | tokens | at 0 | within 1e-3 | within 1e-2 | within 0.5 | largest | perplexity |")
    print("| --- " * 8 + "|")
    for dtype in args.dtypes:
        llm = LLM(args.model, engine="native", adapter=args.adapter, dtype=dtype, max_num_seqs=1)
        reference = loading.load(args.model, adapter=args.adapter, dtype="float32").model
        load_unpacked(reference, llm.loaded.model.tensors)
        gaps = np.array(answered(llm, reference, texts, args.max_tokens))
        shares = [f"{np.mean(gaps <= limit):.2%}" for limit in (0, 1e-3, 1e-2, 0.5)]
        surprises: list[float] = []
        pool = Pool(NativeModel(llm.loaded.model.architecture, llm.loaded.model.tensors), CHUNK)
        for row in rows:
            prompt = llm.encode([{"role": "user", "content": row["instruction"]}], SamplingParams(parallelism=0))
            if len(prompt) < CHUNK:
                surprises += surprise(
                    pool, prompt, [*llm.loaded.vocabulary.encode(next(iter(row["outputs"].values())))]
                )
        perplexity = f"{math.exp(np.mean(surprises)):.3f}" if surprises else ""
        print(f"| {dtype} | {len(gaps)} | {' | '.join(shares)} | {gaps.max():.3g} | {perplexity} |", flush=True)
        llm.close()
    print(f"\n{processor()}")


if __name__ == "__main__":
    main()
