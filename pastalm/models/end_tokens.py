"""The tokens that end an answer, and the one that a model is trained to end with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pastalm.errors import ModelError


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Ids of the tokens that end an answer."""
    return ends_named_by(model.generation_config, tokenizer)


def ends_named_by(generation: Any, tokenizer: Any) -> set[int]:
    turn_end_id = turn_end(tokenizer)
    return {*_listed_ends(generation, tokenizer), *([] if turn_end_id is None else [turn_end_id])}


def _listed_ends(generation: Any, tokenizer: Any) -> list[int]:
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    return list(ids) if isinstance(ids, Sequence) else [] if ids is None else [ids]


def turn_end(tokenizer: Any) -> int | None:
    """The id of the token that the chat template writes after an assistant message; None if it writes none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    placeholder = "\ue002"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": placeholder}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # the template does not accept these messages
        return None
    rest = text.rpartition(placeholder)[2].lstrip() if placeholder in text else ""
    ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    return ids.get(max((spelled for spelled in ids if rest.startswith(spelled)), key=len, default=""))


def taught_end(model: Any, tokenizer: Any) -> int:
    """The id that ends an answer in training: the chat template's end of turn, else the tokenizer's EOS, else the first
    of the model's EOS ids. Raises ModelError if there is none."""
    listed = _listed_ends(model.generation_config, tokenizer)
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id in listed else listed
    ends = [end for end in (turn_end(tokenizer), *own) if end is not None]
    if not ends:
        raise ModelError("this model has no token that ends an answer: set eos_token_id in generation_config.json")
    return ends[0]
