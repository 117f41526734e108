"""A Llama-shaped model of 1.2 billion random weights: nearer to what people serve than the embedded one.

    python benchmarks/random_llama.py big && pasta export big-q4_0.gguf --gguf Q4_0 --model ./big --adapter none
    python benchmarks/forkjoin.py --model ./big --gguf big-q4_0.gguf --rounds 3

A step of it is bound by reading the weights, whatever they are; only times are to be measured on it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pastalm import models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    chosen = parser.parse_args()
    _, tokenizer = models.load_base(models.pull())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=chosen.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    models.save(model, tokenizer, chosen.folder)
    print(f"{chosen.folder}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion weights")


if __name__ == "__main__":
    main()
