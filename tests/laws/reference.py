"""One masked forward pass through plain transformers, without a cache: what the laws compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

EXACT = "tests_exact"


def _exact(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The textbook's attention; softmax in the query's own precision."""
    groups = module.num_key_value_groups
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    out = scores.softmax(-1) @ value.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(EXACT, _exact)
AttentionMaskInterface.register(EXACT, eager_mask)


def reference_logits(
    model: PreTrainedModel,
    tokens: NDArray[np.int64],
    positions: NDArray[np.int64],
    visible: NDArray[np.bool_],
) -> Tensor:
    """Logits [n, vocabulary]; visible: [n, n], row sees column; sliding windows go by position."""
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    near = positions[:, None] - positions[None] < (getattr(config, "sliding_window", None) or 2**31)
    full, sliding = (_additive(seen, model.dtype) for seen in (visible, visible & near))
    mask: Any = full if kinds else sliding
    if "sliding_attention" in kinds:
        mask = {"full_attention": full, "sliding_attention": sliding}
    model.set_attn_implementation(EXACT)
    with torch.inference_mode():
        out: Any = model(
            input_ids=torch.from_numpy(tokens)[None],
            position_ids=torch.from_numpy(positions)[None],
            attention_mask=mask,
            use_cache=False,
        )
    logits: Tensor = out.logits[0]
    return logits


def _additive(visible: NDArray[np.bool_], dtype: torch.dtype) -> Tensor:
    hidden = torch.from_numpy(~visible)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)[None, None]
