"""Prepares models: adds the six tag tokens to a model and its tokenizer."""

from __future__ import annotations

from typing import Any

from pastalm.core.vocabulary import TAG_TOKENS


def prepare(model: Any, tokenizer: Any, *, seed: int = 0) -> None:
    """Adds the six tag tokens to model and tokenizer, in place. Does nothing if they exist already.

    The new embedding rows start at the mean of all rows plus small noise. A row copied from a word would make that word
    the most likely alternative wherever a tag is not allowed.

    model: of transformers.
    tokenizer: of transformers.
    seed: for the noise.
    """
    import torch

    if all(t in tokenizer.get_vocab() for t in TAG_TOKENS.values()):
        return
    tokenizer.add_special_tokens({"extra_special_tokens": list(TAG_TOKENS.values())})
    ids = [tokenizer.get_vocab()[t] for t in TAG_TOKENS.values()]
    size = max(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    model.resize_token_embeddings(size, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    for table in (module.weight for module in token_tables(model)):
        rows = table.data[: min(ids)].float()
        noise = torch.randn(len(ids), rows.shape[1], generator=generator).to(rows.device)
        table.data[ids] = (rows.mean(0) + 0.02 * rows.std(0) * noise).to(table.dtype)


def token_tables(model: Any) -> list[Any]:
    """The modules with one row per token: the input embedding, and the output head if its weights are not tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head.weight is embedding.weight else [embedding, head]
