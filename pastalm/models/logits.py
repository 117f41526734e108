"""Logits at chosen places of a batch, by the model's own head: its scale, its cap, its bias, whatever it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, float64


def unwrapped(model: Any) -> Any:
    """The transformers model inside an adapter, and inside what several processes wrap it in."""
    from accelerate.utils import extract_model_from_parallel

    inner = extract_model_from_parallel(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def at(model: Any, fed: Mapping[str, Any], places: Tensor) -> Tensor:
    """Logits [m, vocabulary], float32 (float64 of a float64 model), of the m places that `kept` [B, n] bool names, in
    its order. fed: what the model's forward takes, input_ids [B, n] among it. Only those places go through the head,
    and the model is called as a whole, so that whatever it is wrapped in takes part."""
    count = int(places.sum())

    def narrowed(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, *rest = inputs
        return (hidden[places][None], *rest) if hidden.shape[:2] == places.shape else None

    hook = unwrapped(model).get_output_embeddings().register_forward_pre_hook(narrowed)
    try:
        logits: Tensor = model(**fed, use_cache=False).logits
    finally:
        hook.remove()
    selected = logits[places] if logits.shape[:2] == places.shape and places.shape != (1, count) else logits[0]
    return selected if selected.dtype == float64 else selected.float()
