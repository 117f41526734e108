"""Memory: bytes of KV cache a token, and whether anything leaks over many requests.

    python benchmarks/memory.py                          # the embedded model on the native engine
    python benchmarks/memory.py --engine transformers
    python benchmarks/memory.py --engine llama.cpp --model m.gguf

Requests of random prompts come and go, some cancelled half-way; resident memory is read after each
hundred. Prints one line each, and the growth between the second and the last.
"""

from __future__ import annotations

import argparse
import gc
import random

import psutil

from pastalm import LLM, SamplingParams
from pastalm.models.downloads import EMBEDDED

WORDS = ("sleep", "water", "food", "rest", "walk", "read", "write", "house", "river", "stone", "five", "tips")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()
    llm = LLM(args.model, engine=args.engine, max_num_seqs=16, max_model_len=512)
    engine = llm.driver.engine
    pool = getattr(engine, "_pool", None)
    rng = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    resident: list[float] = []
    for number in range(1, args.requests + 1):
        words = rng.choices(WORDS, k=rng.randint(3, 40))
        response = llm.submit([{"role": "user", "content": " ".join(words)}], params, keep_events=False)
        cancel = rng.random() < 0.2
        while len(llm.driver.running) >= 16:
            llm.driver.step()
        if cancel:
            llm.driver.step()
            response.cancel()
        if number % 100 == 0:
            while llm.driver.running:
                llm.driver.step()
            gc.collect()
            resident.append(psutil.Process().memory_info().rss / 2**20)
            print(f"{number} requests: {resident[-1]:.0f} MiB resident", flush=True)
    if len(resident) > 1:
        print(f"growth after the first two hundred: {resident[-1] - resident[1]:+.1f} MiB")
    if engine.capabilities.name == "native":
        print(f"KV cache: {pool.slot_bytes} bytes a token")
    elif pool is not None:
        keys = sum(layer.keys.nbytes + layer.values.nbytes for layer in pool.layers)
        config = llm.loaded.model.config
        heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        own = 2 * config.num_hidden_layers * heads * pool.layers[0].keys.element_size()
        print(f"KV cache: {keys / pool.rows / pool.capacity:.0f} bytes a token, the model's own {own}")


if __name__ == "__main__":
    main()
