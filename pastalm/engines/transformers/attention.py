"""The attention that runs inside a transformers model: packed queries over the rows of the pool.

transformers finds it by the name `ATTENTION`. In the linear layers, the tokens of all
requests are one sequence without padding; only here are they arranged by row. The mask says what each token sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pastalm.engines.transformers.pool import Plan
from pastalm.errors import CapabilityError, EngineError

ATTENTION = "pastalm"
"""The name under which transformers finds this attention."""
_IGNORED = frozenset(
    {
        *("dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions"),
        *("output_hidden_states", "output_router_logits", "deterministic"),
    }
)
"""Arguments of an attention that change nothing here: the mask says what is visible, and a model in eval mode has no
dropout."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How attention scores are computed.

    scaling: factor of query times key; None: 1 / sqrt(head_dim).
    softcap: bounds the scores by a tanh (Gemma 2).
    sinks: [heads], the score of a position that takes weight but has no value (gpt-oss).
    """

    scaling: float | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    plan: Plan | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of packed queries over cached keys; [1, tokens, heads, d], and no weights.

    query: [1, heads, tokens, d].
    key, value: [rows, kv_heads, slots, d].
    attention_mask: added to the scores. [1, 1, groups * tokens, width] for one row, else [1, 1, 1, n]: the masks
        [rows, 1, groups * queries, width] of the plan's parts, one after the other.
    s_aux: [heads], attention sinks.

    Raises CapabilityError for an unknown argument that might change the result.
    """
    if unknown := [name for name, value in others.items() if value is not None and name not in _IGNORED]:
        raise CapabilityError(f"its attention takes {unknown[0]!r}, which is not known here")
    if plan is None:
        raise EngineError("it does not pass keyword arguments on to its attention")
    scoring = Scoring(scaling, softcap, s_aux)
    if plan.queries is None:
        return _attend(query, key, value, attention_mask, scoring).contiguous(), None
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    masks, outputs = attention_mask.view(-1), []
    for part in plan.parts:
        queries = query[0][:, part.tokens].transpose(0, 1)
        shape = (part.last - part.first, 1, groups * part.queries, part.width)
        mask = masks[part.start : part.start + math.prod(shape)].view(shape)
        keys, values = key[part.first : part.last], value[part.first : part.last]
        out = _attend(queries, keys, values, mask, scoring)
        outputs.append(out.reshape(-1, heads, out.shape[-1]))
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[plan.queries][None], None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Attention [rows, queries, heads, d] of queries [rows, heads, queries, d] over as many slots as the mask has.

    Query heads that share keys become rows of one product, so that the keys are not copied for each head.
    """
    rows, heads, queries, head_dim = query.shape
    folded = query.reshape(rows, key.shape[1], mask.shape[2], head_dim)
    key, value = key[:, :, : mask.shape[3]], value[:, :, : mask.shape[3]]
    if scoring.plain:
        out = torch.nn.functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=mask, scale=scoring.scaling
        )
    else:
        out = _attend_explicitly(folded, key, value, mask, scoring)
    return out.reshape(rows, heads, queries, -1).transpose(1, 2)


def _attend_explicitly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Attention with capped scores (Gemma 2) or sinks (gpt-oss); softmax in float32, or float64 for float64."""
    scores = torch.matmul(query, key.transpose(2, 3)) * (scoring.scaling or query.shape[3] ** -0.5)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (scores + mask).to(exact)
    if scoring.sinks is not None:
        kv_heads, folded = scores.shape[1:3]
        groups = scoring.sinks.numel() // kv_heads
        sinks = scoring.sinks.to(exact).view(1, kv_heads, groups, 1).expand(len(scores), -1, -1, folded // groups)
        scores = torch.cat([scores, sinks.reshape(len(scores), kv_heads, folded, 1)], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return torch.matmul(weights.to(query.dtype), value)


AttentionInterface.register(ATTENTION, attention)
# unregistered, a mask that is not 4-D would count as no mask at all
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def attending(config: Any, how: str) -> Iterator[None]:
    """Inside, the model uses the attention implementation `how`; outside, the one it had before."""
    before = config._attn_implementation
    config._attn_implementation = how
    try:
        yield
    finally:
        config._attn_implementation = before
