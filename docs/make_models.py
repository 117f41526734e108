"""Writes docs/models.md: builds a tiny model of every architecture, and measures or says what is refused.

python docs/make_models.py
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from pastalm.engines.transformers.engine import TransformersEngine
from pastalm.engines.transformers.supported import MODEL_TYPES
from pastalm.errors import CapabilityError
from pastalm.models.checkpoints import TWINS
from pastalm.models.packed_models import _CLASSES as NATIVE

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.laws.architectures import VARIANTS, build, exactness, tries

TARGET = Path(__file__).with_name("models.md")
HEAD = """\
# Models

Written by `python docs/make_models.py`, which builds a tiny random model of every architecture; a test holds the list
to the code.

A model is a hub name, a folder as transformers saves it, or a GGUF file. What is fetched from the hub is what is
read: configuration, tokenizer, chat template and safetensors (`pytorch_model*.bin` where there are none), no second
copy in `original/`, `onnx/` or `consolidated*`.

- **Multimodal** checkpoints (Gemma 3, Mistral 3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA, InternVL, SmolVLM and others)
  are read as the causal language model of their text part; what is trained and saved is that. Where transformers has
  none for the text part, one line says so.
- **Quantised** weights (`quantization_config`: bitsandbytes, GPTQ, AWQ, FP8, …) need their library, which one line
  names if it is missing. They are never cast; `--dtype` is refused, and an adapter stands beside them unmerged.
- **Code that comes with a model** runs only with `--trust-remote-code` (`LLM(trust_remote_code=True)`); nothing is
  asked on the terminal.
- **A checkpoint that lacks weights** is refused: transformers would fill them with noise.
- **Tokenizers** of every kind that gives a text back: byte-level BPE, SentencePiece's BPE and Unigram with bytes for
  what has no token, with or without a space put before a text. Prompts are encoded as the model's tokenizer does;
  answers, chunks and rows without that space (`tests/test_lossless.py`). Those that lose text (WordPiece, word ends)
  are refused; a character for which a vocabulary has nothing, not even bytes, is left out.
- **Rotary positions** of every type that transformers has. `dynamic` within `max_position_embeddings`, where its
  frequencies do not change; `longrope` with the short factors if `--max-model-len` is within
  `original_max_position_embeddings`, else with the long ones for every position, as vLLM does: keys in the cache stay
  right either way.

## What the transformers engine runs

The error is the largest difference between the logits of the engine, which decodes random answers with forks, nested
forks and joins together (both policies of positions), and those of one masked forward pass of transformers' own
attention, in float64; the spread of the logits is about 1. `own attention`: the model's attention cannot be replaced,
so a step is one forward pass for each answer. At load every model runs two short forward passes. One of a type that
is not here must give there what it gives without a cache, else it is refused; so is one whose attention takes an
argument that is not known.

| model type | error | |
| --- | --- | --- |
"""


def _row(name: str, kind: str, more: dict[str, object]) -> str:
    model = build(kind, **more)
    worst, _ = exactness(model)
    own = TransformersEngine(model, max_model_len=64).own_attention
    notes = [said for said, holds in (("own attention", own), ("native on CPUs too", name in NATIVE)) if holds]
    return f"| {name} | {worst:.0e} | {', '.join(notes)} |"


def _refused() -> dict[str, list[str]]:
    """Reason -> types of transformers' causal language models that are refused for it."""
    found: dict[str, list[str]] = defaultdict(list)
    for kind in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - MODEL_TYPES):
        if not tries(kind):
            found["not built here: held to its own attention when it is loaded"].append(kind)
            continue
        try:
            TransformersEngine(build(kind), max_model_len=64)
            found["not held to anything here: held to its own attention when it is loaded"].append(kind)
        except CapabilityError as error:
            reason = str(error).split(": ", 1)[1]
            other = "it has layers that are neither full nor sliding attention"
            found[other if reason.startswith("it has layers of") else reason].append(kind)
        except Exception:
            found["not built here: held to its own attention when it is loaded"].append(kind)
    return found


def page() -> str:
    """The page, whole."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows = [_row(kind, kind, {}) for kind in sorted(MODEL_TYPES)]
    rows += [_row(name, kind, more) for name, (kind, more) in VARIANTS.items()]
    twins = [f"| {text} | | a text part, run as {kind} |" for text, (kind, _) in sorted(TWINS.items())]
    refused = [f"| {reason} | {', '.join(kinds)} |" for reason, kinds in sorted(_refused().items())]
    parts = [*rows, *twins, "", "## What it refuses", "", "| why | model types |", "| --- | --- |", *refused]
    return HEAD + "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
