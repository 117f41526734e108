"""Writes docs/models.md: builds a tiny model of every architecture, and measures its error or says why it is refused.

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

Written by `python docs/make_models.py`, which builds a tiny random model of every architecture. A test compares the
list with the code.

A model is a hub name, a folder saved by transformers, or a GGUF file. From the hub only the files that are needed are
downloaded: configuration, tokenizer, chat template and safetensors (`pytorch_model*.bin` if there are none), not the
duplicates in `original/`, `onnx/` or `consolidated*`.

- **Multimodal** checkpoints (Gemma 3, Mistral 3, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA, InternVL, SmolVLM and others)
  are loaded as the causal language model of their text part; only that is trained and saved. If transformers has no
  language model for the text part, an error says so.
- **Quantised** weights (`quantization_config`: bitsandbytes, GPTQ, AWQ, FP8, …) need their library; an error names it
  if it is missing. They keep their type: `--dtype` is an error, and an adapter is not merged into them.
- **Code that comes with a model** runs only with `--trust-remote-code` (`LLM(trust_remote_code=True)`). There is never
  a question on the terminal.
- **A checkpoint with missing weights** is an error: transformers would initialise them at random.
- **Tokenizers** that reproduce a text are supported: byte-level BPE, SentencePiece's BPE, and Unigram with byte tokens,
  with or without a space before a text. Prompts are encoded as the model's tokenizer does; answers, chunks and rows
  without that space (`tests/test_lossless.py`). Tokenizers that lose text (WordPiece, word ends) are an error.
  Characters without any token, not even for their bytes, are left out.
- **Rotary positions** of every type in transformers are supported. `dynamic` works within `max_position_embeddings`,
  where its frequencies do not change. `longrope` uses the short factors if `--max-model-len` is within
  `original_max_position_embeddings`, else the long ones for every position, as vLLM does. So keys in the cache stay
  valid.

## Models of the transformers engine

The error is the largest difference, in float64, between the logits of the engine and those of one masked forward pass
with transformers' own attention. The engine decodes random answers with forks, nested forks and joins together, with
both position policies; the spread of the logits is about 1. `own attention` means that the model's attention cannot be
replaced, so a step is one forward pass for each answer. Every model runs two short forward passes when it is loaded. A
model of a type that is not in this list must give the same logits with and without a cache there, else it is an error.
So is a model whose attention takes an unknown argument.

| model type | error | |
| --- | --- | --- |
"""


def _row(name: str, kind: str, more: dict[str, object]) -> str:
    model = build(kind, **more)
    worst, _ = exactness(model)
    own = TransformersEngine(model, max_model_len=64).own_attention
    notes = [note for note, holds in (("own attention", own), ("native on CPUs too", name in NATIVE)) if holds]
    return f"| {name} | {worst:.0e} | {', '.join(notes)} |"


def _refused() -> dict[str, list[str]]:
    """Types of transformers' causal language models that are refused or not tested, by reason."""
    types_by_reason: dict[str, list[str]] = defaultdict(list)
    for kind in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - MODEL_TYPES):
        if not tries(kind):
            types_by_reason["not tested; compared with its own attention when it is loaded"].append(kind)
            continue
        try:
            TransformersEngine(build(kind), max_model_len=64)
            types_by_reason["built, not tested; compared with its own attention when it is loaded"].append(kind)
        except CapabilityError as error:
            reason = str(error).split(": ", 1)[1]
            other = "it has layers that are neither full nor sliding attention"
            types_by_reason[other if reason.startswith("it has layers of") else reason].append(kind)
        except Exception:
            types_by_reason["not tested; compared with its own attention when it is loaded"].append(kind)
    return types_by_reason


def page() -> str:
    """The whole page."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows = [_row(kind, kind, {}) for kind in sorted(MODEL_TYPES)]
    rows += [_row(name, kind, more) for name, (kind, more) in VARIANTS.items()]
    twins = [f"| {text} | | a text part, run as {kind} |" for text, (kind, _) in sorted(TWINS.items())]
    refused = [f"| {reason} | {', '.join(kinds)} |" for reason, kinds in sorted(_refused().items())]
    parts = [*rows, *twins, "", "## Other models", "", "| reason | model types |", "| --- | --- |", *refused]
    return HEAD + "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
