"""Losses over packed sequences: log-probabilities of labelled tokens, stage 1's mean and stage 2's BoNBoN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pastalm.layout import IGNORED
from pastalm.vocabulary import Tags


def token_log_probs(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log p of each labelled token [m], and its row in the batch [m]. inputs: as `collate` gives them. In float32,
    or float64 for a float64 model."""
    labels = inputs["labels"][:, 1:]
    kept = labels != IGNORED
    logits = _logits(model, inputs, kept)
    return -torch.nn.functional.cross_entropy(logits, labels[kept], reduction="none"), kept.nonzero()[:, 0]


def _logits(model: Any, inputs: Mapping[str, Tensor], kept: Tensor) -> Tensor:
    """Logits [m, vocabulary] where `kept` [B, n - 1]; only those go through the head, unless the model is wrapped
    for several processes, whose hooks need its own forward."""
    fed: dict[str, Any] = {key: inputs[key] for key in ("input_ids", "position_ids", "attention_mask")}
    if getattr(model.config, "_attn_implementation", "") == "flex_attention":
        fed["attention_mask"] = _blocks(inputs["attention_mask"])
    if not hasattr(model, "get_base_model") and not hasattr(model, "get_decoder"):
        return _exact(model(**fed, use_cache=False).logits[:, :-1][kept])
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.get_decoder()(**fed, use_cache=False).last_hidden_state
    logits = _exact(base.get_output_embeddings()(hidden[:, :-1][kept]))
    cap = getattr(base.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def _blocks(mask: Tensor) -> Any:
    """The mask [B, 1, n, n] in the form of FlexAttention, which skips the blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    seen, n = mask[:, 0], mask.shape[-1]
    return create_block_mask(
        lambda b, h, q, k: seen[b, q, k], len(mask), None, n, n, device=str(mask.device)
    )


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probs(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """log p of each answer, summed over its labels, nats [B]."""
    each, rows = token_log_probs(model, inputs)
    return each.new_zeros(len(inputs["input_ids"])).index_add(0, rows, each)


def weighted_loss(
    model: Any, inputs: Mapping[str, Tensor], tags: Tags, tag_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean negative log-likelihood over labelled tokens (for rows to be unlearned, of any other
    token); their losses [m] and whether each is a decision (a tag, or what follows a promise) [m].
    inputs: as `collate` gives them."""
    each, rows = token_log_probs(model, inputs)
    losses = torch.where(inputs["unlikely"][rows], unlikelihood(-each), -each)
    decision = decisions(inputs, tags)
    weights = torch.where(decision, tag_weight, 1.0)
    return (losses * weights).sum() / weights.sum(), losses.detach(), decision


def decisions(inputs: Mapping[str, Tensor], tags: Tags) -> Tensor:
    """Whether each labelled token is a decision: a tag, or what follows a promise [m]. inputs: as `collate` gives
    them."""
    labels = inputs["labels"][:, 1:]
    kept = labels != IGNORED
    ids = torch.tensor(tags.ids, device=labels.device)
    return torch.isin(labels[kept], ids) | (inputs["input_ids"][:, :-1][kept] == tags.promise_end)


def unlikelihood(losses: Tensor) -> Tensor:
    """-log(1 - p) of tokens whose -log p is given (Welleck et al. 2020, equation 5)."""
    return -torch.log(-torch.expm1(-losses.clamp_min(1e-6)))


def bonbon(found: Tensor, reference: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """The loss of each pair [B] and its margin, nats [B] (PASTA section 5.3; Gui et al. 2024). found, reference: log p
    of y+ and y- [B, 2] under the model and under p0."""
    margin = (found[:, 0] - found[:, 1]) - (reference[:, 0] - reference[:, 1])
    return -alpha * found[:, 0] + (1 - alpha) * (margin - 1 / beta) ** 2, margin
