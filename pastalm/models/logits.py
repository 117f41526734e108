"""Logits at selected positions of a batch, computed by the model's own head, with its scale, cap and bias."""

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
    """Logits [m, vocabulary] at the m selected positions, float32 (float64 for a float64 model).

    Only these positions go through the head. The model is called as a whole, so that wrappers around it work.

    model: of transformers, possibly wrapped.
    fed: arguments of its forward, with input_ids [B, n].
    places: [B, n] bool, the positions.
    """
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
