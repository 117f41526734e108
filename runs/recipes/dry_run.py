"""Trains a recipe's model for some steps at its true widths, with few layers and random weights, on a CPU.

    python runs/recipes/dry_run.py runs/recipes/qwen3-8b.toml runs/out/dry_run
    python runs/recipes/dry_run.py runs/recipes/llama-3.1-8b.toml runs/out/dry_run --layers 2 --tokens 4000

Both stages go through the command, with the recipe: `pasta train sft`, then `pasta train prefer` on pairs made of the
same answers. The vocabulary is reduced, since the tokenizer of the hub is not here. Prints, as JSON, time and peak
memory measured here, and the weights of the whole model.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

HERE = Path(__file__).parent
ROWS = HERE.parent / "own.jsonl.xz"


@dataclass(frozen=True)
class Shape:
    """A model in numbers, from its config.json on the hub.

    kind: of transformers' configuration.
    layers, vocabulary: of the whole model.
    settings: the rest.
    """

    kind: str
    layers: int
    vocabulary: int
    settings: dict[str, Any]

    def weights(self, layers: int, vocabulary: int) -> int:
        """Number of weights with so many layers and tokens."""
        s = self.settings
        heads = s["head_dim"] * (s["num_attention_heads"] + s["num_key_value_heads"])
        layer = 2 * s["hidden_size"] * heads + 3 * s["hidden_size"] * s["intermediate_size"]
        return layers * layer + 2 * vocabulary * s["hidden_size"]


_COMMON = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SHAPES = {
    "qwen3-8b": Shape(
        "Qwen3",
        36,
        151_936,
        _COMMON
        | {
            "intermediate_size": 12_288,
            "max_position_embeddings": 40_960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "llama-3.1-8b": Shape(
        "Llama",
        32,
        128_256,
        _COMMON
        | {
            "intermediate_size": 14_336,
            "max_position_embeddings": 131_072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
}
"""By the name of the recipe."""


def build(shape: Shape, folder: Path, layers: int, vocabulary: int, narrow: int) -> int:
    """Writes a model of random weights, in bfloat16, with a tokenizer of its own. Returns its number of weights.

    narrow: divides the widths and the number of heads; 1: the true ones.
    """
    import torch
    import transformers
    from second_family import tokenizer_of

    from pastalm.models import checkpoints

    tokenizer = tokenizer_of((row["prompt"] + "\n" + row["annotated"] for row in rows()), vocabulary)
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    settings = {key: value // narrow if key in widths else value for key, value in shape.settings.items()}
    config = getattr(transformers, f"{shape.kind}Config")(
        num_hidden_layers=layers, vocab_size=len(tokenizer), tie_word_embeddings=False, **settings
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{shape.kind}ForCausalLM")(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    checkpoints.save(model, tokenizer, folder)
    return sum(p.numel() for p in model.parameters())


def rows() -> Iterator[dict[str, Any]]:
    with lzma.open(ROWS, "rt", encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


def short(count: int) -> list[dict[str, Any]]:
    """The shortest answers, half of them forked. A run holds out those of 16 prompts. count: answers."""
    in_order = sorted((row for row in rows() if row["tokens"] > 20), key=lambda row: (row["tokens"], row["id"]))
    forked = [row for row in in_order if row["chunks"] >= 2]
    return forked[: count // 2] + [row for row in in_order if not row["chunks"]][: count // 2]


def write_scored(path: Path, count: int) -> None:
    """Pairs for stage 2: a forked answer, and one of half its speed that is cut off. count: prompts."""
    forked = short(2 * count)[:count]
    with path.open("w", encoding="utf-8") as file:
        for row in forked:
            for choice, win in enumerate((0.9, 0.1)):
                file.write(json.dumps(_scored(row, choice, win)) + "\n")


def _scored(row: dict[str, Any], choice: int, win: float) -> dict[str, Any]:
    tokens = row["tokens"]
    annotated = row["annotated"] if choice == 0 else "It depends."
    return {
        "id": row["id"],
        "choice": choice,
        "prompt": row["prompt"],
        "annotated": annotated,
        "finish_reason": "stop",
        "tokens": tokens,
        "text_tokens": tokens,
        "critical_path": tokens // (2 - choice),
        "baseline_tokens": tokens,
        "scorer": "judge",
        "difference": None,
        "win": win,
        "repetition": 0.0,
        "asked": True,
    }


def train(*words: str) -> tuple[float, float]:
    """Runs `pasta train`. Returns seconds and peak memory in GB. Exits if it fails."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "pastalm.cli", "train", *words])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"pasta train {words[0]} failed")
    return time.perf_counter() - begun, usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path, help="of the model and the runs")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4000, help="of stage 1, those held out too")
    parser.add_argument("--narrow", type=int, default=1, help="divides the widths, for a machine with less memory")
    chosen = parser.parse_args()
    shape, out = SHAPES[chosen.recipe.stem], chosen.folder / chosen.recipe.stem
    out.mkdir(parents=True, exist_ok=True)
    weights = build(shape, out / "model", chosen.layers, chosen.vocabulary, chosen.narrow)
    with (out / "annotated.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in short(200))
    write_scored(out / "scored.jsonl", max(2, chosen.tokens // 1000))
    common = ["--config", str(chosen.recipe), "--model", str(out / "model"), "--device", "cpu", "--overwrite"]
    budget = ["--token-budget", str(chosen.tokens), "--batch-tokens", "1024"]
    sft = train("sft", str(out / "annotated.jsonl"), *common, *budget, "--out", str(out / "stage1"))
    start = ["--start", str(out / "stage1" / "adapter"), "--lambda", "2", "--batch-tokens", "1024"]
    prefer = train("prefer", str(out / "scored.jsonl"), *common, *start, "--out", str(out / "stage2"))
    record = json.loads((out / "stage1" / "adapter" / "train.json").read_text())
    whole = shape.weights(shape.layers, shape.vocabulary)
    figures = {
        "layers": chosen.layers,
        "weights here": weights,
        "weights of the whole model": whole,
        "stage 1, seconds": round(sft[0]),
        "stage 1, tokens": record["data"]["tokens"],
        "stage 1, seconds of training": record["seconds_this_run"],
        "stage 1, peak GB": round(sft[1], 1),
        "stage 2, seconds": round(prefer[0]),
        "stage 2, peak GB": round(prefer[1], 1),
        "GB of the whole model's weights in float32": round(4 * whole / 1e9, 1),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
