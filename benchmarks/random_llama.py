"""A Llama-shaped model of 1.2 billion random weights: nearer to what people serve than the embedded one.

    python benchmarks/random_llama.py big && pasta export big-q4_0.gguf --gguf Q4_0 --model ./big --adapter none
    python benchmarks/forkjoin.py --model ./big --gguf big-q4_0.gguf --rounds 3

A step of it is bound by reading the weights, whatever they are; only times are to be measured on it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig

from pastalm.models import checkpoints, downloads

SHAPES = ("llama-1b", "gemma-7b")


def make(shape: str, device: str = "cpu", *, layers: int = 16, vocabulary: int = 49152, **how: Any) -> Any:
    """A model of some shape (`SHAPES`), random weights in bfloat16."""
    if shape == "gemma-7b":
        config: Any = GemmaConfig(
            vocab_size=256000,
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=256,
            max_position_embeddings=8192,
        )
    else:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            **how,
        )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()
    _, tokenizer = checkpoints.read(downloads.pull())
    model = make(
        "llama-1b",
        layers=args.layers,
        vocabulary=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    checkpoints.save(model, tokenizer, args.folder)
    print(f"{args.folder}: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion weights")


if __name__ == "__main__":
    main()
