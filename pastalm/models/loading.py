"""Loads models for decoding: weights with an adapter merged into them, tokenizer and vocabulary.

torch and transformers are imported only when needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pastalm.core.vocabulary import Vocabulary
from pastalm.errors import ModelError
from pastalm.models import adapters, checkpoints, dtypes, lossless
from pastalm.models.chat_template import TEACHING, TextTokenizer
from pastalm.models.downloads import EMBEDDED, pull
from pastalm.models.end_tokens import end_tokens, ends_named_by
from pastalm.models.preparing import prepare


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to decode.

    name: as the user gave it.
    model: the engine's model; None if a server runs it.
    tokenizer: of transformers, or an object with the same methods.
    vocabulary: the tokenizer's Vocabulary.
    prepared: the vocabulary has the tag tokens.
    sequential_marker: in the system message of sequential answers; None if the model was trained without one.
    context_length: positions that the model was trained for.
    teaching: appended to the system message of a model that was not finetuned, so that it writes the tags.
    """

    name: str
    model: Any
    tokenizer: Any
    vocabulary: Vocabulary
    prepared: bool
    sequential_marker: str | None
    context_length: int
    teaching: str | None = None


def load(
    name: str = EMBEDDED,
    *,
    adapter: str | None = "auto",
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Loaded:
    """Loads a base model and merges an adapter into it.

    name: the embedded model, a hub name, or a folder.
    adapter: "auto" for the one shipped for this model, None for none, else a folder.
    dtype: "auto", "stored" (as in the file; float32 if an adapter is merged), or the name of a torch dtype. Quantised
        weights keep their type, and the adapter is not merged into them.
    device: a torch device.
    trust_remote_code: run Python code that comes with the model.

    Raises ModelError.
    """
    folder = pull(name, trust_remote_code=trust_remote_code)
    adapter_path = adapters.adapter_folder(name, adapter)
    stored = "auto" if dtype == "stored" and adapter_path is None else "float32"
    model, tokenizer = checkpoints.read(folder, dtype=stored, device=device, trust_remote_code=trust_remote_code)
    quantised = checkpoints.is_quantised(model)
    if quantised and dtype not in ("auto", "stored"):
        raise ModelError(f"the weights of {name} are quantised and cannot be converted: leave out the dtype")
    if adapter_path is not None:
        adapters.check_base(adapters.read_card(adapter_path), model, adapter_path)
        prepare(model, tokenizer)
        model = adapters.merge(model, adapter_path)
    vocabulary = lossless.vocabulary_of(
        tokenizer, eos=end_tokens(model, tokenizer), size=model.get_input_embeddings().weight.shape[0]
    )
    if not quantised:
        model = _cast(model, device, None if dtype == "stored" else dtypes.named(dtype, device))
    model.eval().requires_grad_(False)
    return Loaded(
        name=name,
        model=model,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        prepared=vocabulary.tags is not None,
        sequential_marker=adapters.sequential_marker(adapter_path or folder),
        context_length=int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 2048)),
    )


def _cast(model: Any, device: str, dtype: Any) -> Any:
    """Converts the weights in place, but not the buffers: rotary frequencies rounded to bfloat16 would be wrong by most
    of a radian at a distance of 500 positions."""
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    model.to(device=device, dtype=dtype)
    for module, own in buffers:
        for name, buffer in own.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model


def load_tokenizer(name: str, *, prompted: bool = False, trust_remote_code: bool = False) -> Loaded:
    """Loads the tokenizer of a model that a server runs, without its weights.

    name: hub name or folder.
    prompted: teach the tags in the system message, whether the model was finetuned or not.
    trust_remote_code: run Python code that comes with the tokenizer.

    Raises ModelError.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    local = Path(name).exists() or name.lower() == EMBEDDED or name.startswith((".", "/", "~"))
    where = str(pull(name)) if local else name
    hint = "; give --tokenizer, a hub name or a folder"
    with checkpoints.refusing(name, what="a tokenizer", hint=hint):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code).get_text_config(decoder=True)
    try:
        generation = GenerationConfig.from_pretrained(where)
    except Exception:
        generation = None
    eos = ends_named_by(generation, tokenizer)
    size = max(len(tokenizer), int(getattr(config, "vocab_size", 0) or 0))
    vocabulary = lossless.vocabulary_of(tokenizer, eos=eos, size=size)
    if prompted:
        vocabulary = replace(vocabulary, tags=None)
    prepared = vocabulary.tags is not None
    return Loaded(
        name=name,
        model=None,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        prepared=prepared,
        sequential_marker=adapters.sequential_marker(Path(where)) if prepared else None,
        context_length=int(getattr(config, "max_position_embeddings", 0) or 2048),
        teaching=TEACHING if prompted else None,
    )


def with_text_prompts(loaded: Loaded, vocabulary: Vocabulary) -> Loaded:
    """The same for a server that takes prompts as text. The ids of `vocabulary` stand for pieces of text."""
    return replace(loaded, tokenizer=TextTokenizer(loaded.tokenizer, vocabulary.encode), vocabulary=vocabulary)
